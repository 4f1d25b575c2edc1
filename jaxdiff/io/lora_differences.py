"""What a file changes a layer by where that is no LoRA: read from the file, with what peft's settings say beside it."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import WeightsError
from jaxdiff.io import lycoris, rotations
from jaxdiff.io.lora_config import FILE, is_feedforward, peft_names
from jaxdiff.io.lora_config import alpha as config_alpha
from jaxdiff.io.lora_layers import Layer
from jaxdiff.io.tensor_files import TensorSource
from jaxdiff.typing import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=("parts", "magnitude"), meta_fields=("scale",))
@dataclasses.dataclass(frozen=True)
class Difference:
    """The change of one layer by what is no LoRA: see jaxdiff/io/lycoris.py."""

    parts: Mapping[str, Array]  # as the file has them, but see `_read`
    scale: float  # alpha / rank; 1 where there is no rank
    magnitude: Array | None = None  # of DoRA: [out], or [in, 1] for one an input


def vector(source: TensorSource, tensor: str, scale: float = 1.0) -> Difference:
    return Difference({"diff": jnp.asarray(np.array(source.read(tensor), order="C"))}, scale)


def difference(
    source: TensorSource, config: dict[str, Any], layer: Layer, tensors: Mapping[str, str], parts: Mapping[str, str]
) -> Difference:
    """The change of a layer by what is no LoRA's; where neither file nor settings say an alpha, it is the rank."""
    rank = lycoris.rank({role: source.shapes[name] for role, name in parts.items()})
    if rank is None and config and parts.keys() & {"lokr_w1", "lokr_w1_a"}:  # peft divides by it in any case
        rank = config.get("r")
        if not isinstance(rank, int) or rank < 1:
            raise WeightsError(f"{source.path} has damaged metadata (r {rank!r}): fetch it again.")
    scale = 1.0
    if rank is not None and (written := tensors.get("alpha")):
        scale = number(source, written) / rank
    elif rank is not None:
        called = peft_names(layer.name.partition(".")[2], next(iter(parts.values())))
        scale = config_alpha(source, config, called, rank) / rank
    return Difference(_read(source, config, layer, parts), scale, magnitude(source, config, layer, tensors))


def _read(source: TensorSource, config: dict[str, Any], layer: Layer, parts: Mapping[str, str]) -> dict[str, Array]:
    """The parts as the file has them, but for what settings or another tensor say the meaning of.

    peft's OFT becomes its rotations, and (IA)³ what is added to 1, for each output or each input.
    """
    x: dict[str, Any] = {role: np.array(source.read(name), order="C") for role, name in parts.items()}
    if "oft_blocks" in x and "alpha" in x:
        number(source, parts["alpha"])
    if "ia3_weight" in x:
        x = {"ia3_in" if number(source, parts["on_input"]) else "ia3_out": x["ia3_weight"].reshape(-1)}
    elif "ia3_l" in x or "oft_R" in x:
        if not config:
            raise WeightsError(f"{source.path} needs the {FILE} that peft wrote, which says how {layer.name} changes.")
        try:
            x = _of_peft(config, layer, parts, x)
        except (AttributeError, TypeError, ValueError, re.error) as e:
            raise WeightsError(f"{source.path} and its {FILE} do not go together for {layer.name} ({e}).") from None
    for role, axis in lycoris.IA3.items():
        if role in x and x[role].size != layer.shape[-1 - axis]:
            side = ("outputs", "inputs")[axis]
            raise WeightsError(
                f"{source.path} scales {x[role].size} {side} of {layer.name}, which has {layer.shape[-1 - axis]}."
            )
    return {role: jnp.asarray(part) for role, part in x.items()}


def _of_peft(
    config: dict[str, Any], layer: Layer, parts: Mapping[str, str], x: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    if (packed := x.get("oft_R")) is not None:
        if np.prod(layer.shape[:-2]) > 1:
            raise ValueError("peft draws with OFT of convolutions larger than 1x1 other than it merges it")
        return {"oft_R": rotations.of_peft(packed, config, layer.shape[-2])}
    sizes = x["ia3_l"]
    called, _ = peft_names(layer.name.partition(".")[2], parts["ia3_l"])
    of_inputs = sizes.shape[0] == 1 if sizes.ndim == 2 else is_feedforward(config, called)
    return {"ia3_in" if of_inputs else "ia3_out": sizes.reshape(-1).astype(np.float32) - 1}


def magnitude(source: TensorSource, config: dict[str, Any], layer: Layer, tensors: Mapping[str, str]) -> Array | None:
    """A layer's magnitudes as `Factors` has them: [out, 1 …] in the file or for one an input [1, in, …]."""
    if "magnitude" not in tensors:
        if config.get("use_dora"):
            raise WeightsError(f"{source.path} is a DoRA but lacks the magnitude of {layer.name}.")
        return None
    x = np.asarray(source.read(tensors["magnitude"]))
    # peft's has one an output whatever its shape, [1, out, 1, 1] for a convolution.
    by_input = tensors["magnitude"].endswith("dora_scale") and x.shape[:2] == (1, layer.shape[-2])
    return jnp.asarray(np.array(x.reshape(-1, 1) if by_input else x.reshape(-1), order="C"))


def number(source: TensorSource, tensor: str) -> float:
    value = np.asarray(source.read(tensor), np.float64)
    if value.size != 1 or not np.isfinite(value).all():
        raise WeightsError(f"{source.path}: {tensor} must be one finite number: the file is damaged, fetch it again.")
    return float(value.reshape(()))
