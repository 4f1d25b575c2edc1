"""Image files of every format and mode, as 8-bit RGB or RGBA."""

import struct

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.images import open_image
from jaxdiff.errors import ImageError
from jaxdiff.io.images import read_image


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    values = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)  # 0..65520
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png"))[..., 1], np.round(values / 257))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_opaque_modes(tmp_path, mode):
    image = Image.new("RGB", (4, 4), "white")
    image.paste("black", (0, 0, 2, 4))
    image.convert(mode).save(tmp_path / "a.tiff")
    got = open_image(tmp_path / "a.tiff")
    assert got.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(got), np.asarray(image))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "RGB"])
def test_transparency_in_every_mode(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (255, 255, 255, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    key = {"P": {"transparency": 0}, "L": {"transparency": 0}, "RGB": {"transparency": (0, 0, 0)}}.get(mode, {})
    image = image.convert("L").convert("P") if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png", **key)
    got = np.asarray(open_image(tmp_path / "a.png"))
    assert got.shape == (4, 4, 4)
    assert (got[:, :2, 3] == 0).all()
    assert (got[:, 2:] == 255).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_formats(tmp_path, suffix):
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / f"a.{suffix}")
    got = open_image(tmp_path / f"a.{suffix}")
    assert (got.mode, got.size) == ("RGB", (40, 30))
    np.testing.assert_allclose(np.asarray(got).mean((0, 1)), (200, 100, 50), atol=4)  # lossy ones


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_exif_orientation(tmp_path, orientation, corner):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    got = open_image(tmp_path / "a.jpg")
    assert got.size == ((32, 16) if orientation < 5 else (16, 32))
    assert np.asarray(got)[corner].min() > 200


def test_large_jpegs_are_read_at_a_fraction(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    assert open_image(tmp_path / "a.jpg", 60).size == (160, 120)  # a quarter: still twice what is wanted
    assert open_image(tmp_path / "a.jpg", 300).size == (640, 480)


def test_floating_point_grey_is_from_zero_to_one(tmp_path):
    Image.fromarray(np.array([[0.0, 0.2, 1.0]], np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.tif"))[0, :, 1], [0, 51, 255])
    Image.fromarray(np.array([[0.0, 255.0]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="float32 from 0 to 255"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_tiffs_keep_their_range(tmp_path, order, compression):
    values = (np.arange(64, dtype=f"{order}u2") * 1040).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.tif"))[..., 1], np.round(values / 257))


def tiff(path, *, bits: int, sample_format: int, data: bytes, width: int) -> None:
    """A grey TIFF of one row, of the bits and the sample format (1 unsigned, 2 signed) that Pillow does not write."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(data)),
            (339, sample_format)]  # fmt: skip
    data += b"\0" * (len(data) % 2)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))


def test_twelve_bit_grey_keeps_its_range(tmp_path):
    tiff(tmp_path / "a.tif", bits=12, sample_format=1, data=bytes([0xFF, 0xF8, 0x00, 0x00, 0x00, 0x00]), width=4)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.tif"))[0, :, 1], [255, 128, 0, 0])


@pytest.mark.parametrize(("dtype", "sample_format"), [("<u4", 1), ("<i4", 2), ("<i2", 2)])
def test_integers_without_a_known_white_are_refused(tmp_path, dtype, sample_format):
    """Values over 65535 were clipped to white, negative ones to black."""
    data, path = np.asarray([0, 70, 20000, 32767], dtype), tmp_path / "a.tif"
    tiff(path, bits=8 * data.itemsize, sample_format=sample_format, data=data.tobytes(), width=4)
    with Image.open(path) as image:
        assert (image.mode, np.asarray(image).ravel().tolist()) == ("I", data.tolist())
    said = "its greys are integers of 32 bits or with a sign, so that it is not known which is white"
    with pytest.raises(ImageError, match=said):
        open_image(path.read_bytes())
    with pytest.raises(ImageError, match=rf"a.tif cannot be read as an image \({said}\): save it again as PNG or JPEG"):
        read_image(path)
