"""Tensors of PyTorch checkpoints <-> parameter trees.

Modules bear the names that they have in diffusers and transformers, so one rule maps every tensor: the path's parts
joined by dots, lists numbered (`resnets_0` -> `resnets.0`), PART_NAMES where a part spans several PyTorch modules,
and `weight` for what Flax calls kernel, scale or embedding. Layouts differ in two places: convolution kernels are
[H, W, in, out] here and [out, in, H, W] there, dense kernels [in, out] here and [out, in] there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from jaxdiff.errors import WeightsError
from jaxdiff.files import atomic_write
from jaxdiff.io.tensor_files import TensorSource as TensorSource
from jaxdiff.io.tensor_files import open_tensors
from jaxdiff.io.tensor_files import to_torch_layout as to_torch_layout
from jaxdiff.typing import Params

LISTS = (
    "attentions",
    "blocks",
    "controlnet_down_blocks",
    "down_blocks",
    "downsamplers",
    "layers",
    "resnets",
    "transformer_blocks",
    "up_blocks",
    "upsamplers",
)
PART_NAMES = {  # our part of a path -> PyTorch's
    "to_out_0": "to_out.0",
    "net_0_proj": "net.0.proj",
    "net_2": "net.2",
    "conv_0": "conv.0",
    "conv_2": "conv.2",
    "conv_4": "conv.4",
    "mlp_fc1": "mlp.fc1",
    "mlp_fc2": "mlp.fc2",
    "self_attn_q_proj": "self_attn.q_proj",
    "self_attn_k_proj": "self_attn.k_proj",
    "self_attn_v_proj": "self_attn.v_proj",
    "self_attn_out_proj": "self_attn.out_proj",
    "embeddings_token_embedding": "embeddings.token_embedding",
    "embeddings_position_embedding": "embeddings.position_embedding",
    "embeddings_patch_embedding": "embeddings.patch_embedding",
    "embeddings_class_embedding": "embeddings.class_embedding",
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
}
OLD_NAMES = {  # names in older files -> today's
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
IGNORED = ("position_ids",)  # buffers that older files carry as if they were weights
# transformers puts these before every name but the projection's, in some versions and not in others.
PREFIXES = ("text_model.", "vision_model.")


def tensor_name(path: tuple[str, ...]) -> str:
    """The PyTorch name of a parameter.

    >>> tensor_name(("down_blocks_0", "attentions_1", "transformer_blocks_0", "attn1", "to_out_0", "kernel"))
    'down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.weight'
    """
    parts = []
    for part in path:
        stem, _, number = part.rpartition("_")
        parts.append(f"{stem}.{number}" if stem in LISTS else PART_NAMES.get(part, part))
    return ".".join(parts)


def current_name(name: str) -> str:
    """A tensor's name in a file, without the prefixes and old words that only some versions write.

    >>> current_name("text_model.final_layer_norm.bias"), current_name("decoder.mid_block.attentions.0.query.bias")
    ('final_layer_norm.bias', 'decoder.mid_block.attentions.0.to_q.bias')
    """
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return ".".join(OLD_NAMES.get(part, part) for part in name.split("."))


def from_torch_layout(path: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return x
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def load_tensors(path: Path | TensorSource, target: Params, dtype: Any) -> Params:
    """Read a file of PyTorch's weights into the tree `target` (of arrays or shapes).

    Args:
        path: a file of any format that `open_tensors` knows, or what it returned.
        target: the tree expected, as `param_shapes` gives it for one module.
        dtype: type of the parameters returned.

    Returns:
        A tree like `target` of arrays on the default device.

    Raises:
        WeightsError: the file is missing or damaged, lacks a tensor, has one too many, or one of another shape.
    """
    source = path if isinstance(path, TensorSource) else open_tensors(path)
    path, shapes = source.path, source.shapes
    names = {current_name(name): name for name in shapes if not name.endswith(IGNORED)}
    params = {}
    for leaf_path, leaf in flatten_dict(target).items():
        name = tensor_name(leaf_path)
        if name not in names:
            raise WeightsError(
                f"{path} lacks the tensor {name} that its config.json calls for: do the two belong together?"
            )
        expected = to_torch_layout(leaf_path, np.broadcast_to(0, leaf.shape)).shape
        found = tuple(shapes[names[name]])
        if found != expected:
            raise WeightsError(
                f"{path}: tensor {name} has shape {list(found)}, its config.json calls for {list(expected)}: "
                "the config and the weights are of different models."
            )
        x = source.read(names.pop(name))
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise WeightsError(
                f"{path}: tensor {name} holds {x.dtype}, no floating numbers: it is quantised or damaged."
            )
        x = from_torch_layout(leaf_path, x)
        # A copy, since the file may change later; device_put compiles nothing, which jnp.asarray does for each shape.
        params[leaf_path] = jax.device_put(np.array(x, dtype=dtype, order="C"))
    if names:
        raise WeightsError(
            f"{path} holds {len(names)} tensors that its config.json has no place for, first {min(names)}."
        )
    return unflatten_dict(params)


def named_tensors(params: Params, dtype: Any = None, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The parameters by their PyTorch names and in PyTorch's layouts; `prefix` is that of a CLIP model's own names."""
    for path, leaf in flatten_dict(params).items():
        x, name = to_torch_layout(path, np.asarray(jax.device_get(leaf))), tensor_name(path)
        yield (
            name if path[0] == "text_projection" else prefix + name,
            np.ascontiguousarray(x if dtype is None else x.astype(dtype)),
        )


def save_tensors(path: Path, params: Params, dtype: Any = None, prefix: str = "") -> None:
    """Write one module's parameters as a safetensors file that PyTorch diffusers reads; whole or not at all."""
    _write(path, dict(named_tensors(params, dtype, prefix)))


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Raises WeightsError: it cannot be written."""
    try:
        _write(path, {name: np.ascontiguousarray(x) for name, x in tensors.items()}, metadata)
    except OSError as e:
        raise WeightsError(f"{path} cannot be written ({e.strerror or e}): choose another place or free it.") from None


def _write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata or {"format": "pt"})  # one key: several come in any order
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
