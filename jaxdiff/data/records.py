"""ArrayRecord files of tf.train.Example messages, as TensorFlow Datasets writes them, without TensorFlow.

Example is a protocol buffer: field 1 is Features, whose field 1 is a map from names to Feature, which is a list of
bytes (1), floats (2) or integers (3). https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example/
The wire format: https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.data.source import IMAGE_NAMES, MAX_BYTES, TEXT_NAMES, Record, files_digest, text_of


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, position behind it)."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a damaged number in a record")
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            return value, at


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, content) of each field of a message: an integer, or bytes for those that have a length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}.get(wire, len(data) + 1), at)
        if size > len(data) - at:
            raise ValueError("a record that breaks off, or is no tf.train.Example")
        yield number, data[at : at + size]
        at += size


def parse_example(data: bytes) -> dict[str, list[Any]]:
    """The features of a tf.train.Example: lists of bytes, floats or integers by name.

    Raises:
      ValueError: it is not one.
    """
    features: dict[str, list[Any]] = {}
    for number, message in _fields(memoryview(data)):
        for inner, entry in _fields(message) if number == 1 else ():
            if inner == 1:
                parts = dict(_fields(entry))
                features[bytes(parts.get(1, b"")).decode("utf-8")] = _feature(memoryview(parts.get(2, b"")))
    return features


def _feature(data: memoryview) -> list[Any]:
    values: list[Any] = []
    for kind, content in _fields(data):
        for number, item in _fields(content):
            if number != 1:
                continue
            if kind == 1:
                values.append(bytes(item))
            elif kind == 2:  # packed, or one at a time
                values += np.frombuffer(item, "<f4").tolist()
            elif isinstance(item, int):
                values.append(_signed(item))
            else:
                at = 0
                while at < len(item):
                    value, at = _varint(item, at)
                    values.append(_signed(value))
    return values


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


class ArrayRecords:
    """Examples in ArrayRecord files as a `Source`: a feature with the bytes of a picture, one with captions.

    Args:
      name: for messages.
      paths: the files, in order.
      image_column, text_column: names of the features; "" looks for usual ones.

    Raises:
      ConfigError: a file is damaged or empty, or its first record is of another kind.
    """

    blocks: np.ndarray | None = None

    def __init__(self, name: str, paths: Sequence[Path], image_column: str = "", text_column: str = "") -> None:
        import grain

        self.name = name
        try:
            self.digest = files_digest(paths)
            self._records = grain.sources.ArrayRecordDataSource([str(p) for p in paths])
            count = len(self._records)
        except Exception as e:  # the reader raises RuntimeError and others
            raise ConfigError(f"{name} cannot be read as ArrayRecord ({' '.join(str(e).split())[:200]}).") from None
        if not count:
            raise ConfigError(f"{name} has no records.")
        try:
            found = parse_example(self._records[0])
        except Exception as e:
            raise ConfigError(f"{name}: the first record is no tf.train.Example ({e}).") from None
        self._image, self._text = (
            self._column(found, *c) for c in ((image_column, IMAGE_NAMES, "image"), (text_column, TEXT_NAMES, "text"))
        )

    def _column(self, found: dict[str, list[Any]], given: str, usual: Sequence[str], what: str) -> str:
        name = given or next((n for n in usual if n in found), "")
        if name not in found:
            shown = ", ".join(sorted(found)[:20]) or "none"
            raise ConfigError(f"{self.name} has these features: {shown}; name one with data.{what}_column.")
        return name

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int, image: bool = True) -> Record:
        where = f"{self.name}: record {index}"
        try:
            features = parse_example(self._records[index])
        except ValueError:
            raise
        except Exception as e:  # the reader's own, of no common kind
            raise ValueError(f"it cannot be read ({' '.join(str(e).split())[:200]})") from None
        picture = (features.pop(self._image, []) or [b""])[0]
        if not isinstance(picture, bytes) or len(picture) > MAX_BYTES:
            raise ValueError(f"its feature {self._image!r} holds no bytes of a picture")
        values = {
            n: [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in vs] for n, vs in features.items()
        }
        extras = {n: vs[0] for n, vs in values.items() if n != self._text and len(vs) == 1}
        return Record(where, picture, text_of(values.get(self._text), where), extras)
