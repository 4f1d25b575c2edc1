"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): reading and writing files, merging into parameters.

A LoRA adds to a layer's kernel the product of two thin matrices (section 4.1),

    kernel + scale * alpha / rank * down @ up                                                            (1)

with down [..., in, rank] and up [rank, out]; for a convolution, down keeps the kernel's height and width. DoRA (Liu et
al. 2024, arXiv:2402.09353, equation 5) gives each output, or each input, of that sum a learned magnitude m,

    kernel + scale * (m * (kernel + alpha / rank * down @ up) / norm - kernel)                           (2)

with the norms over all other axes. Biases and the weights of norms are changed by a difference; jaxdiff/io/lycoris.py
has the other kinds of adapters. LoRAs are merged into the parameters rather than applied beside them, by a pure
function of params, LoRAs and scales, which may be traced.
"""

import dataclasses
import functools
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdiff.errors import WeightsError
from jaxdiff.io import lycoris, programs, textual_inversion
from jaxdiff.io.lora_config import alpha as config_alpha
from jaxdiff.io.lora_config import peft_names, read_configs, warn_of_patterns
from jaxdiff.io.lora_differences import Difference, read_difference, read_magnitude, read_scalar, read_vector
from jaxdiff.io.lora_folders import adapter_files
from jaxdiff.io.lora_layers import BIAS, changeable, layers, norms
from jaxdiff.io.lora_names import find_layers, layer_name, parts_of
from jaxdiff.io.original_layout import unet_table
from jaxdiff.io.tensor_files import open_tensors, write_tensors
from jaxdiff.io.torch_names import from_torch_layout, to_torch_layout
from jaxdiff.io.transformer_loras import MODULE, fuse_layers, split_fused_layers
from jaxdiff.models.model import Model
from jaxdiff.typing import Array, Key, Params


@functools.partial(jax.tree_util.register_dataclass, data_fields=("down", "up", "magnitude"), meta_fields=("alpha",))
@dataclasses.dataclass(frozen=True)
class Factors:
    """The change of one layer; `alpha` is not a leaf of the tree, so that optimizers do not train it."""

    down: Array  # [in, rank], or [H, W, in, rank] for a convolution
    up: Array  # [rank, out]
    alpha: float
    magnitude: Array | None = None  # of DoRA: [out], or [in, 1] with one for each input

    @property
    def rank(self) -> int:
        return self.up.shape[0]


Change = Factors | Difference
# By PyTorch name with the module: "unet.mid_block.attentions.0.proj_in", or of its bias "….proj_in.bias".
Lora = Mapping[str, Change]
KERNEL = ("kernel",)  # the factors have a kernel's layout
TEXT_ENCODERS = "text_encoder"  # prefix of the names of text encoders' layers
Weighted = tuple[tuple[Path, float, float], ...]  # LoRA files with weights of the text encoders and of the UNet


def merge_lora(params: Params, loras: Lora | Sequence[Lora], scales: Any = 1.0) -> Params:
    """Parameters with LoRAs added, equations (1) and (2). Pure: may be jitted, differentiated, mapped over the scales.

    Args:
        params: the model's parameters; not modified.
        loras: one, or several to be added together.
        scales: one number for all, or one for each; 0 changes nothing. The change is proportional to the scale, except
            that OFT and BOFT follow LyCORIS' multiplier (see jaxdiff/io/rotations.py).

    Returns:
        A tree like `params` with the same dtypes; sums are computed in float32.

    Raises:
        WeightsError: the parameters lack a layer, the scales are not as many as the LoRAs, or one is not finite.
    """
    loras = [loras] if isinstance(loras, Mapping) else list(loras)
    if not isinstance(scales, Sequence) and jnp.ndim(scales) == 0:
        scales = [scales] * len(loras)
    if len(scales) != len(loras):
        raise WeightsError(f"{len(loras)} LoRAs have {len(scales)} scales: give one for all, or one for each.")
    for scale in scales:
        if not isinstance(scale, jax.core.Tracer) and not np.isfinite(np.asarray(scale, np.float64)).all():
            raise WeightsError(f"scale {scale} of a LoRA must be finite: give a number such as 0.8.")
    flat, paths = flatten_dict(params), {name: x.path for name, x in changeable(params).items()}
    parts: dict[str, list[tuple[Change, Any]]] = {}  # by layer, so that only one full-sized change is in memory
    for lora, scale in zip(loras, scales, strict=True):
        for name, change in lora.items():
            if name not in paths:
                raise WeightsError(f"the LoRA changes {name}, which the model does not have: read it with this model.")
            parts.setdefault(name, []).append((change, scale))
    for name, changes in parts.items():
        flat[paths[name]] = _merged_kernel(flat[paths[name]], changes)
    return unflatten_dict(flat)


def merge_named(params: Params, files: Mapping[Path, Lora], chosen: Weighted) -> Params:
    """Parameters with the LoRAs of one prompt."""
    parts: list[tuple[Lora, float]] = []
    for path, text_encoder, unet in chosen:
        for weight, is_text in ((text_encoder, True), (unet, False)):
            part = {n: x for n, x in files[path].items() if n.startswith(TEXT_ENCODERS) == is_text}
            parts += [(part, weight)] if part and weight else []
    return merge_lora(params, [lora for lora, _ in parts], [weight for _, weight in parts]) if parts else params


def _merged_kernel(kernel: Array, changes: Sequence[tuple[Change, Any]]) -> jax.Array:
    """A kernel plus the changes of several LoRAs at their scales, each computed from the original kernel."""
    old = jnp.asarray(kernel, jnp.float32)
    delta = functools.reduce(operator.add, (_delta(old, change, scale) for change, scale in changes))
    return (old + delta).astype(kernel.dtype)


def _delta(kernel: jax.Array, change: Change, scale: Any) -> jax.Array:
    """What a LoRA adds at a scale to a kernel [..., in, out], or to a weight or bias [out]."""
    strength = scale if change.magnitude is None else 1.0
    if isinstance(change, Difference) and kernel.ndim == 1:
        delta = change.scale * lycoris.change(change.parts, kernel, strength)
    elif isinstance(change, Difference):
        weight = jnp.moveaxis(kernel, (-1, -2), (0, 1))  # [out, in, …]
        delta = change.scale * lycoris.change(change.parts, weight, strength).reshape(weight.shape)
        delta = jnp.moveaxis(delta, (0, 1), (-1, -2))
    else:
        down, up = (jnp.asarray(x, jnp.float32) for x in (change.down, change.up))
        delta = strength * ((change.alpha / change.rank) * jnp.matmul(down, up, precision="highest"))
    return delta if change.magnitude is None else scale * dora_delta(kernel, delta, change.magnitude)


def dora_delta(kernel: jax.Array, change: jax.Array, magnitude: Array) -> jax.Array:
    """What DoRA adds to a kernel [..., in, out] at scale 1: equation (2)."""
    changed = kernel + change
    magnitude_axis = changed.ndim - 1 if magnitude.ndim == 1 else changed.ndim - 2
    norm_axes = tuple(axis for axis in range(changed.ndim) if axis != magnitude_axis)
    norm = jnp.sqrt(jnp.sum(changed**2, norm_axes, keepdims=True))
    return changed * (jnp.asarray(magnitude, jnp.float32) / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)) - kernel


def load_lora(model: Model, params: Params, paths: Any, scale: Any = 1.0) -> Params:
    """Parameters with the LoRAs of one or several files added.

    Args:
        paths: a file, or a list of files: see `read_lora`.
        scale: one number for all, or a list with one for each; 1 is the strength in training.

    Raises:
        WeightsError: one sentence that names the file and what does not fit.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    merged = merge_lora(params, [read_lora(model, path) for path in paths], scale)
    for path in paths:
        if words := bundled_words(model, path):
            listed = ", ".join(map(repr, words))
            logging.warning("%s brings an embedding along, for %s: load it as a textual inversion too.", path, listed)
    return merged


