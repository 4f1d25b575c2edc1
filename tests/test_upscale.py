"""Enlarging: any size in tiles without seams, any scale, opacity, files and images as they are drawn."""

import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff import parallel
from jaxdiff.config.upscaler import RRDBConfig
from jaxdiff.errors import ArgumentError
from jaxdiff.io.images import image_size, read_metadata
from jaxdiff.io.upscaler import save_upscaler
from jaxdiff.models.rrdb import RRDBNet
from jaxdiff.sampling import upscale as upscaling
from jaxdiff.sampling.resolve import resolve_settings
from tests.support import tiny
from tests.support.commands import CASTLE, STEPS


@pytest.fixture(scope="module")
def network():
    return tiny.tiny_upscaler()


@pytest.fixture(scope="module")
def network_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("upscaler") / "net.safetensors"
    save_upscaler(path, network[1])
    return path


def picture(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"unshuffle": 2}], ids=["x4", "x2"])
def test_tiles_make_the_image_of_the_whole(sizes):
    """The margin is as wide as this network sees, so that nothing but rounding may differ, seams least of all."""
    module, params = tiny.tiny_upscaler(**sizes)
    assert sizes or module.config.reach <= upscaling.MARGIN
    image = picture(97, 83)
    whole = jaxdiff.upscale(module, params, image, tile=128)
    tiled = jaxdiff.upscale(module, params, image, tile=16)
    assert tiled.shape == whole.shape == (97 * module.config.scale, 83 * module.config.scale, 3)
    assert whole.std() > 5
    assert np.abs(tiled.astype(int) - whole).max() <= 1


def test_windows_cover_a_side_once_with_their_margins():
    for size in (1, 59, 60, 61, 100, 333, 512):
        found = upscaling.windows(size, 40, 10, 1)
        kept = [i for *_, first, last in found for i in range(first, last)]
        assert kept == list(range(size))
        assert len({end - start for start, end, _, _ in found}) == 1
        for start, end, first, last in found:
            assert first - start >= 10 or start == 0
            assert end - last >= 10 or end == size


def test_a_batch_is_its_images_and_floats_are_bytes(network):
    module, params = network
    images = np.stack([picture(6, 5), picture(6, 5, seed=1)])
    found = jaxdiff.upscale(module, params, images)
    assert found.shape == (2, 24, 20, 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[1], jaxdiff.upscale(module, params, images[1] / 255.0))


def test_other_scales_are_the_networks_image_resized(network):
    module, params = network
    image = picture(6, 5)
    own = Image.fromarray(jaxdiff.upscale(module, params, image))
    for scale, size in ((2, (10, 12)), (3.5, (18, 21)), (1, (5, 6))):
        found = jaxdiff.upscale(module, params, image, scale=scale)
        np.testing.assert_array_equal(found, np.asarray(own.resize(size, Image.Resampling.LANCZOS)))
    assert jaxdiff.upscale(module, params, image, scale=8).shape == (48, 40, 3)  # twice through the network


def test_opacity_is_enlarged_and_what_it_hides_does_not_show(network, monkeypatch):
    """A red disc on transparent black: no pixel that shows at all becomes darker than the disc."""

    def nearest(module, params, images):  # in place of a network that learnt nothing
        return np.asarray(images).repeat(4, 1).repeat(4, 2)

    y, x = np.mgrid[:16, :16]
    disc = (y - 8) ** 2 + (x - 8) ** 2 < 25
    image = np.where(disc[..., None], np.uint8([250, 20, 20, 255]), np.uint8([0, 0, 0, 0]))
    monkeypatch.setattr(upscaling, "network", nearest)
    found = jaxdiff.upscale(*network, image, scale=3)
    assert found.shape == (48, 48, 4)
    shown = found[..., 3] > 0
    assert 0.9 < found[..., 3].mean() / image[..., 3].mean() < 1.1
    assert len(np.unique(found[..., 3])) > 2
    assert found[shown][:, 0].min() > 240
    opaque = jaxdiff.upscale(*network, np.dstack([image[..., :3], np.full((16, 16), 255, np.uint8)]))
    assert (opaque[..., 3] == 255).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scale": 0.5}, "scale 0.5 must be from 1 to 16"),
        ({"scale": 17}, "scale 17 must be from 1 to 16"),
        ({"scale": float("nan")}, "scale nan must be"),
        ({"tile": 8}, "tile 8"),
        ({"images": np.zeros((4, 4))}, r"images has shape \[4, 4\]"),
        ({"images": np.full((4, 4, 3), 2.0)}, "images is float64"),
    ],
)
def test_wrong_arguments_are_named(network, arguments, said):
    with pytest.raises(ArgumentError, match=said):
        jaxdiff.upscale(*network, **{"images": picture(4, 4), **arguments})


