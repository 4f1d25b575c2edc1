"""Captioned pictures in tables: Parquet files, and Hugging Face datasets on disk (Arrow). Needs pyarrow.

Arrow files are mapped into memory, and any row is read alone. Of Parquet whole row groups must be read: the few used
last are kept, and the pipeline shuffles row groups, then rows within some of them (`pipeline.BlockOrder`).
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
from jaxdiff.data.source import IMAGE_NAMES, MAX_BYTES, TEXT_NAMES, Record, files_digest, text_of

KEPT_GROUPS = 8  # decoded ones that a process keeps: twice `pipeline.WINDOW`: in use, and read ahead
LARGE_GROUP = 2**28  # bytes of a row group, beyond which memory is at stake


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet and Arrow data need pyarrow: pip install 'jaxdiff[tables]'.") from None
    return pyarrow


def _columns(schema: Any, where: str, image: str, text: str) -> tuple[str, str]:
    """The names of the columns with pictures and captions, checked.

    Args:
      image, text: the names given; "" looks for a usual one.

    Raises:
      ConfigError: there is no such column, or it holds something else.
    """
    pa = _pyarrow()
    found = []
    for what, setting, given, usual, good in (
        (
            "picture",
            "image_column",
            image,
            IMAGE_NAMES,
            lambda t: _is_bytes(pa, t) or (pa.types.is_struct(t) and _has_bytes(pa, t)),
        ),
        (
            "caption",
            "text_column",
            text,
            TEXT_NAMES,
            lambda t: _is_text(pa, t) or (_is_list(pa, t) and _is_text(pa, t.value_type)),
        ),
    ):
        names = [given] if given else [n for n in usual if n in schema.names]
        if not names or names[0] not in schema.names:
            raise ConfigError(
                f"{where} has no {what} column{f' {given!r}' if given else ''}; its columns are "
                f"{', '.join(schema.names[:20]) or 'none'}: name one with data.{setting}."
            )
        if not good(kind := schema.field(names[0]).type):
            needed = "the bytes of image files" if what == "picture" else "text"
            raise ConfigError(f"{where}: the {what} column {names[0]!r} must hold {needed}, not {str(kind)[:80]}.")
        found.append(names[0])
    return found[0], found[1]


def _is_bytes(pa: Any, kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_bytes(pa: Any, kind: Any) -> bool:
    return any(field.name == "bytes" and _is_bytes(pa, field.type) for field in kind)


def _is_text(pa: Any, kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(pa: Any, kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _scalars(pa: Any, schema: Any, without: Sequence[str]) -> list[str]:
    """The columns of numbers and short text."""
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)
    return [f.name for f in schema if f.name not in without and any(is_kind(f.type) for is_kind in kinds)]


def _record(where: str, row: Mapping[str, Any], image: str, text: str) -> Record:
    picture = row.get(image, b"")
    if isinstance(picture, Mapping):
        picture = picture.get("bytes")
    if not isinstance(picture, bytes):
        raise ValueError("the table holds no bytes for this picture")
    if len(picture) > MAX_BYTES:
        raise ValueError(f"{len(picture)} bytes are more than the {MAX_BYTES} allowed")
    extras = {k: v for k, v in row.items() if k not in (image, text)}
    return Record(where, picture, text_of(row[text], where), extras)


def _opened(path: Path, read: Callable[[], Any]) -> Any:
    """What `read()` returns of a file.

    Raises:
      ConfigError: it cannot be read or is of another kind.
    """
    try:
        return read()
    except OSError as e:  # pyarrow's as well
        raise ConfigError(f"{path} cannot be read ({e.strerror or str(e).splitlines()[0]}).") from None
    except _pyarrow().ArrowException as e:
        raise ConfigError(f"{path} is damaged or of another kind ({str(e).splitlines()[0]}).") from None


class _Lazy:
    """What each process opens for itself and a pickle leaves out."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def __reduce__(self) -> Any:
        return _Lazy, ()

    def get(self, key: Any, make: Callable[[], Any], most: int) -> Any:
        with self.lock:
            if key not in self.kept:
                self.kept[key] = make()
                if len(self.kept) > most:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
            return self.kept[key]


class ParquetTable:
    """The rows of Parquet files as a `Source`; its blocks are their row groups.

    Args:
      name: for messages.
      paths: the files, in order, all of one schema.
      image_column, text_column: bytes of pictures, or Hugging Face's {"bytes", "path"}, and captions or lists of them;
        "" looks for a usual name. Other columns of numbers and text are metadata.

    Raises:
      ConfigError: pyarrow is missing, or a file is damaged, empty, or lacks a column.
    """

    def __init__(self, name: str, paths: Sequence[Path], image_column: str = "", text_column: str = "") -> None:
        pa = _pyarrow()
        self.name, self._paths = name, [str(p) for p in paths]

        def groups(path: Path) -> list[tuple[int, int]]:
            meta = _opened(path, lambda: pa.parquet.read_metadata(path))
            of_file = meta.schema.to_arrow_schema()
            missing = {self._image, self._text} - set(of_file.names)
            if missing:
                raise ConfigError(f"{path} lacks the column {min(missing)!r} that {paths[0]} has.")
            all_groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
            return [(g.num_rows, g.total_byte_size) for g in all_groups]

        schema = _opened(paths[0], lambda: pa.parquet.read_schema(paths[0]))
        self._image, self._text = _columns(schema, str(paths[0]), image_column, text_column)
        self._extras = _scalars(pa, schema, (self._image, self._text))
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(groups, paths))
        self.digest = files_digest(paths)
        self._groups = [(f, g) for f, rows in enumerate(found) for g in range(len(rows)) if rows[g][0]]
        self.blocks = np.asarray([n for rows in found for n, _ in rows if n], np.int64)
        self._ends, self._lazy = np.cumsum(self.blocks), _Lazy()
        if not len(self._ends):
            raise ConfigError(f"{name} has no rows.")
        largest = max(size for rows in found for _, size in rows)
        if largest > LARGE_GROUP:
            logging.warning(
                "%s has row groups of %d MB, of which %d are held at a time: written with smaller ones it needs less.",
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
            good = all(isinstance(n, str) and os.path.basename(n) == n for n in names) and names
        except OSError as e:
            raise ConfigError(f"{path / 'state.json'} cannot be read ({e.strerror}).") from None
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise ConfigError(f"{path / 'state.json'} names no data files in its folder, as save_to_disk would.")
        if state.get("_indices_data_files"):
            raise ConfigError(f"{path} holds a selection of rows: write it again after dataset.flatten_indices().")
        self._paths, self._lazy = [path / n for n in names], _Lazy()
        tables = [self._table(i) for i in range(len(self._paths))]
        schema = tables[0].schema
        if any(t.schema.names != schema.names for t in tables):
            raise ConfigError(f"The Arrow files of {path} have different columns.")
        self._image, self._text = _columns(schema, str(path), image_column, text_column)
        self._extras = _scalars(_pyarrow(), schema, (self._image, self._text))
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

        return self._lazy.get(file, lambda: _opened(path, open_), len(self._paths))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int, image: bool = True) -> Record:
        file = int(np.searchsorted(self._ends, index, "right"))
        table = self._table(file)
        row = index - int(self._ends[file]) + table.num_rows
        columns = [*([self._image] if image else []), self._text, *self._extras]
        values = {c: table.column(c)[row].as_py() for c in columns}
        return _record(f"{self._paths[file]}: row {row}", values, self._image, self._text)
