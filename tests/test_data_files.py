"""Files of data: shards of tar, records, tables and splits, and what happens to damaged and hostile ones."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from jaxdiff.config import ConfigError
from jaxdiff.data.captioned import captioned_data, open_source
from jaxdiff.data.records import example_class, parse_example
from jaxdiff.data.shards import index_shard
from tests.support.image_datasets import add, numbered_image, write_tars

# Tar


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_format(tmp_path, format):
    name = "/".join(["a" * 30] * (4 if format == tarfile.USTAR_FORMAT else 12)) + "/größe.x.jpg"
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        tar.addfile(tarfile.TarInfo("folder/"))
        add(tar, name, numbered_image(1))
        add(tar, name.replace(".x.jpg", ".txt"), b"one")
        add(tar, "other.png", numbered_image(2))
        add(tar, "other.txt", b"two")
    index = index_shard(tmp_path / "a.tar")
    assert len(index["image"]) == 1  # "größe.x.jpg" is of the kind "x.jpg"
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        add(tar, name.replace(".x", ""), numbered_image(1))
        add(tar, name.replace(".x.jpg", ".txt"), b"one")
    source = open_source(tmp_path / "a.tar")
    assert source.read(0).captions == ("one",)
    assert source.read(0).image == numbered_image(1)


def test_an_index_is_made_once_and_anew_for_another_shard(tmp_path, monkeypatch):
    path = write_tars(tmp_path / "data", 10)
    first = open_source(path, cache=tmp_path / "cache")
    monkeypatch.setattr("jaxdiff.data.shards.index_shard", lambda path: pytest.fail("indexed again"))
    assert [open_source(path, cache=tmp_path / "cache").read(i) for i in range(10)] == [
        first.read(i) for i in range(10)
    ]
    monkeypatch.undo()
    write_tars(path, 7)
    assert len(open_source(path, cache=tmp_path / "cache")) == 7
    assert len(open_source(f"{path}/{{00000..00001}}.tar")) == 7


def shard_of(*entries, tail=b"") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in entries:
            add(tar, name, data)
    return file.getvalue() + tail


PAIR = (("a.png", numbered_image(1)), ("a.txt", b"one"))


def test_no_metadata_in_a_shard_opens_files_beside_it(tmp_path):
    """A "conditioning_file" is for folders, where it is known to lie inside."""
    (tmp_path / "secret.png").write_bytes(numbered_image(2))
    (tmp_path / "data").mkdir()
    metadata = json.dumps({"conditioning_file": str(tmp_path / "secret.png")}).encode()
    (tmp_path / "data/0.tar").write_bytes(shard_of(*PAIR, ("a.json", metadata)))
    batch = next(iter(captioned_data(tmp_path / "data", 1, 8, seed=0, threads=1)))
    assert set(batch) == {"image", "text"}


def absurd(size: bytes, kind: bytes = b"0") -> bytes:
    """The second sample's image claims another size and kind, with a right checksum."""
    data = bytearray(shard_of(*PAIR, ("b.png", numbered_image(2)), ("b.txt", b"two")))
    at = 4 * 512  # header, image, header, text
    header = data[at : at + 512]
    assert header[:5] == b"b.png"
    header[124:136] = size
    header[148:156] = b" " * 8
    header[156:157] = kind
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header
    return bytes(data)


