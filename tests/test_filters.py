"""Which examples are trained on, and which images count as the same."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxdiff.config import ConfigError
from jaxdiff.data import filters
from jaxdiff.data.captioned import captioned_data, open_source
from jaxdiff.data.filters import scan, select
from jaxdiff.data.hashes import content_hash, dhash, near_duplicates
from tests.support.image_datasets import WRITERS, numbers, write_folder


def photo(seed: int, side: int = 96) -> Image.Image:
    """Smooth noise, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def kept(source) -> list[int]:
    return [int(source.read(i).captions[0]) for i in range(len(source))]


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_columns_of_numbers_of_every_kind_of_data(tmp_path, kind, caplog):
    if kind in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    caplog.set_level("INFO")
    source = open_source(WRITERS[kind](tmp_path / "d", 12))
    chosen = select(source, {"where": ("score>=0.25", "score<1")})
    assert kept(chosen) == [3, 4, 5, 6, 7, 8, 9]
    assert "7 of 12 images" in caplog.text
    assert "score>=0.25 3" in caplog.text
    assert "score<1 2" in caplog.text
    assert chosen.digest != source.digest
    seen = [n for b in captioned_data(chosen, 1, 8, seed=0, epochs=1, threads=1) for n in numbers(b)]
    assert sorted(seen) == [3, 4, 5, 6, 7, 8, 9]


def test_sizes_captions_and_categories(tmp_path, caplog):
    caplog.set_level("INFO")
    sides = [(8, 8), (8, 40), (64, 32), (32, 32)]
    path = write_folder(tmp_path, 8, sizes=sides, bad=(7,))
    lines = [json.loads(line) for line in (path / "metadata.jsonl").read_text().split("\n")]
    for i, line in enumerate(lines):
        line |= {"text": "x" * i, "style": "flat" if i % 2 else "oil", "subject": "abbbcccc"[i]}
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_source(path)

    def left(**wanted):
        return [len(select(source, wanted).read(i).captions[0]) for i in range(len(select(source, wanted)))]

    assert left(min_side=9) == [2, 3, 6, 7]
    assert left(max_aspect=2) == [0, 2, 3, 4, 6, 7]
    assert left(min_caption=3, max_caption=5) == [3, 4, 5]
    assert left(style=("flat",)) == [1, 3, 5, 7]
    assert left(max_subjects=1) == [4, 5, 6, 7]
    assert left(max_subjects=1, max_caption=3) == [1, 2, 3]
    assert left(style=("oil",), min_side=9, max_caption=3) == [2]
    assert select(source, {"min_side": 0, "style": ()}) is source
    with pytest.raises(ConfigError, match="filter leaves no image"):
        left(style=("gone",))


def test_a_value_that_is_missing_or_no_number(tmp_path):
    path = write_folder(tmp_path, 4)
    lines = [json.loads(line) for line in (path / "metadata.jsonl").read_text().split("\n")]
    lines[0]["score"], lines[1]["score"] = None, "high"
    del lines[2]["score"]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_source(path)
    assert kept(select(source, {"where": ("score>-1",)})) == [3]
    assert kept(select(source, {"score": (None,)})) == [0, 2]


def with_lines(path, change):
    """The folder with each line of its metadata changed by change(number, line)."""
    lines = [json.loads(line) for line in (path / "metadata.jsonl").read_text().split("\n")]
    for i, line in enumerate(lines):
        change(i, line)
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return open_source(path)


@pytest.mark.parametrize(
    ("condition", "left"),
    [
        ("license=CC0", [1]),
        ("license == 'CC0'", [1]),
        ("license=CC BY=4", [2]),
        ("license=2020", [3, 4, 5]),
        ("license='2020'", [3]),
        ("license=true", [6]),
        ("license='true'", []),
        ("license=null", [0, 7]),
        ("license=''", [8]),
    ],
)
def test_any_column_may_be_asked_for_a_value(tmp_path, condition, left):
    values = [None, "CC0", "CC BY=4", "2020", 2020, 2020.0, True, None, ""]
    source = with_lines(write_folder(tmp_path, 9), lambda i, line: i == 7 or line.update(license=values[i]))
    if left:
        assert kept(select(source, {"where": (condition,)})) == left
    else:
        with pytest.raises(ConfigError, match="leaves no image"):
            select(source, {"where": (condition,)})


def test_one_long_value_costs_no_memory_for_the_others(tmp_path):
    """What is kept of an example is 8 bytes for each column and number, and at most 64 of a name."""
    long = "x" * 100_000
    source = with_lines(write_folder(tmp_path, 6), lambda i, line: line.update(subject=long if i == 3 else f"a{i % 2}"))
    found = scan(source, columns=("subject", "score"), names=("subject",))
    assert sum(x.nbytes for x in found.values()) <= 6 * (4 + 4 * 8 + 64)
    assert kept(select(source, {"subject": (long,)})) == [3]
    assert kept(select(source, {"max_subjects": 1})) == [0, 2, 4]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"where": ("score",)}, "'score' must be like"),
        ({"where": ("score>=much",)}, "must be like"),
        ({"where": ("score>=1e",)}, "must be like"),
        ({"where": ("score=",)}, "must be like"),
        ({"where": ("score!=1",)}, "must be like"),
        ({"duplicates": "all"}, "duplicates must be"),
        ({"duplicate_bits": 17}, "duplicate_bits must be from 0 to 16"),
    ],
)
def test_filters_that_cannot_be(tmp_path, wanted, said):
    with pytest.raises(ConfigError, match=said):
        select(open_source(write_folder(tmp_path, 2)), wanted)


