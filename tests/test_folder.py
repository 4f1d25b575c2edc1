"""Captioned folders: what is read, in which order, by whom, and what happens to bad files."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from jaxdiff.config import ConfigError
from jaxdiff.data.captioned import captioned_data, open_source
from jaxdiff.data.folder import BACKGROUNDS, ImageDecoder, Warp, examples

SIZE = 8  # pixels of the images drawn here


def write(path, lines, split="train"):
    (path / split).mkdir(parents=True, exist_ok=True)
    (path / split / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return path


def numbered(path, count, bad=()):
    """Images that are `count` shades of grey, captioned by their numbers; those in `bad` are cut off."""
    write(path, [{"file_name": f"{i}.png", "text": [f"{i}", f"number {i}"]} for i in range(count)])
    for i in range(count):
        file = path / "train" / f"{i}.png"
        Image.new("RGB", (SIZE, SIZE), (i, i, i)).save(file)
        if i in bad:
            file.write_bytes(file.read_bytes()[:-30])
    return path


def single(path, image, text="a cat", **save):
    write(path, [{"file_name": "a.png", "text": text}])
    image.save(path / "train" / "a.png", **save)
    return path


def numbers(batch):
    """Which of the numbered images a batch holds; image and caption must belong together."""
    shades = batch["image"][:, 0, 0, 0].tolist()
    assert [t.removeprefix("number ") for t in batch["text"]] == [str(s) for s in shades]
    return shades


def stream(path, batches, batch_size=4, image_size=SIZE, seed=0, **kwargs):
    data = captioned_data(path, batch_size, image_size, seed=seed, **kwargs)
    return [n for batch in itertools.islice(data, batches) for n in numbers(batch)]


def same(a, b):
    return a["text"] == b["text"] and np.array_equal(a["image"], b["image"])


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    return numbered(tmp_path_factory.mktemp("twelve"), 12)


# Order, hosts, resuming


def test_batches(twelve):
    data = captioned_data(str(twelve), 4, SIZE, seed=0)
    batch = next(iter(data))
    assert batch["image"].shape == (4, SIZE, SIZE, 3)
    assert batch["image"].dtype == np.uint8
    assert isinstance(batch["text"], list)
    assert (data.size, data.skipped.count) == (12, 0)


def test_every_epoch_is_another_order_of_everything(twelve):
    epochs = np.reshape(stream(twelve, 12), (4, 12)).tolist()
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream(twelve, 6, shuffle=False) == 2 * list(range(12))


def test_seed_decides(twelve):
    assert stream(twelve, 6, seed=3) == stream(twelve, 6, seed=3)
    # Unlike a seed that the epoch is added to: the second epoch of seed 0 is not the first of seed 1.
    assert stream(twelve, 6, seed=0)[12:] != stream(twelve, 3, seed=1)
    draws = [next(iter(captioned_data(twelve, 12, SIZE, seed=s, shuffle=False)))["text"] for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_all_captions_of_a_list_are_drawn(twelve):
    texts = [t for batch in itertools.islice(captioned_data(twelve, 12, SIZE, seed=0), 20) for t in batch["text"]]
    # 20 draws from two captions miss one of them for one of 12 images with probability 12 * 2**-19.
    assert set(texts) == {f"{prefix}{i}" for i in range(12) for prefix in ("", "number ")}


@pytest.mark.parametrize("hosts", [2, 3, 5])
def test_hosts_share_the_stream(twelve, hosts):
    """Whatever the number of hosts, they read one stream: disjoint, and all of it in an epoch."""
    kwargs = {"batch_size": 1, "epochs": 1}
    whole = stream(twelve, None, **kwargs)
    shares = [stream(twelve, None, host_index=h, host_count=hosts, **kwargs) for h in range(hosts)]
    assert [whole[h::hosts] for h in range(hosts)] == shares
    assert sorted(itertools.chain(*shares)) == list(range(12))


def test_remainder(twelve):
    assert len(stream(twelve, None, batch_size=5, epochs=1)) == 10
    assert sorted(stream(twelve, None, batch_size=5, epochs=1, drop_remainder=False)) == list(range(12))
    assert len(stream(twelve, None, batch_size=5, epochs=2)) == 20  # batches span epochs
    assert len(stream(twelve, 2, batch_size=30)) == 60
    with pytest.raises(ConfigError, match="batch_size 13 is more than the 12 images"):
        captioned_data(twelve, 13, SIZE, seed=0, epochs=1)


def test_resumes_exactly(tmp_path):
    """After three batches of five out of 12 images, two of them bad: in the middle of an epoch."""
    path = numbered(tmp_path, 12, bad=(2, 7))
    kwargs = {"seed": 5, "crop": 4, "flip": True}
    first = iter(captioned_data(path, 5, SIZE, **kwargs))
    for _ in range(3):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    expected = [next(first) for _ in range(6)]
    second = iter(captioned_data(path, 5, SIZE, **kwargs))
    next(second)  # so that images decoded ahead must be thrown away
    second.set_state(state)
    assert all(same(next(second), batch) for batch in expected)
    first.set_state(state)
    assert all(same(next(first), batch) for batch in expected)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_change_nothing(twelve, threads):
    assert stream(twelve, 9, threads=threads) == stream(twelve, 9)


@pytest.mark.slow
def test_worker_processes_change_nothing(tmp_path):
    """The same batches, the same count of bad images, and a state to resume from."""
    path = numbered(tmp_path, 12, bad=(2, 7))
    plain, data = (captioned_data(path, 5, SIZE, seed=1, epochs=5, workers=w, threads=1) for w in (0, 2))
    expected = list(plain)
    batches = iter(data)
    assert all(same(next(batches), batch) for batch in expected[:4])
    state = json.loads(json.dumps(batches.get_state()))
    assert all(same(batch, e) for batch, e in zip(batches, expected[4:], strict=True))
    assert (data.skipped.count, data.skipped.reasons) == (plain.skipped.count, plain.skipped.reasons)
    assert data.skipped.count == 10
    batches.set_state(state)
    assert same(next(batches), expected[4])
    batches.close()


# What an image becomes


def ramp(width, height):
    """An image whose every pixel is another colour: red counts columns, green rows."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(30, 30), (60, 30), (30, 60), (20, 20)])
