"""Reading tensors from PyTorch's pickled files (`.bin`, `.ckpt`, `.pt`) without PyTorch and without running their code.

A pickle is a program. This reader runs it on a machine with few instructions, on which the names of classes and
functions mean what GLOBALS says: any other name is an error. No module is imported, and no object chosen by the file
is created or called. The numbers themselves are stored outside the program, in members of a zip file (PyTorch 1.6 and
later) or after it (before), and are memory-mapped on demand.
"""

import dataclasses
import io
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jaxdiff.errors import JaxdiffError

CONVERT = "if you trust it, convert it to .safetensors with PyTorch."
DAMAGED = "is damaged or not a PyTorch file ({}): fetch it again."
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # at the start of the files before PyTorch 1.6


class PickleError(JaxdiffError, ValueError):
    """What is wrong with a file, as the end of a sentence that starts with its path."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A flat array of numbers, which several tensors may share."""

    dtype: np.dtype
    key: str
    size: int  # numbers


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """A view of a storage; offset and strides are in numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Placeholder:
    """The value of a name that may occur beside the weights but is not needed; calling it returns a placeholder."""

    def __call__(self, *args: Any) -> "_Placeholder":
        return self


class _Parameters(dict):
    """PyTorch's ParameterDict, with the parameters in its state. See `_build`."""


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    counts = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in counts):
        raise PickleError(DAMAGED.format("a tensor without numbers"))
    # Check the last number of the view, and their count: a stride of 0 could turn one number into terabytes.
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and (last >= storage.size or math.prod(shape) > storage.size):
        raise PickleError(DAMAGED.format("a tensor reaches beyond its storage"))
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_typed(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Any:
    """A tensor of a dtype without its own storage class, such as 8-bit floats: its storage counts bytes."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, np.dtype):
        raise PickleError(DAMAGED.format("a tensor without numbers"))
    typed = _Storage(dtype, storage.key, storage.size * storage.dtype.itemsize // dtype.itemsize)
    return _rebuild_tensor(typed, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_from_type(function: Any, kind: Any, args: Any, *_: Any) -> Any:
    """A tensor of a subclass, such as a module's buffer, as a plain tensor."""
    return function(*args) if any(function is f for f in (_rebuild_tensor, _rebuild_typed)) else _Placeholder()


def _rebuild_dict(items: Any = ()) -> dict:
    return _fill({}, [x for pair in items for x in pair])


def _rebuild_default(*_: Any) -> dict:
    return {}


def _fill(target: Any, items: list) -> dict:
    keys, values = items[::2], items[1::2]
    # No tuples as keys: hashing a deeply self-nested one would take forever.
    if not isinstance(target, dict) or not all(isinstance(k, str | int | _Placeholder) for k in keys):
        raise PickleError(DAMAGED.format("an odd dictionary"))
    target.update(zip(keys, values, strict=True))
    return target


NUMPY = ("scalar", "_reconstruct")
DTYPES = {  # PyTorch's names of dtypes
    "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
    **{name: name for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16",
                               "uint32", "uint64", "bool")},
}  # fmt: skip
HARMLESS = (  # objects that training programs store with the weights
    "argparse.Namespace", "collections.Counter", "datetime.datetime", "pathlib.Path", "pathlib.PosixPath",
    "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "torch.nn.parameter.Buffer",
    "torch.nn.parameter.Parameter", "torch.Tensor", "torch.torch_version.TorchVersion",
)  # fmt: skip
PLAIN = ("bytearray", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set", "slice", "str",
         "xrange")  # fmt: skip
LIGHTNING = ("pytorch_lightning", "lightning.pytorch")
GLOBALS: dict[str, Any] = {  # every name that a file may use -> its meaning here
    "collections.OrderedDict": _rebuild_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.nn.modules.container.ParameterDict": _Parameters,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
    **{f"torch.{name}": np.dtype(kind) for name, kind in DTYPES.items()},
    "collections.defaultdict": _rebuild_default,
    **{
        f"{module}.{name}": _Placeholder() for module in ("__builtin__", "builtins") for name in PLAIN
    },  # 2; 3 and later
    **{name: _Placeholder() for name in HARMLESS},
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    # Stored with the weights by the trainer of the published Stable Diffusion 1.x.
    **{f"{lightning}.callbacks.model_checkpoint.ModelCheckpoint": _Placeholder() for lightning in LIGHTNING},
    "torch.device": _Placeholder(),
    "torch.Size": _Placeholder(),
    **{f"numpy.{core}.multiarray.{name}": _Placeholder() for core in ("core", "_core") for name in NUMPY},  # 1 and 2
    "numpy.ndarray": _Placeholder(),
    "numpy.dtype": _Placeholder(),
    "_codecs.encode": _Placeholder(),
}
CALLABLE = (
    _rebuild_dict, _rebuild_default, _rebuild_tensor, _rebuild_typed, _rebuild_parameter, _rebuild_from_type,
)  # fmt: skip

