"""Tar shards as webdataset writes them, read in any order.

A sample is a run of files with the same name up to the first dot: `000017.jpg`, `000017.txt`, `000017.json`. Nothing is
unpacked: one pass over a shard's headers builds an index of where its images and captions are.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from absl import logging

from jaxdiff.config import ConfigError
from jaxdiff.data import store
from jaxdiff.data.listing import IMAGE_SUFFIXES
from jaxdiff.data.source import MAX_BYTES, MAX_TEXT, TEXT_NAMES, Record, files_digest, text_of

TEXT_SUFFIXES = ("txt", "text", "caption")
FIELDS = ("image", "text", "json")  # the index holds offset and size of each; size 0 means missing


class _Headers:
    """A file for `tarfile` to read headers from, which limits what a malicious header makes it read."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file
        self._ended = False

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_TEXT + tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        content = self._file.read(size)
        if size and not content and self._ended:
            raise tarfile.ReadError("it ends in the middle of a header")
        self._ended = not content
        return content


def members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files in a tar.

    Raises:
        tarfile.TarError: the next header is damaged, or points beyond the end. The files before it are intact.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        return
    try:
        tar = tarfile.TarFile(fileobj=_Headers(file), encoding="utf-8", errors="replace")  # type: ignore[arg-type]
        while member := tar.next():
            available = size - member.offset_data
            backwards = member.size < 0 or tar.offset < member.offset_data
            if backwards or (member.isreg() and not member.issparse() and member.size > available):
                raise tarfile.ReadError(f"{member.name!r} claims {member.size} bytes, of which {available} are there")
            if member.isreg():
                yield member
            tar.members = []  # type: ignore[attr-defined]  # a shard may have many
    except (ValueError, IndexError, OverflowError, RecursionError) as e:  # raised by tarfile for some damaged headers
        raise tarfile.ReadError(f"a header is damaged ({type(e).__name__})") from None
    # tarfile stops at a damaged header as silently as at the end of a tar: a block of zeros, or no more data.
    file.seek(tar.offset)
    header = file.read(tarfile.BLOCKSIZE)
    if header.strip(b"\0"):
        if len(header) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends in the middle of a header")
        raise tarfile.ReadError(f"there is no tar header at byte {tar.offset}")


def index_shard(path: Path) -> dict[str, np.ndarray]:
    """Where the samples of a shard are: {"image", "text", "json": int64 [n, 2]}, each (offset, bytes).

    A warning reports what is wrong with the shard. The samples before a damaged header are used.

    Raises:
        ConfigError: it cannot be read, or is not a tar file.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7"):
                raise ConfigError(f"{path} is compressed: unpack it to a plain .tar, which can be read in any order.")
            file.seek(0)
            rows, problems = _samples(file)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read ({e.strerror}).") from None
    complete = [row for row in rows if "image" in row and ("text" in row or "json" in row)]
    if len(complete) < len(rows):
        problems.append(f"{len(rows) - len(complete)} of {len(rows)} samples lack an image or a caption")
    if problems:
        note = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        logging.warning("In the shard %s %s%s.", path, problems[0], note)
    return {name: np.asarray([row.get(name, (0, 0)) for row in complete], np.int64).reshape(-1, 2) for name in FIELDS}


def _samples(file: BinaryIO) -> tuple[list[dict[str, tuple[int, int]]], list[str]]:
    """(fields of each sample of a shard, each (offset, bytes); problems of the shard).

    Raises:
        ConfigError: nothing of it can be read.
    """
    rows: list[dict[str, tuple[int, int]]] = []
    problems: list[str] = []
    last_key = None
    try:
        for member in members(file):
            if member.name.startswith("/") or ".." in member.name.split("/"):
                problems.append(f"{member.name!r} lies outside of the archive and is left out")
            elif member.issparse():
                problems.append(f"{member.name!r} is a sparse file and is left out")
            else:
                key, field = _split(member.name)
                if key != last_key:
                    rows.append({})
                    last_key = key
                if field and member.size:
                    rows[-1].setdefault(field, (member.offset_data, member.size))
    except tarfile.TarError as e:
        if not rows:
            raise ConfigError(f"{file.name} is not a readable tar file: {e}.") from None
        problems.append(f"{e}; what follows is left out")
    return rows, problems


def _split(name: str) -> tuple[str, str | None]:
    """A member's name -> (name of its sample, which field of it)."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    suffix = suffix.lower()
    field = "image" if f".{suffix}" in IMAGE_SUFFIXES else "text" if suffix in TEXT_SUFFIXES else None
    return f"{folder}/{stem}", "json" if suffix == "json" else field


class TarShards:
    """The samples of tar shards as a `Source`.

    Args:
        name: for messages.
        paths: the shards, in order.
        cache: folder for the index; None keeps it in memory.
        host_index, host_count: hosts with the same cache divide the indexing.

    Raises:
        ConfigError: a shard cannot be read, or none holds a sample.
    """

    blocks: np.ndarray | None = None

    def __init__(
        self, name: str, paths: Sequence[Path], cache: Path | None = None, host_index: int = 0, host_count: int = 1
    ) -> None:
        self.name, self._paths = name, [str(p) for p in paths]
        try:
            self.digest = files_digest(paths)
            parts = [f"{p.stem}-{hashlib.sha256(files_digest([p]).encode()).hexdigest()[:16]}" for p in paths]
        except OSError as e:
            raise ConfigError(f"{e.filename} cannot be read ({e.strerror}).") from None
        if cache is None:
            self._rows = store.Rows([index_shard(p) for p in paths])
        else:
            hosts = {"host_index": host_index, "host_count": host_count}
            store.fill(cache / "shards", parts, lambda i: index_shard(Path(paths[i])), threads=8, **hosts)
            self._rows = store.Rows([str(cache / "shards" / p) for p in parts])
        if not len(self._rows):
            raise ConfigError(f"{name} holds no image with a caption (such as 0001.jpg beside 0001.txt).")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int, image: bool = True) -> Record:
        shard, row = self._rows[index]
        # Opened for each record: a data set may have more shards than a process may keep open.
        with open(self._paths[shard], "rb", buffering=0) as file:
            where = f"{self._paths[shard]}: {_member_name(file, int(row['image'][0]))}"
            text = _read(file, row["text"], MAX_TEXT).decode("utf-8").strip()
            extras = json.loads(_read(file, row["json"], MAX_TEXT) or b"{}")
            encoded = _read(file, row["image"], MAX_BYTES) if image else b""
        if not isinstance(extras, dict):
            raise ValueError(f"{where}: its .json is not an object")
        captions = text or next((extras[n] for n in TEXT_NAMES if n in extras), None)
        return Record(where, encoded, text_of(captions, where), extras)


def _member_name(file: BinaryIO, offset: int) -> str:
    """The name in the header before the content at `offset`."""
    header = _read(file, (offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE), tarfile.BLOCKSIZE)
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
    except tarfile.TarError:
        raise ValueError(f"{file.name} has changed since it was indexed: there is no file at byte {offset}") from None


def _read(file: BinaryIO, span: Sequence[int] | np.ndarray, max_size: int) -> bytes:
    offset, size = (int(n) for n in span)
    if size > max_size:
        raise ValueError(f"{size} bytes at byte {offset} of {file.name} are more than the {max_size} allowed")
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise ValueError(f"{file.name} ends before byte {offset + size}")
    return content
