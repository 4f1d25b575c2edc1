"""Files of tensors, whatever their format, as one thing: names, shapes, and a function that reads one tensor.

Every source speaks of PyTorch's names and layouts. Nothing is read before it is asked for, and each read maps the file
into memory anew, so that pages already copied leave memory at once.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open

from jaxdiff.config import read_json
from jaxdiff.errors import WeightsError


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The tensors of a file, or of the shards that an index names."""

    path: Path
    shapes: dict[str, list[int]]  # by the tensors' names in the file
    read: Callable[[str], np.ndarray]  # may be a view into the mapped file: copy what is to stay
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)  # of a safetensors file


PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLES, ".msgpack")  # in the order of preference


def open_tensors(path: str | Path) -> TensorSource:
    """Open a file of tensors without reading them.

    Args:
        path: `.safetensors`; `.bin`, `.ckpt`, `.pt` or `.pth` of PyTorch, out of which tensors alone are read and no
            code ever runs; `.msgpack` of Flax; or the `.index.json` of a file in shards.

    Raises:
        WeightsError, ConfigError: the file is missing, damaged, of another format, or holds more than tensors.
    """
    path = Path(path)
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        known = ", ".join(OPENERS)
        raise WeightsError(f"{path} is in no format known here ({known}): convert it to .safetensors.")
    try:
        return opener(path)
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing: check the path; in a model's folder, fetch it again.") from None
    except OSError as e:
        raise WeightsError(f"{path} cannot be read ({e.strerror or e}): fetch it again.") from None


def _open_safetensors(path: Path) -> TensorSource:
    def opened(action: Callable) -> Any:
        try:
            with safe_open(path, framework="np") as file:
                return action(file)
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, TypeError, AttributeError) as e:  # the last two: numbers that numpy lacks
            raise WeightsError(f"{path} is damaged or no safetensors file ({e}): fetch it again.") from None

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
    """A tensor of 8-bit floats, out of a file whose header safetensors has found to be right."""
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
            raise WeightsError(f"{path} names {file!r}, which is no file of weights beside it: {again}")
        sources[file] = open_tensors(path.parent / file)
    for name, file in places.items():
        if name not in sources[file].shapes:
            raise WeightsError(f"{path} places the tensor {name} in {file}, which lacks it: {again}")
    shapes = {name: sources[file].shapes[name] for name, file in places.items()}
    return TensorSource(path, shapes, lambda name: sources[places[name]].read(name))


def _open_flax(path: Path) -> TensorSource:
    """A file of Hugging Face's former Flax models, under PyTorch's names and in its layouts."""
    try:
        leaves = flatten_dict(msgpack_restore(path.read_bytes()))
        tensors = {_torch_name(keys): to_torch_layout(keys, np.asarray(leaf)) for keys, leaf in leaves.items()}
    except OSError:
        raise
    except Exception as e:  # whatever msgpack, numpy or flax raise on bytes that are none
        raise WeightsError(f"{path} is damaged or no Flax file ({e}): fetch it again.") from None
    return TensorSource(path, {name: list(x.shape) for name, x in tensors.items()}, tensors.__getitem__)


def _torch_name(keys: tuple[str, ...]) -> str:
    """
    >>> _torch_name(("down_blocks_0", "attentions_1", "transformer_blocks_0", "ff", "net_0", "proj", "kernel"))
    'down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.weight'
    """
    *parts, last = keys
    # A number after an underscore counts the members of a list, save in names that end so themselves.
    dotted = [
        f"{stem}.{n}" if n.isdigit() and stem not in ("", "linear") else part
        for part in parts
        for stem, _, n in [part.rpartition("_")]
    ]
    return ".".join([*dotted, "weight" if last in ("kernel", "scale", "embedding") else last])


def to_torch_layout(keys: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    """A parameter of this path in PyTorch's layout: of kernels, [out, in] or [out, in, H, W]."""
    if keys[-1] != "kernel":
        return x
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T


def _open_pickle(path: Path) -> TensorSource:
    from jaxdiff.io.pickles import PickleError, open_pickle

    try:
        shapes, read = open_pickle(path)
    except PickleError as e:
        raise WeightsError(f"{path} {e}") from None
    return TensorSource(path, shapes, read)


OPENERS: dict[str, Callable[[Path], TensorSource]] = {
    ".safetensors": _open_safetensors,
    ".json": _open_index,
    ".msgpack": _open_flax,
    **dict.fromkeys(PICKLES, _open_pickle),
}