def test_shorter_side_is_resized_and_the_centre_cut(tmp_path, size):
    noise = np.random.default_rng(0).integers(90, 160, (size[1], size[0], 3))  # so that nothing rings beyond 0..255
    image = Image.fromarray(noise.astype(np.uint8))
    (got,) = next(iter(captioned_data(single(tmp_path, image), 1, 15, seed=0)))["image"]
    scale = 15 / min(size)
    whole = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.LANCZOS)
    left, top = (whole.width - 15) // 2, (whole.height - 15) // 2
    expected = np.asarray(whole.crop((left, top, left + 15, top + 15)))
    # Pillow resizes rows and columns one after the other, the cheaper first, and rounds in between: by 1/2, times 1.3
    # for the weights' absolute sum, and by 1/2 at the end, for either order.
    np.testing.assert_allclose(got.astype(int), expected, atol=2)


def test_random_crops_are_windows_of_the_image(tmp_path):
    data = captioned_data(single(tmp_path, ramp(40, 20)), 64, 20, seed=0, crop=8)
    images = next(iter(data))["image"]
    corners = images[:, 0, 0].astype(int)
    window = np.asarray(ramp(8, 8)).astype(int)
    np.testing.assert_array_equal(images, window + corners[:, None, None])
    assert corners[:, 0].min() < 8  # of 0..32: 64 draws miss a quarter with probability 1e-8
    assert corners[:, 0].max() > 24
    assert corners[:, 0].max() <= 32
    assert 3 > corners[:, 1].min() < corners[:, 1].max() > 9


def test_flip_mirrors_about_half(tmp_path):
    path = single(tmp_path, ramp(SIZE, SIZE))
    images = next(iter(captioned_data(path, 64, SIZE, seed=0, flip=True)))["image"]
    mirrored = images[:, 0, 0, 0] == SIZE - 1
    assert 16 < mirrored.sum() < 48  # four standard deviations of 64 tosses are 16
    upright = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    assert (upright == np.asarray(ramp(SIZE, SIZE))).all()