# Instructions that build plain values, lists, tuples and dictionaries. Those that create instances (OBJ, INST, EXT …)
# are excluded; NEWOBJ creates a dictionary of ours, see `_new_object`.
_VALUES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 "
    "FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES UNICODE BINUNICODE SHORT_BINUNICODE "
    "EMPTY_SET EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT "
    "GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL BINPERSID"
)


def _code(name: str) -> int:
    return getattr(pickle, name)[0]


class _Instructions(dict[int, Callable]):
    def __missing__(self, code: int) -> NoReturn:
        raise PickleError(f"holds more than tensors (instruction {bytes([code])!r} of its pickle); {CONVERT}")


class _Machine(pickle._Unpickler):  # the Python implementation, whose table of instructions can be restricted
    """Runs the program of a file; `run` is the only way in."""

    dispatch = _Instructions({c: pickle._Unpickler.dispatch[c] for c in map(_code, _VALUES.split())})

    def find_class(self, module: str, name: str) -> Any:
        qualified_name = f"{module}.{name}"
        if qualified_name not in GLOBALS:
            raise PickleError(f"holds more than tensors: it asks for {qualified_name}, which is not run; {CONVERT}")
        return GLOBALS[qualified_name]

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module" and pid[1] is _Parameters:  # before PyTorch 1.6, with the source code of the class
            return _Parameters
        kind, dtype, key, _, size, *view = pid
        is_storage = kind == "storage" and isinstance(dtype, np.dtype) and isinstance(key, str) and type(size) is int
        if not is_storage or any(view):
            raise PickleError(DAMAGED.format("a storage of an unknown kind"))
        return _Storage(dtype, key, size)

    def run(self) -> Any:
        try:
            return self.load()
        except PickleError:
            raise
        except Exception as e:  # a truncated or inconsistent program
            raise PickleError(DAMAGED.format(f"{type(e).__name__}: {e}")) from None


def _reduce(machine: Any) -> None:
    """Call a function of ours. No other callable can be on the stack, but make sure."""
    args, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(function, _Placeholder) and not any(function is f for f in CALLABLE):
        raise PickleError(DAMAGED.format("a call of no function"))
    machine.stack.append(function(*args))


def _new_object(machine: Any) -> None:
    args, kind = machine.stack.pop(), machine.stack.pop()
    if isinstance(kind, _Placeholder):
        machine.stack.append(kind)
        return
    if kind is not _Parameters or args != ():
        raise PickleError(DAMAGED.format("an object of no class"))
    machine.stack.append(_Parameters())


def _build(machine: Any) -> None:
    """Set an object's state. Only a ParameterDict's is used: a state_dict's holds the versions of PyTorch's modules."""
    state = machine.stack.pop()
    parameters = state.get("_parameters") if isinstance(state, dict) else None
    if isinstance(machine.stack[-1], _Parameters) and isinstance(parameters, dict):
        machine.stack[-1].update(parameters)


