"""Files of tensors, whatever their format: names, shapes, and a function that reads one tensor.

All sources use PyTorch's names and layouts, which `torch_names` translates. Tensors are read on demand. Each read maps
the file into memory anew, so that pages that have been copied leave memory at once.
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
    read: Callable[[str], np.ndarray]  # may be a view into the mapped file: copy what is to stay
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)  # of a safetensors file


SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# Buffers that older files carry as if they were weights, and the head of a language model.
IGNORED = ("position_ids", "num_batches_tracked", "lm_head.weight")
# Of DistributedDataParallel, torch.compile, FSDP and its checkpointing.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WITHIN = re.compile(rf"\.(?:{'|'.join(map(re.escape, WRAPPERS))})+")
SUFFIXES = (*SAFETENSORS, *PICKLES, ".msgpack")  # in the order of preference
SCALES = (".scale_weight", ".weight_scale")  # of the weight of a layer, in ComfyUI's older and newer files
OF_SCALES = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")  # what says how to compute with such weights


def open_tensors(path: str | Path) -> TensorSource:
    """Open a file of tensors without reading them.

    Args:
        path: `.safetensors` or `.sft`; `.bin`, `.ckpt`, `.pt` or `.pth` of PyTorch, out of which tensors alone are read
            and no code ever runs; `.msgpack` of Flax; `.gguf` of llama.cpp, with the package gguf; or the `.index.json`
            of a file in shards. Of safetensors and PyTorch's files the content tells which it is.

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
    """Those tensors whose names begin with a prefix, under the rest of their names."""
    inner = {name.removeprefix(prefix): shape for name, shape in source.shapes.items() if name.startswith(prefix)}
    return dataclasses.replace(source, shapes=inner, read=lambda name: source.read(prefix + name))


def _unwrapped(source: TensorSource) -> TensorSource:
    """The tensors under their own names where PyTorch's wrappers put theirs before all of them, or within some."""
    for wrapper in WRAPPERS:
        if source.shapes and all(name.startswith(wrapper) for name in source.shapes):
            return _unwrapped(without_prefix(source, wrapper))
    names = {_WITHIN.sub(".", name): name for name in source.shapes}
    if len(names) < len(source.shapes) or all(name in source.shapes for name in names):
        return source
    inner = {name: source.shapes[theirs] for name, theirs in names.items()}
    return dataclasses.replace(source, shapes=inner, read=lambda name: source.read(names[name]))


def _unscaled(source: TensorSource) -> TensorSource:
    """8-bit weights multiplied by the scales in the same file, one for a whole weight or one for each output.

    A file with scales of another kind, one for each block of some inputs, is left as it is.
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

    beside = {*scales.values(), *(name for name in source.shapes if name.endswith(OF_SCALES))}
    kept = {name: shape for name, shape in source.shapes.items() if name not in beside}
    return dataclasses.replace(source, shapes=kept, read=read)


def _by_content(path: Path, opener: Callable[[Path], TensorSource]) -> Callable[[Path], TensorSource]:
    """The opener of a file's own format, which its name may get wrong: `.ckpt` for a safetensors file or reversed."""
    head = first_bytes(path)
    if (reason := not_fetched(head)) is not None:
        raise WeightsError(f"{path} {reason}")
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 2**32:
        return _open_safetensors
    pickled = head.startswith((b"PK\3\4", b"\x80\2")) and head[8:9] != b"{"
    return _open_pickle if pickled and opener is _open_safetensors else opener


def _open_safetensors(path: Path) -> TensorSource:
    def opened(action: Callable) -> Any:
        try:
            with safe_open(path, framework="np") as file:
                return action(file)
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, TypeError, AttributeError) as e:  # the last two: numbers that numpy lacks
            raise WeightsError(f"{path} is damaged or not a safetensors file ({e}): fetch it again.") from None

    def described(file: Any) -> dict[str, tuple[list[int], str]]:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (x.get_shape(), x.get_dtype()) for name, x in slices.items()}

    tensors = opened(described)

    def read(name: str) -> np.ndarray:
        shape, kind = tensors[name]
        if kind in EIGHT_BITS:
            return _read_eight_bits(path, name, shape, EIGHT_BITS[kind])
        return opened(lambda file: file.get_tensor(name))

    shapes = {name: shape for name, (shape, _) in tensors.items()}
    return TensorSource(path, shapes, read, opened(lambda file: file.metadata()) or {})


EIGHT_BITS = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}  # which safetensors' numpy side lacks