def bundled_words(model: Model, path: str | Path) -> list[str]:
    """The words whose embeddings are bundled in a LoRA's file and which the model does not know."""
    words = [word for file in adapter_files(path) for word in textual_inversion.bundled(open_tensors(file))]
    return [word for word in words if not textual_inversion.knows(model, word)]


def load_bundled(model: Model, params: Params, path: str | Path) -> tuple[Model, Params]:
    """A model with the words whose embeddings are bundled in a LoRA's file: see `textual_inversion.load_bundled`."""
    for file in adapter_files(path):
        model, params = textual_inversion.load_bundled(model, params, file)
    return model, params


def read_lora(model: Model, path: str | Path) -> Lora:
    """The LoRA in a file, for the UNet and the text encoders.

    Args:
        path: safetensors, or PyTorch's .pt and .bin, in the names of diffusers, peft (with `adapter_config.json`
            beside), kohya, OneTrainer, ComfyUI or SimpleTuner, or in the lists of cloneofsimo/lora; LoCon, LoHa, LoKr,
            DoRA, OFT, BOFT, GLoRA, (IA)³ and whole differences (of norms and biases too). Or the folder of such a
            file. Factors keep the file's type.

    Raises:
        WeightsError: the file is missing or damaged, holds anything but a LoRA, or one for another model.
    """
    lora: dict[str, Change] = {}
    for file in adapter_files(path):
        for name, change in _read_file(model, file).items():
            if name in lora:
                raise WeightsError(f"{path} changes {name} in several of its files: give the one that you mean.")
            lora[name] = change
    return lora


