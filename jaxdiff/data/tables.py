"""Captioned images in tables: Parquet files, and Hugging Face datasets on disk (Arrow). Needs pyarrow.

Arrow files are mapped into memory, and any row can be read alone. Of Parquet only whole row groups can be read: those
used last are cached, and the pipeline shuffles row groups, then rows within some of them (`orders.BlockOrder`).
"""

import collections
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jaxdiff.config import ConfigError
from jaxdiff.data.source import IMAGE_NAMES, MAX_BYTES, TEXT_NAMES, Record, files_digest, find_column, text_of

KEPT_GROUPS = 8  # row groups in a process's cache: twice `orders.WINDOW`, for those in use and those read ahead
LARGE_GROUP = 2**28  # bytes of a row group above which a warning reports the memory that it takes


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet and Arrow data need pyarrow: pip install 'pyarrow>=17'.") from None
    return pyarrow


def _columns(schema: Any, where: str, image: str, text: str) -> tuple[str, str]:
    """The names of the columns with images and captions.

    Args:
        image, text: the requested names; "" looks for a usual one.

    Raises:
        ConfigError: there is no such column, or it has another type.
    """
    image_column = find_column(where, schema.names, "image", "data.image_column", image, IMAGE_NAMES)
    if not _has_images(kind := schema.field(image_column).type):
        raise ConfigError(
            f"{where}: the image column {image_column!r} must hold the bytes of image files, not {str(kind)[:80]}."
        )
    text_column = find_column(where, schema.names, "caption", "data.text_column", text, TEXT_NAMES)
    if not _has_captions(kind := schema.field(text_column).type):
        raise ConfigError(f"{where}: the caption column {text_column!r} must hold text, not {str(kind)[:80]}.")
    return image_column, text_column


def _has_images(kind: Any) -> bool:
    """Whether a type is bytes, or Hugging Face's {"bytes", "path"}."""
    types = _pyarrow().types
    fields = [field.type for field in kind if field.name == "bytes"] if types.is_struct(kind) else [kind]
    return any(types.is_binary(field) or types.is_large_binary(field) for field in fields)


def _has_captions(kind: Any) -> bool:
    """Whether a type is text, or a list of texts."""
    types = _pyarrow().types
    item = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    return types.is_string(item) or types.is_large_string(item)


def _scalars(schema: Any, without: Sequence[str]) -> list[str]:
    """The columns of numbers and short text."""
    types = _pyarrow().types
    kinds = (types.is_integer, types.is_floating, types.is_boolean, types.is_string)
    return [f.name for f in schema if f.name not in without and any(is_kind(f.type) for is_kind in kinds)]


def _record(where: str, row: Mapping[str, Any], image: str, text: str) -> Record:
    encoded = row.get(image, b"")
    if isinstance(encoded, Mapping):
        encoded = encoded.get("bytes")
    if not isinstance(encoded, bytes):
        raise ValueError("the table holds no bytes for this image")
    if len(encoded) > MAX_BYTES:
        raise ValueError(f"{len(encoded)} bytes are more than the {MAX_BYTES} allowed")
    extras = {k: v for k, v in row.items() if k not in (image, text)}
    return Record(where, encoded, text_of(row[text], where), extras)


def _open(path: Path, read: Callable[[], Any]) -> Any:
    """The result of `read()`.

    Raises:
        ConfigError: the file `path` cannot be read or is of another kind.
    """
    try:
        return read()
    except OSError as e:  # pyarrow's as well
        raise ConfigError(f"{path} cannot be read ({e.strerror or str(e).splitlines()[0]}).") from None
    except _pyarrow().ArrowException as e:
        raise ConfigError(f"{path} is damaged or of another kind ({str(e).splitlines()[0]}).") from None


def rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a small Parquet file. Raises ConfigError if it cannot be read."""
    pa = _pyarrow()
    return _open(path, lambda: pa.parquet.read_table(path).to_pylist())


class _LazyCache:
    """A cache of objects that each process opens for itself; pickles leave them out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def __reduce__(self) -> Any:
        return _LazyCache, ()

    def get(self, key: Any, make: Callable[[], Any], capacity: int) -> Any:
        with self._lock:
            if key not in self._items:
                self._items[key] = make()
                if len(self._items) > capacity:
                    self._items.popitem(last=False)
            self._items.move_to_end(key)
            return self._items[key]