def moments(image):
    """Of the dark pixels of an image: their number, their centre (x, y), and the direction of their longer axis."""
    weight = 1 - image[..., 0] / 255
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    total = weight.sum()
    x0, y0 = (weight * x).sum() / total, (weight * y).sum() / total
    xx, yy, xy = ((weight * a).sum() / total for a in ((x - x0) ** 2, (y - y0) ** 2, (x - x0) * (y - y0)))
    return total, np.array([x0, y0]), np.rad2deg(0.5 * np.arctan2(2 * xy, xx - yy)), np.sqrt([xx, yy])


@pytest.mark.parametrize("mode", ["RGBA", "RGB"])
def test_a_warp_rotates_stretches_and_shifts_by_so_much(tmp_path, mode):
    """A bar 24 by 8 pixels long in the middle of 64: what becomes of its centre, its size and its direction."""
    bar = Image.new("RGB", (64, 64), "white")
    bar.paste("black", (20, 28, 44, 36))
    if mode == "RGBA":
        bar.putalpha(Image.fromarray(255 - np.asarray(bar)[..., 0]))
    path = single(tmp_path, bar)

    def drawn(**warp):
        data = captioned_data(path, 100, 64, seed=0, background="white", warp=Warp(**warp))
        return [moments(image) for image in next(iter(data))["image"]]

    shifted = np.array([centre for _, centre, *_ in drawn(shift=0.25)]) - 32
    assert np.abs(shifted).max() < 16.1
    assert (np.abs(shifted).max(0) > 14).all()  # a hundred draws miss the last eighth at either end with p < 1e-5
    assert abs(np.corrcoef(shifted.T)[0, 1]) < 0.4
    turned = drawn(rotate=30.0)
    angles = np.array([angle for *_, angle, _ in turned])
    assert 27 < angles.max() < 30.5
    assert -27 > angles.min() > -30.5
    np.testing.assert_allclose([total for total, *_ in turned], 24 * 8, rtol=0.02)
    grown = np.array([sides for *_, sides in drawn(stretch=0.5)]) / np.array([24, 8]) * np.sqrt(12)
    assert (grown.max(0) < 1.53).all()
    assert (grown.max(0) > 1.4).all()
    assert (grown.min(0) < 1 / 1.4).all()
    assert abs(np.corrcoef(grown.T)[0, 1]) < 0.4


def test_a_warp_of_opaque_images_mirrors_at_the_border(tmp_path):
    images = next(iter(captioned_data(single(tmp_path, ramp(SIZE, SIZE)), 64, SIZE, seed=0, warp=Warp(shift=0.5))))
    rows = images["image"][:, 3, :, 0].astype(int)
    assert rows.max() == SIZE - 1  # and no black or white came in
    assert (np.abs(np.diff(rows)) <= 1).all()


def test_a_hint_is_warped_as_its_image_is(tmp_path):
    path = write(tmp_path, [{"file_name": "a.png", "text": "x", "conditioning_file": "hint.png"}])
    for name in ("a.png", "hint.png"):
        ramp(16, 16).save(path / "train" / name)
    warp = Warp(20.0, 0.2, 0.2)
    decode = ImageDecoder(open_source(path), 16, warp=warp)
    for seed in range(5):
        found = decode(0, np.random.default_rng(seed))
        np.testing.assert_array_equal(found["hint"], found["image"])
    still = ImageDecoder(open_source(path), 16)(0, np.random.default_rng(0))
    assert not np.array_equal(still["image"], found["image"])


def test_a_strip_does_not_fill_the_memory(tmp_path):
    strip = Image.new("RGB", (20_000, 1), "red")  # resized whole: 512 x 10 million pixels
    assert next(iter(captioned_data(single(tmp_path, strip), 1, 512, seed=0)))["image"].shape == (1, 512, 512, 3)


