"""Tar shards as webdataset writes them, read in any order.

A sample is what lies together and has one name up to the first dot: `000017.jpg`, `000017.txt`, `000017.json`. Nothing
is unpacked. Each shard is gone through once, header by header, for an index of where its pictures and captions lie.

The headers: POSIX.1-1988 (ustar) and POSIX.1-2001 (pax), https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html,
and GNU tar's long names and base-256 numbers.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from absl import logging

from jaxdiff.config import ConfigError
from jaxdiff.data import store
from jaxdiff.data.folder import PICTURES
from jaxdiff.data.source import MAX_BYTES, MAX_TEXT, TEXT_NAMES, Record, files_digest, text_of
from jaxdiff.errors import JaxdiffError

BLOCK = 512  # bytes; everything in a tar is padded to it
TEXT_SUFFIXES = ("txt", "text", "caption")
FIELDS = ("image", "text", "json")  # of each offset and size are kept; size 0: the sample lacks it


class Member(NamedTuple):
    name: str
    offset: int  # of its content, in bytes
    size: int  # bytes


class TarError(JaxdiffError, ValueError):
    """A tar that cannot be gone through any further."""


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """The regular files in a tar of `size` bytes.

    Raises:
      TarError: the next header is damaged, or points beyond the end; what came before is whole.
    """
    position = 0
    long_name: str | None = None
    extended: dict[str, str] = {}
    while position < size:
        file.seek(position)
        header = file.read(BLOCK)
        if not header.strip(b"\0"):
            return  # the end: blocks of zeros
        if len(header) < BLOCK:
            raise TarError("it ends in the middle of a header")
        if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise TarError(f"there is no tar header at byte {position}")
        kind, length = header[156:157], _number(header[124:136])
        if "size" in extended:
            length = int(extended["size"]) if re.fullmatch(r"\d{1,19}", extended["size"]) else -1
        start = position + BLOCK
        if not 0 <= length <= size - start:
            raise TarError(f"the file at byte {position} claims {length} bytes, of which {size - start} are there")
        if kind in (b"L", b"x"):  # says something of the member that follows
            if length > MAX_TEXT:
                raise TarError(f"the name at byte {position} is {length} bytes long")
            content = file.read(length)
            if kind == b"L":
                long_name = _text(content)
            else:
                extended = dict(re.findall(r"\d+ (path|size)=([^\n]*)\n", content.decode("utf-8", "replace")))
        else:
            if kind in (b"0", b"\0", b"7"):
                yield Member(extended.get("path") or long_name or _name(header), start, length)
            long_name, extended = None, {}
        position = start + -(-length // BLOCK) * BLOCK


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or GNU's base 256. -1 for anything else."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]*", digits) and digits else -1 if digits else 0


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "replace")


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def index_shard(path: Path) -> dict[str, np.ndarray]:
    """Where the samples of a shard lie: {"image", "text", "json": int64 [n, 2]}, each (offset, bytes).

    What is wrong with the shard is said in a warning; a shard that breaks off keeps the samples before.

    Raises:
      ConfigError: it cannot be read, or is no tar.
    """
    rows: list[dict[str, tuple[int, int]]] = []
    problems: list[str] = []
    last = None
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7"):
                raise ConfigError(f"{path} is compressed: unpack it to a plain .tar, which can be read in any order.")
            try:
                for member in members(file, size):
                    if member.name.startswith("/") or ".." in member.name.split("/"):
                        problems.append(f"{member.name!r} lies outside of the archive and is left out")
                        continue
                    key, field = _split(member.name)
                    if key != last:
                        rows.append({})
                        last = key
                    if field and member.size:
                        rows[-1].setdefault(field, (member.offset, member.size))
            except TarError as e:
                if not rows:
                    raise ConfigError(f"{path} is no tar file that can be read: {e}.") from None
                problems.append(f"{e}; what follows is left out")
    except OSError as e:
        raise ConfigError(f"{path} cannot be read ({e.strerror}).") from None
    whole = [row for row in rows if "image" in row and ("text" in row or "json" in row)]
    if len(whole) < len(rows):
        problems.append(f"{len(rows) - len(whole)} of {len(rows)} samples lack a picture or a caption")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        logging.warning("In the shard %s %s%s.", path, problems[0], more)
    return {f: np.asarray([row.get(f, (0, 0)) for row in whole], np.int64).reshape(-1, 2) for f in FIELDS}


def _split(name: str) -> tuple[str, str | None]:
    """A member's name -> (name of its sample, which field of it)."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    suffix = suffix.lower()
    field = "image" if f".{suffix}" in PICTURES else "text" if suffix in TEXT_SUFFIXES else None
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
            raise ConfigError(f"{name} holds no picture with a caption (such as 0001.jpg beside 0001.txt).")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int, image: bool = True) -> Record:
        shard, row = self._rows[index]
        # Opened for each record: a data set has more shards than a process may keep open.
        with open(self._paths[shard], "rb", buffering=0) as file:
            where = f"{self._paths[shard]}: {_name(_read(file, (row['image'][0] - BLOCK, BLOCK), BLOCK))}"
            text = _read(file, row["text"], MAX_TEXT).decode("utf-8").strip()
            extras = json.loads(_read(file, row["json"], MAX_TEXT) or b"{}")
            picture = _read(file, row["image"], MAX_BYTES) if image else b""
        if not isinstance(extras, dict):
            raise ValueError(f"{where}: its .json is not an object")
        captions = text or next((extras[n] for n in TEXT_NAMES if n in extras), None)
        return Record(where, picture, text_of(captions, where), extras)


def _read(file: BinaryIO, span: Sequence[int] | np.ndarray, most: int) -> bytes:
    offset, size = (int(n) for n in span)
    if size > most:
        raise ValueError(f"{size} bytes at byte {offset} of {file.name} are more than the {most} allowed")
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise ValueError(f"{file.name} ends before byte {offset + size}")
    return content