class ParquetTable:
    """The rows of Parquet files as a `Source`; its blocks are their row groups.

    Args:
        name: for messages.
        paths: the files, in order, all of one schema.
        image_column, text_column: bytes of images, or Hugging Face's {"bytes", "path"}, and captions or lists of them;
            "" looks for a usual name. Other columns of numbers and text are metadata.

    Raises:
        ConfigError: pyarrow is missing, or a file is damaged, empty, or lacks a column.
    """

    def __init__(self, name: str, paths: Sequence[Path], image_column: str = "", text_column: str = "") -> None:
        pa = _pyarrow()
        self.name, self._paths = name, [str(p) for p in paths]

        def groups(path: Path) -> list[tuple[int, int]]:
            meta = _open(path, lambda: pa.parquet.read_metadata(path))
            file_schema = meta.schema.to_arrow_schema()
            missing = {self._image, self._text} - set(file_schema.names)
            if missing:
                raise ConfigError(f"{path} lacks the column {min(missing)!r} that {paths[0]} has.")
            row_groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            return [(group.num_rows, group.total_byte_size) for group in row_groups]

        schema = _open(paths[0], lambda: pa.parquet.read_schema(paths[0]))
        self._image, self._text = _columns(schema, str(paths[0]), image_column, text_column)
        self._extras = _scalars(schema, (self._image, self._text))
        with ThreadPoolExecutor(16) as pool:
            groups_of_files = list(pool.map(groups, paths))
        self.digest = files_digest(paths)
        self._groups = [(f, g) for f, rows in enumerate(groups_of_files) for g in range(len(rows)) if rows[g][0]]
        self.blocks = np.asarray([n for rows in groups_of_files for n, _ in rows if n], np.int64)
        self._ends, self._lazy = np.cumsum(self.blocks), _LazyCache()
        if not len(self._ends):
            raise ConfigError(f"{name} has no rows.")
        largest = max(size for rows in groups_of_files for _, size in rows)
        if largest > LARGE_GROUP:
            logging.warning(
                "%s has row groups of %d MB, of which %d are kept in memory: smaller row groups would need less.",
                name, largest >> 20, KEPT_GROUPS,
            )  # fmt: skip

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int, image: bool = True) -> Record:
        block = int(np.searchsorted(self._ends, index, "right"))
        row = index - int(self._ends[block]) + int(self.blocks[block])
        file, group = self._groups[block]
        columns = [*([self._image] if image else []), self._text, *self._extras]
        table = self._lazy.get((block, image), lambda: self._read_group(file, group, columns), KEPT_GROUPS)
        where = f"{self._paths[file]}: row {row} of row group {group}"
        return _record(where, {c: table.column(c)[row].as_py() for c in columns}, self._image, self._text)

    def _read_group(self, file: int, group: int, columns: list[str]) -> Any:
        pq = _pyarrow().parquet
        try:
            with pq.ParquetFile(self._paths[file], memory_map=True) as opened:
                return opened.read_row_group(group, columns=columns).combine_chunks()
        except _pyarrow().ArrowException as e:
            raise ValueError(f"row group {group} is damaged ({str(e).splitlines()[0]})") from None


class ArrowTable:
    """A folder that `datasets.Dataset.save_to_disk` wrote, as a `Source`; mapped into memory.

    Args:
        path: with dataset_info.json and state.json, which names the files.
        image_column, text_column: see `ParquetTable`.

    Raises:
        ConfigError: pyarrow is missing, or the folder is damaged, empty, of another kind, or lacks a column.
    """

    blocks: np.ndarray | None = None

    def __init__(self, path: Path, image_column: str = "", text_column: str = "") -> None:
        self.name = str(path)
        try:
            state = json.loads((path / "state.json").read_bytes())
            names = [f["filename"] for f in state["_data_files"]]
            valid = all(isinstance(n, str) and os.path.basename(n) == n for n in names) and names
        except OSError as e:
            raise ConfigError(f"{path / 'state.json'} cannot be read ({e.strerror}).") from None
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise ConfigError(f"{path / 'state.json'} names no data files in its folder, as save_to_disk does.")
        if state.get("_indices_data_files"):
            raise ConfigError(f"{path} holds a selection of rows: write it again after dataset.flatten_indices().")
        self._paths, self._lazy = [path / n for n in names], _LazyCache()
        tables = [self._table(i) for i in range(len(self._paths))]
        schema = tables[0].schema
        if any(t.schema.names != schema.names for t in tables):
            raise ConfigError(f"The Arrow files of {path} have different columns.")
        self._image, self._text = _columns(schema, str(path), image_column, text_column)
        self._extras = _scalars(schema, (self._image, self._text))
        self._ends = np.cumsum([t.num_rows for t in tables])
        self.digest = files_digest(self._paths)
        if not self._ends[-1]:
            raise ConfigError(f"{path} has no rows.")

    def _table(self, file: int) -> Any:
        pa, path = _pyarrow(), self._paths[file]

        def open_() -> Any:
            mapped = pa.memory_map(str(path))
            try:
                return pa.ipc.open_stream(mapped).read_all()
            except pa.ArrowInvalid:
                return pa.ipc.open_file(mapped).read_all()

        return self._lazy.get(file, lambda: _open(path, open_), len(self._paths))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int, image: bool = True) -> Record:
        file = int(np.searchsorted(self._ends, index, "right"))
        table = self._table(file)
        row = index - int(self._ends[file]) + table.num_rows
        columns = [*([self._image] if image else []), self._text, *self._extras]
        values = {c: table.column(c)[row].as_py() for c in columns}
        return _record(f"{self._paths[file]}: row {row}", values, self._image, self._text)
