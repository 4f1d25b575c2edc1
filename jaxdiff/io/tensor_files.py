"""Files of tensors in any format: names, shapes, and a function that reads one tensor.

All sources use PyTorch's names and layouts, which `torch_names` translates. Tensors are read on demand. Each read
memory-maps the file again, so that copied pages are released at once.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxdiff.config import read_json
from jaxdiff.errors import WeightsError
from jaxdiff.files import atomic_write, first_bytes, not_fetched, writing
from jaxdiff.io.pickles import PickleError, open_pickle
from jaxdiff.io.torch_names import (
    current_name,
    flax_name,
    from_torch_layout,
    tensor_name,
    to_torch_layout,
    torch_shape,
)
from jaxdiff.parallel import place
from jaxdiff.typing import Params


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The tensors of a file, or of the shards that an index names."""

    path: Path
    shapes: dict[str, list[int]]  # by the tensors' names in the file
    read: Callable[[str], np.ndarray]  # may return a view into the mapped file
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)  # of a safetensors file


SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# Buffers that older files store among the weights, and the head of a language model.
IGNORED = ("position_ids", "num_batches_tracked", "lm_head.weight")
# Of DistributedDataParallel, torch.compile, FSDP and its checkpointing.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WITHIN = re.compile(rf"\.(?:{'|'.join(map(re.escape, WRAPPERS))})+")
SUFFIXES = (*SAFETENSORS, *PICKLES, ".msgpack")  # in order of preference
SCALES = (".scale_weight", ".weight_scale")  # of a layer's weight, in ComfyUI's older and newer files
OF_SCALES = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")  # settings for computing with such weights


def open_tensors(path: str | Path) -> TensorSource:
    """Open a file of tensors without reading them.

    Args:
        path: `.safetensors` or `.sft`; PyTorch's `.bin`, `.ckpt`, `.pt` or `.pth`, of which only tensors are read and
            no code is run; Flax's `.msgpack`; llama.cpp's `.gguf`, with the package gguf; or the `.index.json` of a
            sharded file. Safetensors and PyTorch's files are recognized by content.

    Raises:
        WeightsError, ConfigError: the file is missing, damaged, of another format, or holds more than tensors.
    """
    path = Path(path)
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        known = ", ".join(OPENERS)
        raise WeightsError(f"{path} is in no format known here ({known}): convert it to .safetensors.")
    try:
        if path.suffix.lower() != ".json":
            opener = _by_content(path, opener)
        return _unscaled(_unwrapped(opener(path)))
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist: check the path, or fetch the model again.") from None
    except OSError as e:
        raise WeightsError(f"{path} cannot be read ({e.strerror or e}): fetch it again.") from None


def without_prefix(source: TensorSource, prefix: str) -> TensorSource:
    """The tensors whose names start with a prefix, which is removed."""
    inner = {name.removeprefix(prefix): shape for name, shape in source.shapes.items() if name.startswith(prefix)}
    return dataclasses.replace(source, shapes=inner, read=lambda name: source.read(prefix + name))


def _unwrapped(source: TensorSource) -> TensorSource:
    """The tensors without the prefixes that PyTorch's wrappers of modules add to all names, or within some."""
    for wrapper in WRAPPERS:
        if source.shapes and all(name.startswith(wrapper) for name in source.shapes):
            return _unwrapped(without_prefix(source, wrapper))
    names = {_WITHIN.sub(".", name): name for name in source.shapes}
    if len(names) < len(source.shapes) or all(name in source.shapes for name in names):
        return source
    inner = {name: source.shapes[theirs] for name, theirs in names.items()}
    return dataclasses.replace(source, shapes=inner, read=lambda name: source.read(names[name]))


def _unscaled(source: TensorSource) -> TensorSource:
    """8-bit weights multiplied by the scales in the same file, one for each weight or for each output.

    A file with other kinds of scales, such as one for each block of inputs, is returned unchanged.
    """
    scales = {f"{n.removesuffix(end)}.weight": n for end in SCALES for n in source.shapes if n.endswith(end)}
    for weight, scale in scales.items():
        outputs, *inputs = source.shapes.get(weight) or [0]
        if not inputs or list(source.shapes[scale]) not in ([], [1], [outputs], [outputs, 1]):
            return source
    if not scales:
        return source

    def read(name: str) -> np.ndarray:
        x = source.read(name)
        if name not in scales:
            return x
        scale = source.read(scales[name])
        if x.dtype not in (*EIGHT_BITS.values(), np.int8) or not jnp.issubdtype(scale.dtype, jnp.floating):
            kinds = f"{name} of {x.dtype} with scales of {scale.dtype}"
            raise WeightsError(f"{source.path} has {kinds}, which cannot be read: take a file in fp8 or bfloat16.")
        scale = np.asarray(scale, np.float32).reshape(-1, *(1,) * (x.ndim - 1))
        if not np.isfinite(scale).all():
            raise WeightsError(f"{source.path}: {scales[name]} must be finite: the file is damaged, fetch it again.")
        return x.astype(np.float32) * scale

    scale_names = {*scales.values(), *(name for name in source.shapes if name.endswith(OF_SCALES))}
    shapes = {name: shape for name, shape in source.shapes.items() if name not in scale_names}
    return dataclasses.replace(source, shapes=shapes, read=read)


