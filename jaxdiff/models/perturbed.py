"""A UNet whose self-attention is switched off in some layers, for perturbed-attention guidance."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn

from jaxdiff.errors import ArgumentError
from jaxdiff.models.layers import Attention


@contextlib.contextmanager
def perturbed_attention(layers: Sequence[str]) -> Iterator[None]:
    """Within it, a UNet that is applied replaces the self-attention maps of these layers by the identity.

    Each position then keeps its own value (Ahn et al. 2024, arXiv:2403.17377, equation 13).

    Args:
        layers: how their names in PyTorch begin: "mid", "up_blocks.1", "down_blocks.1.attentions.0".

    Raises:
        ArgumentError: at its end, if no layer that was applied has such a name.
    """
    found = False

    def replace(
        call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        nonlocal found
        module = context.module
        if isinstance(module, Attention) and context.method_name == "__call__" and len(args) == 1 and not kwargs:
            name = re.sub(r"_(\d+)", r".\1", ".".join(module.path))
            if any(re.match(rf"{re.escape(layer)}(?!\d)", name) for layer in layers):
                found = True
                return call(*args, identity=True)
        return call(*args, **kwargs)

    with nn.intercept_methods(replace):
        yield
    if not found:
        raise ArgumentError(
            "pag_scale", f"needs self-attention in {', '.join(layers)}, which this UNet lacks: set it to 0."
        )