def _read_file(model: Model, path: Path) -> Lora:
    source = open_tensors(path)
    configs, module = read_configs(source)
    lora: dict[str, Change] = {}
    names_by_module: dict[str, list[tuple[str, str]]] = {}  # of layers without an alpha in the file
    shapes = programs.shapes(model)
    known = list(layers(shapes))
    original = {} if model.unet is None else unet_table(model.unet.config)
    if model.transformer is not None:
        source = split_fused_layers(source, model.family, known)
    for layer, tensors in find_layers(source, [*known, *norms(shapes)], original, module):
        config = configs.get(layer.module, {})
        if tensor := tensors.get("bias"):
            lora[layer.name + BIAS] = read_vector(source, tensor)
        if len(layer.shape) == 1:
            if tensor := tensors.get("diff"):
                lora[layer.name] = read_vector(source, tensor)
            continue
        if parts := parts_of(tensors):
            lora[layer.name] = change = read_difference(source, config, layer, tensors, parts)
            if "ia3_l" in parts and "ia3_out" in change.parts and layer.has_bias:  # of peft: scales it too
                lora[layer.name + BIAS] = change
            continue
        if "down" not in tensors:  # only a bias
            continue
        down, up = (source.read(tensors[role]) for role in ("down", "up"))
        if "mid" in tensors:  # a 1x1 convolution followed by one of the kernel's size equals one of that size
            matrix, mid = (np.asarray(x, np.float32) for x in (down, source.read(tensors["mid"])))
            down = np.einsum("abhw,bi->aihw", mid, matrix.reshape(len(matrix), -1)).astype(down.dtype)
        if tensor := tensors.get(lycoris.SCALAR):
            up = up * read_scalar(source, tensor)
        rank = len(down)
        if tensor := tensors.get("alpha"):
            alpha = read_scalar(source, tensor)
        else:
            layer_names = peft_names(layer.name.partition(".")[2], tensors["down"])
            names_by_module.setdefault(layer.module, []).append(layer_names)
            alpha = config_alpha(source, config, layer_names, rank)
        if tensor := tensors.get("up_bias"):
            lora[layer.name + BIAS] = read_vector(source, tensor, alpha / rank)
        down = from_torch_layout(KERNEL, down).reshape(*layer.shape[:-1], rank)
        # Contiguous copies, since `read` may return a view into the file.
        factors = [jnp.asarray(np.array(x, order="C")) for x in (down, up.reshape(-1, rank).T)]
        lora[layer.name] = Factors(factors[0], factors[1], alpha, read_magnitude(source, config, layer, tensors))
    for module_name, names in names_by_module.items():
        warn_of_patterns(source, configs.get(module_name, {}), names)
    return lora