def test_what_memory_has_no_room_for_is_refused(network, monkeypatch):
    with pytest.raises(ArgumentError, match=r"scale 2 makes 200000 x 200000 pixels .* GiB"):
        upscaling.check_upscale(network[0], 100_000, 100_000, 2)
    monkeypatch.setattr(parallel, "host_memory", lambda: 2.0**29)
    with pytest.raises(ArgumentError, match="give a smaller one"):
        upscaling.check_upscale(network[0], 4096, 4096, 4)


def test_a_network_of_scale_one_mends_only():
    module = RRDBNet(RRDBConfig(1, 8, 4, unshuffle=4))
    upscaling.check_upscale(module, 8, 8, 1)
    with pytest.raises(ArgumentError, match="scale 4 is too large for this network"):
        upscaling.check_upscale(module, 8, 8, 4)


def test_hires_by_a_network_needs_one(network):
    model = tiny.tiny_model()
    with pytest.raises(ArgumentError, match="hires_upscale network needs a model with an upscaler that enlarges"):
        resolve_settings(model, hires=2, hires_upscale="network")
    model, params = jaxdiff.with_upscaler(model, {}, network)
    assert params["upscaler"] is network[1]
    assert resolve_settings(model, hires=2, hires_upscale="network").hires_upscale == "network"


# --- sample.py


def test_a_file_is_enlarged_without_a_model(sample_cli, network, network_file, tmp_path):
    image = picture(6, 5, 4)
    Image.fromarray(image).save(tmp_path / "small.png")
    more = ("--upscale=4", f"--upscaler={network_file}")
    args = ("--image=small.png", *more)
    code, out, err = sample_cli(*args, model=None)
    assert (code, out) == (0, ["outputs/small-x4.png"]), err
    found = np.asarray(Image.open(out[0]))
    np.testing.assert_array_equal(found, jaxdiff.upscale(*network, image))
    assert read_metadata(out[0]) == {"image": "small.png", "upscale": 4.0, "upscaler": str(network_file)}
    code, again, err = sample_cli("--from_png=outputs/small-x4.png", "--output=again.png", model=None)
    assert code == 0, err
    np.testing.assert_array_equal(np.asarray(Image.open(again[0])), found)
    code, out, err = sample_cli(*args, model=None)  # nothing is overwritten
    assert (code, out) == (0, ["outputs/small-x4-2.png"])
    assert "exists" in err


