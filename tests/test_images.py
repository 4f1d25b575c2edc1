"""Images in and out of files."""

import os
import stat
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import ImageError
from jaxdiff.io import images
from jaxdiff.io.images import fit, grid, read_image, read_metadata, strip, write_png

FLAGS = {"prompt": 'a "castle" – é', "negative_prompt": "blurry", "seed": 3, "guidance_scale": 7.5, "steps": 4}


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_png_round_trip_with_metadata(image, tmp_path):
    path = tmp_path / "a.png"
    write_png(path, image, FLAGS)
    np.testing.assert_array_equal(read_image(path), image)
    assert read_metadata(path) == FLAGS
    with Image.open(path) as opened:
        assert opened.info["parameters"] == (
            'a "castle" – é\nNegative prompt: blurry\nSeed: 3, Guidance scale: 7.5, Steps: 4'
        )


def test_png_of_floats_rounds(tmp_path):
    write_png(tmp_path / "a.png", np.full((2, 2, 3), 0.301, np.float32))
    assert (read_image(tmp_path / "a.png") == 77).all()  # 76.755


def png(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, with the right checksums."""
    found = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        found += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return found


@pytest.mark.parametrize(
    ("side", "chunk"),
    [
        (60_000, (b"tEXt", b"jaxdiff\0{}")),  # more pixels than Pillow opens
        (6, (b"zTXt", b"jaxdiff\0\0" + zlib.compress(bytes(10**7)))),  # a text that unpacks to more than it reads
        (6, (b"tEXt", b"jaxdiff\0" + b"[" * 100_000)),  # nested deeper than Python's recursion limit
    ],
)
def test_metadata_of_a_hostile_png_is_refused_in_a_sentence(side, chunk, tmp_path):
    (tmp_path / "a.png").write_bytes(png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), chunk))
    with pytest.raises(ImageError, match=r"a\.png (cannot be read as an image|does not say how it was drawn)"):
        read_metadata(tmp_path / "a.png")


def test_metadata_takes_undecodable_bytes_of_a_command_line(image, tmp_path):
    flags = {"prompt": os.fsdecode(b"caf\xe9"), "seed": 0}
    write_png(tmp_path / "a.png", image, flags)
    assert read_metadata(tmp_path / "a.png") == flags


def test_metadata_of_a_sheet_lists_every_image(image, tmp_path):
    write_png(tmp_path / "a.png", image, [FLAGS, FLAGS | {"seed": 4}])
    assert [flags["seed"] for flags in read_metadata(tmp_path / "a.png")] == [3, 4]


def test_written_files_follow_the_umask(image, tmp_path):
    write_png(tmp_path / "a.png", image)
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(image, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_png(path, image)
    before = path.read_bytes()

    def full(self, file, **kwargs):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ImageError, match=r"a\.png cannot be written \(No space left on device\)"):
        write_png(path, 255 - image)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_write_into_a_missing_folder_is_one_sentence(image, tmp_path):
    with pytest.raises(ImageError, match=r"none/a\.png cannot be written"):
        write_png(tmp_path / "none" / "a.png", image)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),  # transparent: the white background shows
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # a fifth of black over white
        ("LA", (0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(mode, value, expected, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (3, 2), value).save(path)
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.broadcast_to(expected, (2, 3, 3)))


def test_transparent_palette_and_chosen_background(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "a.png", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (0, 0, 255))[0], [[255, 0, 0], [0, 0, 255]])


@pytest.mark.parametrize(("level", "expected"), [(0, 0), (257 * 100, 100), (65535, 255)])
def test_sixteen_bits_are_scaled_not_clipped(level, expected, tmp_path):
    Image.fromarray(np.full((2, 3), level, np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.full((2, 3, 3), expected))


def test_float_images_are_in_zero_to_one(tmp_path):
    Image.fromarray(np.array([[0.0, 0.2, 1.0]], np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[0, :, 0], [0, 51, 255])


def test_camera_orientation_is_applied(image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(image, -1))


def test_unreadable_images_are_named(image, tmp_path):
    with pytest.raises(ImageError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="cannot be read as an image"):
        read_image(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"text\.png cannot be read as an image"):
        read_image(tmp_path / "text.png")
    write_png(tmp_path / "whole.png", np.tile(image, (20, 20, 1)))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    with pytest.raises(ImageError, match=r"cut\.png cannot be read as an image"):
        read_image(tmp_path / "cut.png")


def test_images_that_would_fill_the_memory_are_not_decoded(image, tmp_path, monkeypatch):
    write_png(tmp_path / "a.png", image)
    monkeypatch.setattr("jaxdiff.data.images.MAX_PIXELS", image.shape[0] * image.shape[1] - 1)
    with pytest.raises(ImageError, match=r"a\.png cannot be read as an image \(\d+x\d+ pixels are more than"):
        read_image(tmp_path / "a.png")


def test_metadata_that_is_not_there(image, tmp_path):
    write_png(tmp_path / "a.png", image)
    with pytest.raises(ImageError, match=r"a\.png does not say how it was drawn"):
        read_metadata(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"b\.png cannot be read"):
        read_metadata(tmp_path / "b.png")


def test_grid_places_images_row_by_row():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    sheet = grid(pictures, columns=3, gap=1, background=(9, 9, 9))
    assert sheet.shape == (5, 11, 3)
    np.testing.assert_array_equal(
        sheet[:, :, 0][[0, 2, 4]][:, [0, 3, 4, 8, 10]], [[0, 9, 1, 2, 2], [9] * 5, [3, 9, 4, 9, 9]]
    )
    np.testing.assert_array_equal(grid(pictures[:4], columns=2, gap=0)[2:, 3:], pictures[3])


def test_strip_is_one_row(image):
    frames = np.stack([image, 255 - image])
    np.testing.assert_array_equal(strip(frames, gap=0), np.concatenate([image, 255 - image], 1))


def test_fit_cuts_at_the_centre_and_keeps_proportions():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 8:32] = 200  # the central square and the filter's reach around it
    assert fit(wide, 10, 40) is wide
    np.testing.assert_array_equal(fit(wide, 5, 5), np.full((5, 5, 3), 200))
    assert fit(wide, 32, 48).shape == (32, 48, 3)


def test_to_uint8_rounds_to_nearest():
    np.testing.assert_array_equal(images.to_uint8(np.array([0.0, 0.49 / 255, 0.51 / 255, 1.0])), [0, 0, 1, 255])