def pax(*fields: str) -> bytes:
    """The second sample's image has these fields in a pax header."""
    values = dict(field.split("=") for field in fields)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in PAIR:
            add(tar, name, data)
        add(tar, "b.png", numbered_image(2), pax_headers=values)
        add(tar, "b.txt", b"two")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            shard_of(("../b.png", numbered_image(2)), ("../b.txt", b"b"), *PAIR),
            "'../b.png' lies outside of the archive",
        ),
        (shard_of(("/etc/b.png", numbered_image(2)), *PAIR), "'/etc/b.png' lies outside"),
        (absurd(b"77777777777\0"), "claims 8589934591 bytes"),
        (absurd(b"\x80" + b"\x7f" * 11), "claims"),
        (absurd(b"\xff" * 12), "b.png' claims -1 bytes|no tar header at byte 2048"),  # by the version of Python
        (absurd(b"12345678x9a\0"), "no tar header at byte 2048"),
        (absurd(b"\xff" * 10 + b"\0\0", b"Q"), "b.png' claims -65536 bytes|no tar header at byte 2048"),
        (absurd(b"\xff" * 10 + b"\0\0", b"L"), "claims -65536 bytes|no tar header"),
        (absurd(b"\xff" * 10 + b"\0\0", b"S"), "claims 0 bytes|no tar header"),
        (absurd(b"00077777777\0", b"x"), "a header claims 16777216 bytes"),
        (absurd(b"00077777777\0", b"L"), "a header claims 16777216 bytes"),
        (pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=b.png"), "a header is damaged|in the middle"),
        (pax("size=-1024"), "b.png' claims -1024 bytes|no tar header"),
        (pax("size=99999"), "b.png' claims 99999 bytes"),
        (shard_of(*PAIR, ("b.png", numbered_image(2)))[: 5 * 512 - 100], "ends in the middle of a header"),
        (shard_of(*PAIR, ("b.png", numbered_image(2)))[: 5 * 512 + 10], "bytes, of which 10 are there"),
        (shard_of(*PAIR)[: 4 * 512] + b"rubbish" * 100, "no tar header at byte 2048"),
        (shard_of(*PAIR, ("c.png", numbered_image(2)), ("d.txt", b"d")), "2 of 3 samples lack an image or a caption"),
    ],
)
def test_damaged_shards_keep_what_is_whole_and_say_one_sentence(tmp_path, caplog, content, said):
    (tmp_path / "a.tar").write_bytes(content)
    source = open_source(tmp_path / "a.tar")
    assert len(source) == 1
    assert source.read(0).captions == ("one",)
    (message,) = [r.getMessage() for r in caplog.records]
    assert re.search(said, message)
    assert "a.tar" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not a tar" * 200, "is not a readable tar file"),
        (b"", "holds no image"),
        (b"\x1f\x8b" + b"x" * 600, "is compressed"),
        (shard_of(("a.txt", b"a")), "holds no image"),
    ],
)
def test_what_is_no_shard_is_refused(tmp_path, content, said):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        open_source(tmp_path)
    assert "a.tar" in str(error.value) or str(tmp_path) in str(error.value)


# Records


def field(number: int, content: bytes) -> bytes:
    """A field with a length, as protocol buffers are encoded (protobuf.dev/programming-guides/encoding)."""
    return bytes([number << 3 | 2, len(content)]) + content


def feature(name: bytes, kind: int, values: bytes) -> bytes:
    """An entry of the map that is field 1 of Features, itself field 1 of Example."""
    return field(1, field(1, name) + field(2, field(kind, values)))


def test_examples_are_parsed_byte_by_byte_as_published():
    """Feature's lists are 1: bytes, 2: floats, 3: integers; numbers come packed or one at a time."""
    integers = field(1, b"\x00" + b"\xff" * 9 + b"\x01" + b"\x80" * 8 + b"\x40") + b"\x08\x07"  # 0, -1, 2^62; 7
    features = [
        feature(b"b", 1, field(1, b"") + field(1, b"xyz")),
        feature(b"f", 2, field(1, np.asarray([0.5, -2.0], "<f4").tobytes())),
        feature(b"i", 3, integers),
        field(1, field(1, b"empty") + field(2, b"")),
        field(1, field(1, b"none") + field(2, field(1, b""))),
    ]
    data = field(1, b"".join(features))
    parsed = parse_example(data)
    assert parsed == {"b": [b"", b"xyz"], "f": [0.5, -2.0], "i": [0, -1, 2**62, 7], "empty": [], "none": []}
    assert {type(value) for values in parsed.values() for value in values} == {bytes, float, int}
    assert parse_example(example_class()(features={"feature": {}}).SerializeToString()) == {}
    for cut in range(1, len(data)):
        with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
            parse_example(data[:cut])


def test_records_of_another_kind_are_refused(tmp_path):
    array_record = pytest.importorskip("array_record.python.array_record_module")
    writer = array_record.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(b'{"text": "json"}')
    writer.close()
    with pytest.raises(ConfigError, match=r"the first record cannot be read: this is not a tf\.train\.Example"):
        open_source(tmp_path)


# Tables, paths