def test_a_folder_of_images_of_several_kinds(sample_cli, network_file, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    turned = Image.fromarray(picture(6, 5))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(folder / "a.jpg", exif=exif)
    Image.fromarray(picture(6, 5)).convert("P").save(folder / "a.gif")
    Image.fromarray(picture(6, 5)[..., 0]).save(folder / "b.png")
    (folder / "notes.txt").write_text("none")
    code, out, err = sample_cli("--image=many", "--upscale=2", f"--upscaler={network_file}", "--output=o", model=None)
    assert code == 0, err
    assert out == ["o/a-x2-000.png", "o/a-x2-001.png", "o/b-x2.png"]
    assert [image_size(path) for path in out] == [(12, 10), (10, 12), (12, 10)]
    code, out, err = sample_cli("--image=many", "--upscale=2", f"--upscaler={network_file}",
                                "--output=o/{index}-{name}.png", model=None)  # fmt: skip
    assert out == ["o/0-a.png", "o/1-a.png", "o/2-b.png"], err


@pytest.mark.parametrize("part", [0, 0.5])
def test_an_image_that_cannot_be_enlarged_names_its_flag(part, sample_cli, network_file, tmp_path):
    Image.fromarray(picture(60, 50)).save(tmp_path / "small.png")
    whole = (tmp_path / "small.png").read_bytes()
    (tmp_path / "small.png").write_bytes(whole[: int(part * len(whole))])
    code, out, err = sample_cli("--image=small.png", "--upscale=2", f"--upscaler={network_file}", model=None)
    assert (code, out) == (2, [])
    assert "sample.py: error: --image: small.png cannot be read as an image" in err


def test_what_is_drawn_is_enlarged(sample_cli, network, network_file):
    code, out, err = sample_cli(CASTLE, STEPS, "--output=small.png")
    assert code == 0, err
    code, out, err = sample_cli(CASTLE, STEPS, "--output=large.png", "--upscale=4", f"--upscaler={network_file}",
                                "--grid")  # fmt: skip
    assert (code, out) == (0, ["large.png", "large-grid.png"]), err
    small, large = (np.asarray(Image.open(f"{name}.png")) for name in ("small", "large"))
    np.testing.assert_array_equal(large, jaxdiff.upscale(*network, small))
    kept = read_metadata("large.png")
    assert kept["upscale"] == 4
    assert kept["prompt"] == "a castle"


@pytest.mark.slow
def test_a_preview_shows_every_layer(sample_cli, network_file):
    """Small image, enlarged and refined, enlarged by the network: each at its own size, and as an animation."""
    cascade = (CASTLE, STEPS, "--hires=2", "--upscale=2", f"--upscaler={network_file}", "--output=a.png")
    code, out, err = sample_cli(*cascade, "--preview", "--preview_animation")
    assert (code, out) == (0, ["a.png", "a-preview.png", "a-preview.webp"]), err
    sheet, image = (np.asarray(Image.open(name)).astype(int) for name in out[:2][::-1])
    side = tiny.SIDE
    assert image.shape == (2 * side, 2 * side, 3)
    assert sheet.shape == (side // 2 + 2 + side + 2 + 2 * side, 2 * side + 2, 3)
    np.testing.assert_array_equal(sheet[-2 * side :, : 2 * side], image)
    small = sheet[: side // 2, 2 * (side // 2 + 2) :][:, : side // 2]  # the last of three steps
    enlarged, refined = (sheet[side // 2 + 2 :][:side, i * (side + 2) :][:, :side] for i in (0, 1))
    assert np.abs(refined - enlarged).mean() > 1
    with Image.open(out[2]) as animation:
        assert 3 < animation.n_frames <= 3 + 1 + 1 + 1  # those that are alike become one
        assert animation.size == (2 * side, 2 * side)
        animation.seek(animation.n_frames - 1)
        shown, wanted = (np.asarray(x.convert("L")).ravel() for x in (animation, Image.open(out[0])))
        assert np.corrcoef(shown, wanted)[0, 1] > 0.9  # its colours are coarser
    # What is drawn small is what the same seed draws at that size, and nothing else changes by looking.
    code, out, err = sample_cli(CASTLE, STEPS, f"--height={side // 2}", f"--width={side // 2}", "--output=small.png")
    assert code == 0, err
    assert np.abs(np.asarray(Image.open("small.png")).astype(int) - small).max() <= 3
    code, out, err = sample_cli(*cascade, "--output=b.png")
    assert code == 0, err
    assert np.abs(np.asarray(Image.open("b.png")).astype(int) - image).max() <= 3


@pytest.mark.slow
def test_hires_by_the_network(sample_cli, network_file):
    """The network's image is another start of the second stage than a resized one, and the same each time."""
    hires = (CASTLE, STEPS, "--hires=2")
    made = {}
    for name, more in {"pixel": (), "a": ("--hires_upscale=network",), "b": ("--hires_upscale=network",)}.items():
        more = (*more, f"--upscaler={network_file}") if more else more
        code, out, err = sample_cli(*hires, *more, f"--output={name}.png")
        assert code == 0, err
        made[name] = np.asarray(Image.open(out[0])).astype(int)
    np.testing.assert_array_equal(made["a"], made["b"])
    assert made["a"].shape == made["pixel"].shape
    assert np.abs(made["a"] - made["pixel"]).mean() > 0.5


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--upscale=4",), "--upscale enlarges what --prompt draws, or an --image"),
        (("--image=small.png", "--upscale=0.5"), "upscale"),
        (("--image=small.png", "--upscale=99"), "upscale"),
        (("--image=small.png", "--upscale=4", "--preview"), "--preview is for images that are drawn"),
        (("--image=small.png", "--upscale=4", "--steps=5"), "--steps is for images that are drawn"),
        (("--image=small.png", "--upscale=4", "--grid"), "--grid is for images that are drawn"),
        (("--image=none.png", "--upscale=4"), "none.png does not exist"),
        (("--image=small.png", "--upscale=4", "--upscaler=none.pth"), "--upscaler: none.pth is neither a file"),
        (("--image=small.png", "--upscale=4", "--upscaler=other.safetensors"), "is not a network of residual"),
        (("--image=empty", "--upscale=4"), "the folder empty holds no image"),
        (("--image=small.png", "--upscale=4", "--output=x.jpg"), "images are written as PNG"),
        ((CASTLE, "--upscaler=other.safetensors"), "--upscaler goes with --upscale"),
        ((CASTLE, "--upscale_tile=64"), "--upscale_tile goes with --upscale"),
        ((CASTLE, "--preview_animation"), "--preview_animation goes with --preview"),
        ((CASTLE, "--upscale=4", "--upscaler=other.safetensors"), "--upscaler: other.safetensors is not a network"),
    ],
)
def test_flags_that_do_not_go_together(sample_cli, tiny_folder, tmp_path, args, said):
    from safetensors.numpy import save_file

    Image.fromarray(picture(6, 5)).save(tmp_path / "small.png")
    (tmp_path / "empty").mkdir()
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    code, out, err = sample_cli(*args, model=tiny_folder if CASTLE in args else None)
    assert (code, out) == (2, [])
    assert said in err
    assert not (tmp_path / "outputs").exists()