def _read_eight_bits(path: Path, name: str, shape: list[int], dtype: Any) -> np.ndarray:
    """A tensor of 8-bit floats, from a file whose header safetensors has checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
    if begin == end:
        return np.empty(shape, dtype)
    return np.memmap(path, np.uint8, "r", 8 + length + begin, (end - begin,)).view(dtype).reshape(shape)


def _open_index(path: Path) -> TensorSource:
    """A file in shards: the index says which tensor is in which of the files beside it."""
    places = read_json(path).get("weight_map")
    again = "download or save it again."
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise WeightsError(f"{path} has no weight_map from tensors to files: {again}")
    sources = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not file.endswith(SUFFIXES):
            raise WeightsError(f"{path} names {file!r}, which is not a weights file beside it: {again}")
        sources[file] = open_tensors(path.parent / file)
    beside = (*SCALES, *OF_SCALES)
    places = {name: f for name, f in places.items() if name in sources[f].shapes or not name.endswith(beside)}
    for name, file in places.items():
        if name not in sources[file].shapes:
            raise WeightsError(f"{path} places the tensor {name} in {file}, which lacks it: {again}")
    shapes = {name: sources[file].shapes[name] for name, file in places.items()}
    return TensorSource(path, shapes, lambda name: sources[places[name]].read(name))


def _open_flax(path: Path) -> TensorSource:
    """A file of Hugging Face's former Flax models, under PyTorch's names and in its layouts."""
    try:
        leaves = flatten_dict(msgpack_restore(path.read_bytes()))
        tensors = {flax_name(keys): to_torch_layout(keys, np.asarray(leaf)) for keys, leaf in leaves.items()}
    except OSError:
        raise
    except Exception as e:  # whatever msgpack, numpy or flax raise on bytes that are none
        raise WeightsError(f"{path} is damaged or not a Flax file ({e}): fetch it again.") from None
    return TensorSource(path, {name: list(x.shape) for name, x in tensors.items()}, tensors.__getitem__)


def _open_pickle(path: Path) -> TensorSource:
    try:
        shapes, read = open_pickle(path)
    except PickleError as e:
        raise WeightsError(f"{path} {e}") from None
    return TensorSource(path, shapes, read)


def _open_gguf(path: Path) -> TensorSource:
    """A file of llama.cpp's, whose quantised tensors become float32 as they are read."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise WeightsError(f'{path} needs the package gguf: pip install ".[gguf]".') from None
    try:
        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        shapes = {name: [int(n) for n in tensor.shape[::-1]] for name, tensor in tensors.items()}
    except OSError:
        raise
    except Exception as e:  # whatever the library raises on bytes that are none
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
    """Read a file of PyTorch's weights into the tree `target` (of arrays or shapes).

    Args:
        path: a file of any format that `open_tensors` knows, or what it returned.
        target: the tree expected, as `param_shapes` gives it for one module.
        dtype: type of the parameters returned.
        mesh: what they are divided over as they are read, as by `parallel.shard`.

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
    """The name in a file of each leaf of the tree `target`, by its path; nothing is read. See `load_tensors`.

    Raises:
        WeightsError: the file lacks a tensor, has one too many, or one of another shape.
    """
    source = path if isinstance(path, TensorSource) else open_tensors(path)
    path, shapes = source.path, source.shapes
    names = {current_name(name): name for name in shapes if not name.endswith(IGNORED)}
    found_names = {}
    for leaf_path, leaf in flatten_dict(target).items():
        name = tensor_name(leaf_path)
        if name not in names:
            described = (path.parent / "config.json").is_file()
            mend = " that its config.json calls for: do the two belong together?" if described else ": fetch it again."
            raise WeightsError(f"{path} lacks the tensor {name}{mend}")
        expected = torch_shape(leaf_path, leaf.shape)
        found = tuple(shapes[names[name]])
        if found != expected:
            raise WeightsError(
                f"{path}: tensor {name} has shape {list(found)}, its config.json calls for {list(expected)}: "
                "the config and the weights are of different models."
            )
        found_names[leaf_path] = names.pop(name)
    if names:
        raise WeightsError(
            f"{path} holds {len(names)} tensors that its config.json has no place for, first {min(names)}."
        )
    return found_names


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
    with writing(path, WeightsError, "choose another place or free it."):
        _write(path, {name: np.asarray(x, order="C") for name, x in tensors.items()}, metadata)


def _write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata or {"format": "pt"})  # one key: several come in any order
        except SafetensorError as e:  # a missing folder, a full disk
            raise OSError(str(e)) from None
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
