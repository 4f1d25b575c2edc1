"""Sources of captioned images: records that can be read by their numbers, in any order."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxdiff.config import ConfigError

MAX_BYTES = 2**28  # of one encoded image: more is an attack or a mistake
MAX_TEXT = 2**20  # bytes of one caption or of one example's metadata
# Usual names of these two columns.
IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "img", "pixel_values")
TEXT_NAMES = ("text", "caption", "captions", "txt", "prompt")


class Record(NamedTuple):
    """One captioned image, not yet decoded."""

    name: str  # its location, for messages
    image: str | bytes  # path of the file, or the bytes of one; b"" if it was not asked for
    captions: tuple[str, ...]  # at least one
    extras: Mapping[str, Any]  # other metadata


class Source(Protocol):
    """Records 0 … len - 1. Read by many threads at once, and pickled for worker processes without its data.

    Attributes:
        name: of the source, for messages.
        digest: of its contents.
        blocks: int [N], records in each block that can only be read as a whole; None if every record can be read alone.
    """

    name: str
    digest: str

    @property
    def blocks(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def read(self, index: int, image: bool = True) -> Record:
        """Record `index`, without its image unless `image`.

        Raises:
            ValueError, OSError: it is damaged.
        """
        ...


def find_column(
    where: str, names: Sequence[str], content: str, setting: str, requested: str, usual_names: Sequence[str]
) -> str:
    """The column `requested`; if that is "", the first one with a usual name.

    Args:
        where: the data, for messages.
        names: of all columns.
        content, setting: what the column holds, and the setting that names it, for messages.

    Raises:
        ConfigError: there is no such column.
    """
    matches = [name for name in ([requested] if requested else usual_names) if name in names]
    if not matches:
        columns = ", ".join(names[:20]) or "none"
        column = f"{content} column {requested!r}" if requested else f"{content} column"
        raise ConfigError(f"{where} has no {column}; its columns are {columns}: name one with {setting}.")
    return matches[0]


def files_digest(paths: Iterable[str | Path]) -> str:
    """A digest of the names, sizes and times of files, which are not read."""
    digest = hashlib.sha256()
    for path in paths:
        status = os.stat(path)
        digest.update(f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def text_of(values: Any, where: str) -> tuple[str, ...]:
    """One caption or a list of them as a tuple.

    Raises:
        ValueError: it is neither.
    """
    captions = (values,) if isinstance(values, str) else tuple(values) if isinstance(values, list | tuple) else ()
    if not captions or not all(isinstance(c, str) for c in captions):
        raise ValueError(f"{where} has no caption that is text")
    return captions


class Subset:
    """The records `indices`, int [N] in ascending order, of another source, as a source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source, self._indices = source, indices
        self.name = source.name
        self.blocks: np.ndarray | None = None
        self.digest = hashlib.sha256(source.digest.encode() + indices.astype(np.int64).tobytes()).hexdigest()[:32]
        if source.blocks is not None:  # the remaining records of each block
            borders = np.concatenate([[0], np.cumsum(source.blocks)])
            counts = np.diff(np.searchsorted(indices, borders))
            self.blocks = counts[counts > 0]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int, image: bool = True) -> Record:
        return self._source.read(int(self._indices[index]), image)