def _setitem(machine: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _fill(machine.stack[-1], [key, value])


def _setitems(machine: Any) -> None:
    items = machine.pop_mark()
    _fill(machine.stack[-1], items)


def _dict(machine: Any) -> None:
    machine.stack.append(_fill({}, machine.pop_mark()))


_Machine.dispatch |= {
    pickle.REDUCE[0]: _reduce,
    pickle.NEWOBJ[0]: _new_object,
    pickle.BUILD[0]: _build,
    pickle.SETITEM[0]: _setitem,
    pickle.SETITEMS[0]: _setitems,
    pickle.DICT[0]: _dict,
}


def open_pickle(path: Path) -> tuple[dict[str, list[int]], Callable[[str], np.ndarray]]:
    """Names and shapes of the tensors in a PyTorch file, and a function that memory-maps one.

    The file is a dictionary from names to tensors, or holds one under "state_dict", as Lightning's checkpoints do.

    Raises:
        PickleError: the file is damaged, or holds something other than tensors.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(2)
    content, offsets = _open_zip(path) if start == b"PK" else _open_legacy(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = _tensors(content)
    if not tensors:
        raise PickleError("holds no dictionary of tensors: it is not a checkpoint that can be read here.")
    for name, tensor in tensors.items():
        _, size = offsets.get(tensor.storage.key, (0, -1))
        if tensor.storage.size * tensor.storage.dtype.itemsize > size:
            raise PickleError(DAMAGED.format(f"the numbers of {name} are missing or cut short"))

    def read(name: str) -> np.ndarray:
        x = tensors[name]
        if not math.prod(x.shape):
            return np.empty(x.shape, x.storage.dtype)
        row = np.memmap(path, x.storage.dtype, "r", offsets[x.storage.key][0], x.storage.size)[x.offset :]
        strides = [stride * row.itemsize for stride in x.strides]
        return np.lib.stride_tricks.as_strided(np.asarray(row), x.shape, strides, writeable=False)

    return {name: list(x.shape) for name, x in tensors.items()}, read


DEPTH = 4  # nested containers that are searched


def _tensors(content: Any) -> dict[str, _Tensor]:
    """The tensors of a dictionary and, as "outer.inner", of containers in it; other values are ignored.

    Lists and tuples use indices as names: "0", "1" … A container that occurs several times is read once.
    """
    tensors: dict[str, _Tensor] = {}
    visited: set[int] = set()
    stack = [("", content, DEPTH)]
    while stack:
        name, value, depth = stack.pop()
        if isinstance(value, _Tensor):
            tensors[name] = value
        elif depth and isinstance(value, dict | list | tuple) and id(value) not in visited:
            visited.add(id(value))
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            stack += [(f"{name}.{key}" if name else str(key), item, depth - 1) for key, item in reversed(items)]
    return tensors


Offsets = dict[str, tuple[int, int]]  # storage's key -> first byte and bytes in the file


def _open_zip(path: Path) -> tuple[Any, Offsets]:
    """PyTorch 1.6 and later: `NAME/data.pkl` is the program, `NAME/data/KEY` are the storages, uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {info.filename.partition("/")[2]: _member(info, file) for info in archive.infolist()}
            total = path.stat().st_size
    # zipfile raises NotImplementedError for unknown kinds of archives.
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as e:
        if isinstance(e, PickleError):
            raise
        raise PickleError(DAMAGED.format(e)) from None
    if any(offset + size > total for offset, size in members.values()):
        raise PickleError(DAMAGED.format("it ends too early"))
    if "data.pkl" not in members:
        raise PickleError(DAMAGED.format("a zip file without data.pkl"))

    def content(name: str) -> bytes:
        with path.open("rb") as file:
            file.seek(members[name][0])
            return file.read(members[name][1])

    if "byteorder" in members and content("byteorder") != b"little":
        raise PickleError(f"was written in another byte order: {CONVERT}")
    storages = {name[len("data/") :]: place for name, place in members.items() if name.startswith("data/")}
    return _Machine(io.BytesIO(content("data.pkl"))).run(), storages


def _member(info: zipfile.ZipInfo, file: io.BufferedReader) -> tuple[int, int]:
    """The offset and size of a member's bytes, which follow its local header of variable length."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise PickleError(f"is a compressed zip file, as PyTorch writes none: {CONVERT}")
    file.seek(info.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\3\4":
        raise ValueError("no header where its list of contents says")
    name, extra = struct.unpack("<HH", header[26:])
    return info.header_offset + 30 + name + extra, info.file_size


def _open_legacy(path: Path) -> tuple[Any, Offsets]:
    """Before PyTorch 1.6: five consecutive programs, then each storage's length and numbers."""

    def damaged(reason: str) -> NoReturn:
        raise PickleError(DAMAGED.format(reason))

    if not path.stat().st_size:
        damaged("it is empty")
    # Memory-mapped, so that a wrong length in the file is never allocated.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, protocol, system = (_Machine(data).run() for _ in range(3))
        if magic != MAGIC or protocol != PROTOCOL or not isinstance(system, dict):
            damaged("it does not begin as one")
        if not system.get("little_endian", True):
            raise PickleError(f"was written in another byte order: {CONVERT}")
        machine = _Machine(data)
        sizes: dict[str, int] = {}
        load = machine.persistent_load

        def persistent_load(pid: Any) -> Any:
            storage = load(pid)
            if isinstance(storage, _Storage):
                sizes[storage.key] = storage.dtype.itemsize
            return storage

        machine.persistent_load = persistent_load  # type: ignore[method-assign]
        content, keys = machine.run(), _Machine(data).run()
        offsets, position = {}, data.tell()
        for key in keys if isinstance(keys, list) else damaged("it lacks its list of storages"):
            if len(head := data[position : position + 8]) < 8 or key not in sizes:
                damaged("its storages are cut short")
            size = struct.unpack("<q", head)[0] * sizes[key]
            if size < 0 or position + 8 + size > len(data):
                damaged("its storages are cut short")
            offsets[key] = (position + 8, size)
            position += 8 + size
    return content, offsets