def test_hostile_tables_and_folders(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def refused(said, path=tmp_path, **kwargs):
        with pytest.raises(ConfigError, match=said) as error:
            open_source(path, **kwargs)
        assert "\n" not in str(error.value)

    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"url": ["a"], "text": ["b"]}), file)
    refused("has no image column; its columns are url, text: name one with data.image_column")
    refused("must hold the bytes of image files, not string", image_column="url")
    pq.write_table(pa.table({"image": [b"a"], "text": [1]}), file)
    refused("has no caption column 'c'", text_column="c")
    refused("caption column 'text' must hold text, not int64")
    file.write_bytes(b"PAR1 and no more")
    refused("a.parquet (cannot be read|is damaged)")
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}), file)
    refused("has no rows")
    (tmp_path / "b.tar").write_bytes(b"")
    refused("several kinds")
    arrow = tmp_path / "arrow"
    arrow.mkdir()
    for state, said in (
        ("{", "names no data files"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "names no data files in its folder"),
        ('{"_data_files": [{"filename": "x.arrow"}]}', "x.arrow cannot be read"),
    ):
        (arrow / "state.json").write_text(state)
        refused(said, arrow)
    (arrow / "x.arrow").write_bytes(b"something else")
    refused("x.arrow", arrow)
    with pa.OSFile(str(arrow / "x.arrow"), "wb") as f, pa.ipc.new_stream(f, pa.schema({"n": pa.int64()})) as writer:
        writer.write_table(pa.table({"n": [1]}))
    refused("has no image column; its columns are n", arrow)
    refused("the file .*7.tar does not exist", f"{tmp_path}/{{7..9}}.tar")
    (tmp_path / "a.zip").write_bytes(b"")
    refused("is of an unknown kind", tmp_path / "a.zip")
    refused("does not exist", tmp_path / "nowhere")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "a.array_record").write_bytes(b"x" * 1000)
    refused("ArrayRecord", tmp_path / "r")


def test_splits(tmp_path):
    write_tars(tmp_path / "train", 5)
    write_tars(tmp_path / "validation", 3)
    assert [len(open_source(tmp_path, split)) for split in ("train", "validation")] == [5, 3]
    with pytest.raises(ConfigError):
        open_source(tmp_path, "test")


SAVE = """
import io, sys
from datasets import Dataset, DatasetDict, DatasetInfo, Features, Image, Value
from datasets.table import InMemoryTable
from PIL import Image as pillow

def png(number):
    file = io.BytesIO()
    pillow.new("RGB", (8, 8), (number,) * 3).save(file, "PNG")
    return file.getvalue()

def saved(numbers):  # with a fingerprint, which some versions cannot compute
    columns = {"image": [{"bytes": png(i), "path": None} for i in numbers], "text": [str(i) for i in numbers]}
    table = InMemoryTable.from_pydict(columns, schema=features.arrow_schema)
    return Dataset(table, info=DatasetInfo(features=features), fingerprint="0")

features = Features({"image": Image(), "text": Value("string")})
DatasetDict({"train": saved(range(4)), "test": saved([1, 3])}).save_to_disk(sys.argv[1])
"""


def test_what_datasets_saves_is_read(tmp_path):
    # Away from the checkout, whose own package "datasets" would be imported in place of Hugging Face's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", SAVE, str(tmp_path / "saved")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if "No module named 'datasets'" in done.stderr or "unknown location" in done.stderr:
        pytest.skip("Hugging Face datasets is not installed")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "saved"
    assert [open_source(path).read(i).image for i in range(4)] == [numbered_image(i) for i in range(4)]
    assert [open_source(path, "test").read(i).captions for i in range(2)] == [("1",), ("3",)]
    with pytest.raises(ConfigError, match="its splits are test, train"):
        open_source(path, "validation")


def test_an_image_that_says_repeats_comes_up_so_often(tmp_path):
    lines = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b", "repeats": 3}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    assert len(open_source(tmp_path)) == 4
    data = captioned_data(tmp_path, 4, 8, seed=0, epochs=1)
    assert sorted(text for batch in data for text in batch["text"]) == ["a", "b", "b", "b"]


@pytest.mark.parametrize("repeats", [0, -1, 1.5, "2", True, None, 10**6])
def test_repeats_that_cannot_be_are_refused(tmp_path, repeats):
    line = {"file_name": "a.png", "text": "a", "repeats": repeats}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(ConfigError, match=r'line 1: "repeats" must be a whole number from 1 to 1000'):
        open_source(tmp_path)