def test_backgrounds_are_drawn_and_named(tmp_path):
    image = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 255, 255, 255))
    batch = next(iter(captioned_data(single(tmp_path, image), 400, SIZE, seed=0)))
    names = []
    for picture, text in zip(batch["image"], batch["text"], strict=True):
        caption, _, background = text.partition(", on ")
        assert caption == "a cat"
        article, name, _ = background.split() if background else ("a", "white", "background")
        assert article == ("an" if name == "orange" else "a")
        assert tuple(picture[-1, -1]) == BACKGROUNDS[name]
        assert tuple(picture[0, 0]) == (0, 255, 255)
        names.append(name)
    assert set(names) == set(BACKGROUNDS)  # misses one of 11 with probability 11 * (21/22)**400 = 1e-7
    assert 160 <= names.count("white") <= 240  # four standard deviations of 400 tosses are 40
    white = next(iter(captioned_data(tmp_path, 50, SIZE, seed=0, background="white")))
    assert set(white["text"]) == {"a cat"}
    assert (white["image"][:, -1, -1] == 255).all()


def test_a_background_that_cannot_be_seen_is_unsaid(tmp_path):
    image = Image.new("RGBA", (16, 16), (9, 9, 9, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    batch = next(iter(captioned_data(single(tmp_path, image), 32, 16, seed=0)))
    assert set(batch["text"]) == {"a cat"}
    assert (batch["image"][:, 0, 0] == 255).all()


@pytest.mark.parametrize(("ink", "never", "instead"), [("black", "black", "white"), ("white", "white", "black")])
def test_subjects_do_not_vanish_on_their_background(tmp_path, ink, never, instead):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste(ink, (4, 4, 12, 12))
    batch = next(iter(captioned_data(single(tmp_path, image), 200, 16, seed=0)))
    backgrounds = {tuple(c) for c in batch["image"][:, 0, 0].tolist()}
    assert backgrounds == {rgb for name, rgb in BACKGROUNDS.items() if name != never}
    unsaid = batch["text"].count("a cat") if instead == "white" else batch["text"].count("a cat, on a black background")
    assert 72 < unsaid < 145  # (1/2 + 1/22) of 200 = 109, and five standard deviations of 7


def test_half_transparent_edges_blend_without_their_hidden_colour(tmp_path):
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))  # hidden red must not bleed in when resizing
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    batch = next(iter(captioned_data(single(tmp_path, image), 1, SIZE, seed=0, background="white")))
    red, green, blue = np.moveaxis(batch["image"][0].astype(int), -1, 0)
    assert max(np.abs(red - green).max(), np.abs(red - blue).max()) <= 1  # 8-bit rounding of premultiplied colours


# Bad files


def test_bad_images_are_skipped_counted_and_named_once(tmp_path, caplog, monkeypatch):
    path = numbered(tmp_path, 8, bad=(1,))
    train = path / "train"
    (train / "2.png").unlink()
    (train / "3.png").write_text("not a picture")
    (train / "4.png").write_bytes(b"")
    Image.new("RGB", (40, 40)).save(train / "5.png")
    Image.new("RGB", (SIZE, SIZE)).save(train / "6.png", "PPM")  # Pillow reads it, but it is not among FORMATS
    monkeypatch.setattr("jaxdiff.data.images.MAX_PIXELS", 39 * 40)
    data = captioned_data(path, 1, SIZE, seed=0, epochs=3)
    seen = [n for batch in data for n in numbers(batch)]
    assert sorted(seen) == [0, 0, 0, 7, 7, 7]
    assert data.skipped.count == 18
    assert sorted(data.skipped.reasons) == [str(train / f"{i}.png") for i in range(1, 7)]
    assert "40x40 pixels" in data.skipped.reasons[str(train / "5.png")]
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 6
    assert all(any(f"{i}.png" in m for m in messages) for i in range(1, 7))


@pytest.mark.parametrize("epochs", [1, None])
def test_nothing_readable_is_an_error(tmp_path, epochs):
    data = captioned_data(numbered(tmp_path, 3, bad=range(3)), 1, SIZE, seed=0, epochs=epochs)
    with pytest.raises(ConfigError, match=r"No image of .* can be read; the last one, .*png: "):
        next(iter(data))