def test_hashes_of_likeness():
    """The same image resized or compressed differs in few bits; another one in about half of them."""
    for seed in range(5):
        image, first = photo(seed), dhash(photo(seed))
        small = image.resize((50, 50), Image.Resampling.LANCZOS)
        assert (first ^ dhash(small)).bit_count() <= 4
        # 64 fair bits differ in 32, with a deviation of 4: five deviations.
        assert (first ^ dhash(photo(seed + 100))).bit_count() >= 12
    left_to_right = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8), (80, 1)))
    assert dhash(left_to_right) == 2**64 - 1
    assert dhash(left_to_right.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    assert content_hash(b"a") != content_hash(b"b")


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 8])
def test_no_near_duplicate_is_missed(distance):
    """Against the comparison of all with all, on clusters around random hashes."""
    rng = np.random.default_rng(distance)
    centres = rng.integers(0, 2**64, 40, dtype=np.uint64)
    hashes = rng.choice(centres, 300)
    for _ in range(distance + 2):
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, 300, dtype=np.uint64)) * rng.integers(0, 2, 300).astype(
            np.uint64
        )
    expected, kept = [], []
    for h in map(int, hashes):
        expected.append(any((h ^ k).bit_count() <= distance for k in kept))
        if not expected[-1]:
            kept.append(h)
    assert near_duplicates(hashes, distance).tolist() == expected
    assert any(expected)


def test_duplicates_are_dropped(tmp_path, caplog):
    caplog.set_level("INFO")
    images = [photo(0), photo(0), photo(0, 60), photo(1), photo(2)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"{i}"}) for i in range(5)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(tmp_path)
    assert kept(select(source, {"duplicates": "exact"})) == [0, 2, 3, 4]
    assert kept(select(source, {"duplicates": "near", "duplicate_bits": 4})) == [0, 3, 4]
    assert "duplicates 2" in caplog.text


def saved(folder, images):
    """A captioned folder of these images; None stands for a file that cannot be read."""
    for i, image in enumerate(images):
        (folder / f"{i}.png").write_bytes(b"no image") if image is None else image.save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"{i}"}) for i in range(len(images))]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return open_source(folder)


def test_plain_images_are_near_duplicates_and_unreadable_ones_are_not(tmp_path):
    """Their hash is 0, which once meant that a file could not be read."""
    darker = Image.fromarray(np.tile(np.arange(90, 0, -1, dtype=np.uint8), (80, 1)))
    plain = Image.new("RGB", (32, 32), (200, 30, 30))
    source = saved(tmp_path, [plain, None, plain.resize((64, 64)), photo(1), None, darker, darker.resize((45, 40))])
    found = scan(source, hashes="near")
    assert found["hash"][[0, 5]].tolist() == [0, 0]
    assert found["hashed"].tolist() == [i not in (1, 4) for i in range(7)]
    assert kept(select(source, {"duplicates": "near"})) == [0, 1, 3, 4]
    assert scan(source, hashes="exact")["hashed"].all()  # their bytes can be


@pytest.mark.parametrize("colour", ["white", "black", "#7f7f7f", "#ff8000"])
def test_transparent_drawings_are_told_by_what_shows(colour):
    """Two drawings of one colour differ; one drawing with any colours under its transparent pixels is the same."""
    shapes = np.asarray([[np.asarray(photo(i).convert("L")) > 128] for i in range(2)])[:, 0]
    first, second = (Image.new("RGB", (96, 96), colour) for _ in range(2))
    for image, shape in zip((first, second), shapes, strict=True):
        image.putalpha(Image.fromarray(np.uint8(255 * shape)))
    assert (dhash(first) ^ dhash(second)).bit_count() >= 12
    hidden = np.asarray(first).copy()
    hidden[~shapes[0], :3] = np.random.default_rng(0).integers(0, 256, (int((~shapes[0]).sum()), 3))
    assert dhash(Image.fromarray(hidden)) == dhash(first)
    opaque = photo(3)
    opaque.putalpha(255)
    assert (dhash(opaque) ^ dhash(photo(3))).bit_count() <= 1  # but for rounding


def test_a_scan_is_kept_and_divided(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(filters, "PART", 4)
    source = open_source(write_folder(tmp_path / "d", 11))
    alone = scan(source, sizes=True, columns=("score",), hashes="near")
    looked, look = [], filters._scan_example
    monkeypatch.setattr(filters, "_scan_example", lambda *a: looked.append(a[1]) or look(*a))

    def of(host):
        kwargs = {"cache": tmp_path / "cache", "host_index": host, "host_count": 2}
        return scan(source, sizes=True, columns=("score",), hashes="near", **kwargs)

    with ThreadPoolExecutor(2) as pool:
        for found in [*pool.map(of, range(2)), of(0)]:
            assert found.keys() == alone.keys()
            for name in alone:
                np.testing.assert_array_equal(found[name], alone[name])
    assert sorted(looked) == list(range(11))


def test_sizes_are_upright_and_may_come_from_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "0.jpg", exif=exif)
    lines = [{"file_name": "0.jpg", "text": "a"}, {"file_name": "gone.jpg", "text": "b", "width": 7, "height": 9}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = scan(open_source(tmp_path), sizes=True)
    assert found["width"].tolist() == [20, 7]
    assert found["height"].tolist() == [30, 9]
