"""ArrayRecord files of tf.train.Example messages, as TensorFlow Datasets writes them, without TensorFlow.

https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example/
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.data.source import IMAGE_NAMES, MAX_BYTES, TEXT_NAMES, Record, files_digest, find_column, text_of


@functools.cache
def example_class() -> Any:
    """The protocol buffer class of tf.train.Example: a map from names to lists of bytes, floats or integers."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="jaxdiff_example.proto", package="jaxdiff", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str | None], parent: Any = file.message_type) -> Any:
        message_type = parent.add(name=name)
        for number, (field_name, field_type, label, type_name) in enumerate(fields, 1):
            message_type.field.add(name=field_name, number=number, type=field_type, label=label, type_name=type_name)
        return message_type

    optional, repeated = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    message("BytesList", ("value", field.TYPE_BYTES, repeated, None))
    message("FloatList", ("value", field.TYPE_FLOAT, repeated, None))
    message("Int64List", ("value", field.TYPE_INT64, repeated, None))
    lists = ("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")
    feature = message("Feature", *((name, field.TYPE_MESSAGE, optional, f".jaxdiff.{kind}") for name, kind in lists))
    feature.oneof_decl.add(name="kind")
    for choice in feature.field:
        choice.oneof_index = 0
    features = message("Features", ("feature", field.TYPE_MESSAGE, repeated, ".jaxdiff.Features.FeatureEntry"))
    value = ("value", field.TYPE_MESSAGE, optional, ".jaxdiff.Feature")
    entry = message("FeatureEntry", ("key", field.TYPE_STRING, optional, None), value, parent=features.nested_type)
    entry.options.map_entry = True
    message("Example", ("features", field.TYPE_MESSAGE, optional, ".jaxdiff.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("jaxdiff.Example"))


def parse_example(data: bytes) -> dict[str, list[Any]]:
    """The features of a tf.train.Example: lists of bytes, floats or integers by name.

    Raises:
        ValueError: the bytes are no such message.
    """
    from google.protobuf.message import DecodeError

    try:
        features = example_class().FromString(data).features.feature
    except DecodeError as e:
        raise ValueError(f"this is not a tf.train.Example ({e})") from None
    kinds = {name: feature.WhichOneof("kind") for name, feature in features.items()}
    return {name: list(getattr(features[name], kind).value) if kind else [] for name, kind in kinds.items()}


class ArrayRecords:
    """Examples in ArrayRecord files as a `Source`; a feature holds the bytes of an image, another its captions.

    Args:
        name: for messages.
        paths: the files, in order.
        image_column, text_column: names of the features; "" looks for usual ones.

    Raises:
        ConfigError: a file is damaged or empty, or its first record is not a tf.train.Example with both.
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
            features = parse_example(self._records[0])
        except Exception as e:
            raise ConfigError(f"{name}: the first record cannot be read: {e}.") from None
        names = sorted(features)
        self._image = find_column(name, names, "image", "data.image_column", image_column, IMAGE_NAMES)
        self._text = find_column(name, names, "caption", "data.text_column", text_column, TEXT_NAMES)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int, image: bool = True) -> Record:
        where = f"{self.name}: record {index}"
        try:
            features = parse_example(self._records[index])
        except ValueError:
            raise
        except Exception as e:  # the reader raises errors of several kinds
            raise ValueError(f"it cannot be read ({' '.join(str(e).split())[:200]})") from None
        encoded = (features.pop(self._image, []) or [b""])[0]
        if not isinstance(encoded, bytes):
            raise ValueError(f"its feature {self._image!r} does not hold bytes")
        if len(encoded) > MAX_BYTES:
            raise ValueError(f"{len(encoded)} bytes are more than the {MAX_BYTES} allowed")
        values = {
            name: [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in items]
            for name, items in features.items()
        }
        extras = {name: items[0] for name, items in values.items() if name != self._text and len(items) == 1}
        return Record(where, encoded, text_of(values.get(self._text), where), extras)