def save_lora(path: str | Path, model: Model, lora: Lora, layout: Literal["diffusers", "kohya"] = "diffusers") -> None:
    """Write a LoRA as a safetensors file that `read_lora` and PyTorch diffusers open, atomically.

    Args:
        layout: "diffusers", which has no alpha, so that up is multiplied by alpha / rank; or "kohya", which other
            programs read too.

    Raises:
        WeightsError: the layout is unknown, the model has no such layer, or the file cannot be written.
    """
    if layout not in ("diffusers", "kohya"):
        raise WeightsError(f"layout {layout!r} is unknown; known are diffusers, kohya.")
    known = changeable(programs.shapes(model))
    tensors: dict[str, np.ndarray] = {}
    fused: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    for name, change in lora.items():
        if name not in known:
            raise WeightsError(f"the LoRA changes {name}, which the model does not have: save it with its own model.")
        layer, axes = known[name.removesuffix(BIAS)], len(known[name].shape)
        stem = layer_name(layer, layout, two_text_encoders="text_encoder_2" in model.modules)
        if isinstance(change, Difference):
            parts = lycoris.to_tensors(jax.device_get(change.parts), change.scale, axes)
            if parts is None or layout != "kohya":
                hint = "" if parts is None else ": take layout='kohya'"
                raise WeightsError(f"the layout {layout} has no place for what changes {name}{hint}.")
            if axes == 1:
                ending = ("diff_b" if len(layer.shape) > 1 else "b_norm") if name.endswith(BIAS) else "w_norm"
                (x,) = parts.values()
                parts = {ending: x}
            tensors |= {f"{stem}.{ending}": x for ending, x in parts.items()}
        if change.magnitude is not None:
            tensors |= _magnitude_tensors(stem, np.asarray(jax.device_get(change.magnitude)), layout, axes)
        if isinstance(change, Difference):
            continue
        down = to_torch_layout(KERNEL, np.asarray(jax.device_get(change.down)))
        up = np.asarray(jax.device_get(change.up)).T.reshape(*change.up.shape[::-1], *(1,) * (down.ndim - 2))
        if layout == "kohya" and layer.module == MODULE and change.magnitude is None:
            fused[name] = down, up, change.alpha
        elif layout == "kohya":
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = np.asarray(change.alpha, np.float32)
        else:
            up = (up * np.float32(change.alpha / change.rank)).astype(up.dtype)
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    write_tensors(Path(path), tensors | fuse_layers(fused, model.family, known.values()) if fused else tensors)


def _magnitude_tensors(stem: str, x: np.ndarray, layout: str, axes: int) -> dict[str, np.ndarray]:
    """A file's tensor of the magnitudes of a layer whose kernel has `axes` axes."""
    ones = (1,) * (axes - 2)
    if layout == "kohya":
        return {f"{stem}.dora_scale": x.reshape((-1, 1, *ones) if x.ndim == 1 else (1, -1, *ones))}
    if x.ndim > 1:
        raise WeightsError(f"{stem} has a magnitude for each input, which the layout diffusers has no place for.")
    return {f"{stem}.lora_magnitude_vector": x.reshape(1, -1, *ones) if ones else x}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def init_lora(
    model: Model,
    params: Params,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] = ("unet",),
    *,
    key: Key,
    endings: Sequence[str] = ATTENTION,
) -> dict[str, Factors]:
    """A new LoRA that changes nothing yet: down Gaussian with deviation 1 / rank, up zero (section 4.1).

    To train it, differentiate a loss of `merge_lora(params, lora)` with respect to `lora`.

    Args:
        rank: columns of the thin matrices.
        alpha: see equation (1); the rank by default.
        targets: modules to change, of "unet", "text_encoder", "text_encoder_2".
        endings: suffixes of the PyTorch names of the layers to change; attention projections by default.

    Returns:
        Float32 factors by layer.

    Raises:
        WeightsError: the rank is not positive, or no layer of a target has one of the endings.
    """
    if rank < 1:
        raise WeightsError(f"rank {rank} must be 1 or more.")
    targeted = [layer for layer in layers(params) if layer.module in targets and layer.name.endswith(tuple(endings))]
    for target in targets:
        if not any(layer.module == target for layer in targeted):
            raise WeightsError(f"no layer of {target} ends in {' or '.join(endings)}: see `layers` for their names.")
    lora = {}
    for i, layer in enumerate(targeted):
        down = jax.random.normal(jax.random.fold_in(key, i), (*layer.shape[:-1], rank), jnp.float32) / rank
        lora[layer.name] = Factors(down, jnp.zeros((rank, layer.shape[-1])), float(rank if alpha is None else alpha))
    return lora
