"""Replacing self-attention maps of a UNet by the identity, for perturbed-attention guidance."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn

from jaxdiff.errors import ArgumentError
from jaxdiff.models.layers import Attention


@contextlib.contextmanager
def perturbed_attention(layers: Sequence[str]) -> Iterator[None]:
    """A context in which the self-attention maps of some layers of a UNet are replaced by the identity.

    Each position then keeps its own value (Ahn et al. 2024, arXiv:2403.17377, equation 13).

    Args:
        layers: prefixes of their PyTorch names: "mid", "up_blocks.1", "down_blocks.1.attentions.0".

    Raises:
        ArgumentError: on exit, if no layer that was applied matches.
    """
    matched = False

    def replace(
        call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        nonlocal matched
        module = context.module
        if isinstance(module, Attention) and context.method_name == "__call__" and len(args) == 1 and not kwargs:
            name = re.sub(r"_(\d+)", r".\1", ".".join(module.path))
            if any(re.match(rf"{re.escape(layer)}(?!\d)", name) for layer in layers):
                matched = True
                return call(*args, identity=True)
        return call(*args, **kwargs)

    with nn.intercept_methods(replace):
        yield
    if not matched:
        raise ArgumentError(
            "pag_scale", f"needs self-attention in {', '.join(layers)}, which this UNet lacks: set it to 0."
        )
