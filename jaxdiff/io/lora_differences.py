"""Reading the changes of adapters other than LoRA from a file and peft's settings beside it."""

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
    """The change of one layer by an adapter other than LoRA: see jaxdiff/io/lycoris.py."""

    parts: Mapping[str, Array]  # by role, see `_read_parts`
    scale: float  # alpha / rank; 1 without a rank
    magnitude: Array | None = None  # of DoRA: [out], or [in, 1] with one for each input


def read_vector(source: TensorSource, tensor: str, scale: float = 1.0) -> Difference:
    return Difference({"diff": jnp.asarray(np.array(source.read(tensor), order="C"))}, scale)


def read_difference(
    source: TensorSource, config: dict[str, Any], layer: Layer, tensors: Mapping[str, str], parts: Mapping[str, str]
) -> Difference:
    """Read the change of a layer from the tensors of its `parts`; alpha defaults to the rank."""
    rank = lycoris.rank({role: source.shapes[name] for role, name in parts.items()})
    if rank is None and config and parts.keys() & {"lokr_w1", "lokr_w1_a"}:  # peft always divides by the rank
        rank = config.get("r")
        if not isinstance(rank, int) or rank < 1:
            raise WeightsError(f"{source.path} has damaged metadata (r {rank!r}): fetch it again.")
    scale = 1.0
    if rank is not None and (tensor := tensors.get("alpha")):
        scale = read_scalar(source, tensor) / rank
    elif rank is not None:
        names = peft_names(layer.name.partition(".")[2], next(iter(parts.values())))
        scale = config_alpha(source, config, names, rank) / rank
    return Difference(_read_parts(source, config, layer, parts), scale, read_magnitude(source, config, layer, tensors))


def _read_parts(
    source: TensorSource, config: dict[str, Any], layer: Layer, parts: Mapping[str, str]
) -> dict[str, Array]:
    """The parts by role, as in the file except for those whose meaning depends on settings or another tensor.

    peft's OFT becomes its rotations, and (IA)³ becomes its difference from 1, for each output or each input.
    """
    x: dict[str, Any] = {role: np.array(source.read(name), order="C") for role, name in parts.items()}
    if "oft_blocks" in x and "alpha" in x:
        read_scalar(source, parts["alpha"])
    if "ia3_weight" in x:
        x = {"ia3_in" if read_scalar(source, parts["on_input"]) else "ia3_out": x["ia3_weight"].reshape(-1)}
    elif "ia3_l" in x or "oft_R" in x:
        if not config:
            raise WeightsError(f"{source.path} needs the {FILE} that peft wrote, which says how {layer.name} changes.")
        try:
            x = _convert_peft(config, layer, parts, x)
        except (AttributeError, TypeError, ValueError, re.error) as e:
            raise WeightsError(f"{source.path} and its {FILE} do not go together for {layer.name} ({e}).") from None
    for role, axis in lycoris.IA3.items():
        if role in x and x[role].size != layer.shape[-1 - axis]:
            side = ("outputs", "inputs")[axis]
            raise WeightsError(
                f"{source.path} scales {x[role].size} {side} of {layer.name}, which has {layer.shape[-1 - axis]}."
            )
    return {role: jnp.asarray(part) for role, part in x.items()}


def _convert_peft(
    config: dict[str, Any], layer: Layer, parts: Mapping[str, str], x: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    if (packed := x.get("oft_R")) is not None:
        if np.prod(layer.shape[:-2]) > 1:
            raise ValueError("peft draws with OFT of convolutions larger than 1x1 other than it merges it")
        return {"oft_R": rotations.from_peft(packed, config, layer.shape[-2])}
    sizes = x["ia3_l"]
    name, _ = peft_names(layer.name.partition(".")[2], parts["ia3_l"])
    of_inputs = sizes.shape[0] == 1 if sizes.ndim == 2 else is_feedforward(config, name)
    return {"ia3_in" if of_inputs else "ia3_out": sizes.reshape(-1).astype(np.float32) - 1}


def read_magnitude(
    source: TensorSource, config: dict[str, Any], layer: Layer, tensors: Mapping[str, str]
) -> Array | None:
    """A layer's magnitudes as in `Factors`; in the file they are [out, 1, …], or [1, in, …] with one for each input."""
    if "magnitude" not in tensors:
        if config.get("use_dora"):
            raise WeightsError(f"{source.path} is a DoRA but lacks the magnitude of {layer.name}.")
        return None
    x = np.asarray(source.read(tensors["magnitude"]))
    # peft's are always one for each output, [1, out, 1, 1] for a convolution.
    is_per_input = tensors["magnitude"].endswith("dora_scale") and x.shape[:2] == (1, layer.shape[-2])
    return jnp.asarray(np.array(x.reshape(-1, 1) if is_per_input else x.reshape(-1), order="C"))


def read_scalar(source: TensorSource, tensor: str) -> float:
    value = np.asarray(source.read(tensor), np.float64)
    if value.size != 1 or not np.isfinite(value).all():
        raise WeightsError(f"{source.path}: {tensor} must be one finite number: the file is damaged, fetch it again.")
    return float(value.reshape(()))