def _by_content(path: Path, opener: Callable[[Path], TensorSource]) -> Callable[[Path], TensorSource]:
    """The opener for a file's actual format: its suffix may be wrong, such as `.ckpt` for a safetensors file."""
    head = first_bytes(path)
    if (reason := not_fetched(head)) is not None:
        raise WeightsError(f"{path} {reason}")
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 2**32:
        return _open_safetensors
    pickled = head.startswith((b"PK\3\4", b"\x80\2")) and head[8:9] != b"{"
    return _open_pickle if pickled and opener is _open_safetensors else opener


def _open_safetensors(path: Path) -> TensorSource:
    def with_file(action: Callable) -> Any:
        try:
            with safe_open(path, framework="np") as file:
                return action(file)
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, TypeError, AttributeError) as e:  # the last two: numbers that numpy lacks
            raise WeightsError(f"{path} is damaged or not a safetensors file ({e}): fetch it again.") from None

    def describe(file: Any) -> dict[str, tuple[list[int], str]]:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (x.get_shape(), x.get_dtype()) for name, x in slices.items()}

    tensors = with_file(describe)

    def read(name: str) -> np.ndarray:
        shape, kind = tensors[name]
        if kind in EIGHT_BITS:
            return _read_eight_bits(path, name, shape, EIGHT_BITS[kind])
        return with_file(lambda file: file.get_tensor(name))

    shapes = {name: shape for name, (shape, _) in tensors.items()}
    return TensorSource(path, shapes, read, with_file(lambda file: file.metadata()) or {})


# Dtypes that safetensors does not support with numpy.
EIGHT_BITS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


def _read_eight_bits(path: Path, name: str, shape: list[int], dtype: Any) -> np.ndarray:
    """A tensor of 8-bit floats, from a file whose header safetensors has validated."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
    if begin == end:
        return np.empty(shape, dtype)
    return np.memmap(path, np.uint8, "r", 8 + length + begin, (end - begin,)).view(dtype).reshape(shape)


def _open_index(path: Path) -> TensorSource:
    """A sharded file: the index maps each tensor to one of the files beside it."""
    places = read_json(path).get("weight_map")
    remedy = "download or save it again."
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise WeightsError(f"{path} has no weight_map from tensors to files: {remedy}")
    sources = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not file.endswith(SUFFIXES):
            raise WeightsError(f"{path} names {file!r}, which is not a weights file beside it: {remedy}")
        sources[file] = open_tensors(path.parent / file)
    optional = (*SCALES, *OF_SCALES)
    places = {name: f for name, f in places.items() if name in sources[f].shapes or not name.endswith(optional)}
    for name, file in places.items():
        if name not in sources[file].shapes:
            raise WeightsError(f"{path} places the tensor {name} in {file}, which lacks it: {remedy}")
    shapes = {name: sources[file].shapes[name] for name, file in places.items()}
    return TensorSource(path, shapes, lambda name: sources[places[name]].read(name))


def _open_flax(path: Path) -> TensorSource:
    """A file of Hugging Face's former Flax models, in PyTorch's names and layouts."""
    try:
        leaves = flatten_dict(msgpack_restore(path.read_bytes()))
        tensors = {flax_name(keys): to_torch_layout(keys, np.asarray(leaf)) for keys, leaf in leaves.items()}
    except OSError:
        raise
    except Exception as e:  # msgpack, numpy and flax raise errors of many kinds
        raise WeightsError(f"{path} is damaged or not a Flax file ({e}): fetch it again.") from None
    return TensorSource(path, {name: list(x.shape) for name, x in tensors.items()}, tensors.__getitem__)


def _open_pickle(path: Path) -> TensorSource:
    try:
        shapes, read = open_pickle(path)
    except PickleError as e:
        raise WeightsError(f"{path} {e}") from None
    return TensorSource(path, shapes, read)


def _open_gguf(path: Path) -> TensorSource:
    """A file of llama.cpp, whose quantised tensors are read as float32."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise WeightsError(f'{path} needs the package gguf: pip install ".[gguf]".') from None
    try:
        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        shapes = {name: [int(n) for n in tensor.shape[::-1]] for name, tensor in tensors.items()}
    except OSError:
        raise
    except Exception as e:  # the library raises errors of many kinds
        raise WeightsError(f"{path} is damaged or not a GGUF file ({e}): fetch it again.") from None

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shapes[name])
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise WeightsError(f"{path}: {name} is quantised as {kind}, which cannot be read: take Q8_0.") from None

    return TensorSource(path, shapes, read)