GOOD = '{"file_name": "0.png", "text": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (GOOD + "{", "line 2 is not JSON"),
        (GOOD + "[" * 200_000, "line 2 is not JSON"),
        (GOOD + "\n\n[1]", "line 4 is not a JSON object"),
        (GOOD + '{"text": "a"}', 'line 2 lacks "file_name"'),
        (GOOD + '{"file_name": "a"}', 'line 2 lacks "text"'),
        (GOOD + '{"file_name": 3, "text": "a"}', 'line 2: "file_name" must be'),
        (GOOD + '{"file_name": "a", "text": null}', 'line 2: "text" must be'),
        (GOOD + '{"file_name": "a", "text": []}', 'line 2: "text" must be'),
        (GOOD + '{"file_name": "a", "text": ["a", 1]}', 'line 2: "text" must be'),
        (GOOD + '{"file_name": "../x.png", "text": "a"}', "line 2: the image '../x.png' lies outside"),
        (GOOD + '{"file_name": "a/../../x", "text": "a"}', "line 2: .* lies outside"),
        (GOOD + '{"file_name": "/etc/x", "text": "a"}', "line 2: .* lies outside"),
    ],
)
def test_bad_metadata_names_the_line(tmp_path, content, message):
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        examples(tmp_path)
    assert "metadata.jsonl" in str(error.value)


def test_bytes_that_are_no_utf8_name_the_line(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(GOOD.encode() + b'{"file_name": "a", "text": "\xff"}')
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        examples(tmp_path)


def test_missing_folders(tmp_path):
    with pytest.raises(ConfigError, match=r"folder .*nowhere does not exist"):
        examples(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no train/metadata.jsonl, no metadata.csv and no text files"):
        examples(tmp_path)
    write(tmp_path, [{"file_name": "a", "text": "b"}], "validation")
    with pytest.raises(ConfigError, match=r"has no test/metadata.jsonl; its splits are validation"):
        examples(tmp_path, "test")


def test_examples(tmp_path):
    one = {"file_name": "x/a.png", "text": "one", "source": "here"}
    write(tmp_path, [one, {"file_name": "b.png", "text": ["two", "drei, größer"]}])
    first, second = examples(tmp_path)
    assert first == (str(tmp_path / "train" / "x" / "a.png"), ("one",), {"source": "here"})
    assert second.captions == ("two", "drei, größer")
    (tmp_path / "train" / "metadata.jsonl").rename(tmp_path / "metadata.jsonl")  # no split folders
    assert [e.captions for e in examples(str(tmp_path))] == [first.captions, second.captions]
    text = (tmp_path / "metadata.jsonl").read_bytes()
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n\r\n"))  # from Windows
    assert [e.captions for e in examples(tmp_path)] == [first.captions, second.captions]


WRONG = [("batch_size", 0), ("image_size", 0), ("crop", SIZE + 1), ("crop", 0), ("background", "blue"), ("epochs", 0)]
WRONG += [("host_index", 1), ("host_count", 0), ("workers", -1), ("threads", -1), ("seed", -1), ("seed", 2**32)]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_bad_arguments_are_named(twelve, name, value):
    with pytest.raises(ConfigError, match=f"{name} must be"):
        captioned_data(twelve, **{"batch_size": 2, "image_size": SIZE, "seed": 0, name: value})


def test_what_is_transparent_of_a_control_image_is_black(tmp_path):
    """As drawing has it: see `sample.input_images`."""
    layer = np.full((8, 8, 4), 255, np.uint8)
    layer[:, 4:, 3] = 0
    Image.fromarray(layer).save(tmp_path / "pose.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    line = {"file_name": "0.png", "text": "a cat", "conditioning_file": "pose.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    decode = ImageDecoder(open_source(tmp_path), 8)
    hint = decode(0, np.random.default_rng(0))["hint"]
    assert (hint[:, :4] == 255).all()
    assert not hint[:, 4:].any()