OPENERS: dict[str, Callable[[Path], TensorSource]] = {
    **dict.fromkeys(SAFETENSORS, _open_safetensors),
    ".pti": _open_safetensors,  # cog-sdxl's embeddings
    ".json": _open_index,
    ".msgpack": _open_flax,
    ".gguf": _open_gguf,
    **dict.fromkeys(PICKLES, _open_pickle),
}


def load_tensors(path: Path | TensorSource, target: Params, dtype: Any, mesh: Mesh | None = None) -> Params:
    """Read a file of weights into a tree like `target` (of arrays or shapes).

    Args:
        path: a file in any format that `open_tensors` reads, or what it returned.
        target: the expected tree, as from `param_shapes` for one module.
        dtype: of the parameters returned.
        mesh: to shard the parameters over as they are read, as by `parallel.shard`.

    Returns:
        A tree like `target` of arrays on the default device or the mesh.

    Raises:
        WeightsError: the file is missing or damaged, lacks a tensor, has one too many, or one of another shape.
    """
    source = path if isinstance(path, TensorSource) else open_tensors(path)
    params = {}
    for leaf_path, name in check_tensors(source, target).items():
        x = source.read(name)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise WeightsError(
                f"{source.path}: tensor {tensor_name(leaf_path)} holds {x.dtype}, not floating-point numbers: it is "
                "quantised or damaged."
            )
        x = from_torch_layout(leaf_path, x)
        # A copy, since the file may change later.
        params[leaf_path] = place(np.array(x, dtype=dtype, order="C"), "/".join(leaf_path), mesh)
    return unflatten_dict(params)


def check_tensors(path: Path | TensorSource, target: Params) -> dict[tuple[str, ...], str]:
    """The name in a file of each leaf of the tree `target`, by path; no tensor is read. See `load_tensors`.

    Raises:
        WeightsError: the file lacks a tensor, has one too many, or one of another shape.
    """
    source = path if isinstance(path, TensorSource) else open_tensors(path)
    path, shapes = source.path, source.shapes
    remaining = {current_name(name): name for name in shapes if not name.endswith(IGNORED)}
    names_by_path = {}
    for leaf_path, leaf in flatten_dict(target).items():
        name = tensor_name(leaf_path)
        if name not in remaining:
            described = (path.parent / "config.json").is_file()
            mend = " that its config.json calls for: do the two belong together?" if described else ": fetch it again."
            raise WeightsError(f"{path} lacks the tensor {name}{mend}")
        expected = torch_shape(leaf_path, leaf.shape)
        shape = tuple(shapes[remaining[name]])
        if shape != expected:
            raise WeightsError(
                f"{path}: tensor {name} has shape {list(shape)}, its config.json calls for {list(expected)}: "
                "the config and the weights are of different models."
            )
        names_by_path[leaf_path] = remaining.pop(name)
    if remaining:
        raise WeightsError(
            f"{path} holds {len(remaining)} tensors that its config.json has no place for, first {min(remaining)}."
        )
    return names_by_path


def named_tensors(params: Params, dtype: Any = None, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The parameters by PyTorch name and in PyTorch's layout; `prefix` is added to all names but text_projection's."""
    for path, leaf in flatten_dict(params).items():
        x, name = to_torch_layout(path, np.asarray(jax.device_get(leaf))), tensor_name(path)
        yield (
            name if path[0] == "text_projection" else prefix + name,
            np.ascontiguousarray(x if dtype is None else x.astype(dtype)),
        )


def save_tensors(path: Path, params: Params, dtype: Any = None, prefix: str = "") -> None:
    """Write one module's parameters as a safetensors file that PyTorch diffusers reads, atomically."""
    _write(path, dict(named_tensors(params, dtype, prefix)))


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Raises WeightsError if it cannot be written."""
    with writing(path, WeightsError, "choose another place or free it."):
        _write(path, {name: np.asarray(x, order="C") for name, x in tensors.items()}, metadata)


def _write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    with atomic_write(path) as temporary:
        try:
            save_file(
                tensors, temporary, metadata=metadata or {"format": "pt"}
            )  # the order of several keys is not deterministic
        except SafetensorError as e:  # a missing folder, a full disk
            raise OSError(str(e)) from None
        temporary.chmod(0o644)  # safetensors' files are readable by their owner only
