"""Input that nobody wants: each case is handled, or ends in one sentence."""

import io
import json
import random
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

import jaxdiff
from jaxdiff.data.images import open_image
from jaxdiff.errors import ImageError, WeightsError
from jaxdiff.io.images import fit, read_image, read_metadata
from tests.support.tiny import SIDE

PNG = b"\x89PNG\r\n\x1a\n"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    width: int, height: int, depth: int, colour_type: int, rows: bytes, *extra: bytes, interlaced: bool = False
) -> bytes:
    """A PNG file byte by byte: Pillow writes no 16-bit colours."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced))
    return PNG + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(tmp_path, data: bytes) -> np.ndarray:
    path = tmp_path / "picture"
    path.write_bytes(data)
    return read_image(path)


@pytest.mark.parametrize(
    ("colour_type", "values", "expected"),
    [
        (2, (65535, 257 * 100, 0), (255, 100, 0)),
        (6, (65535, 257 * 100, 0, 65535), (255, 100, 0)),
        (6, (0, 0, 0, 257 * 51), (204, 204, 204)),  # a fifth of black over white
        (4, (0, 257 * 51), (204, 204, 204)),
    ],
)
def test_sixteen_bit_colours_with_and_without_alpha(colour_type, values, expected, tmp_path):
    row = b"\0" + struct.pack(f">{len(values)}H", *values)
    np.testing.assert_array_equal(read(tmp_path, png(1, 1, 16, colour_type, row)), [[expected]])


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


# White that is transparent, white or nearly so that is not, and black: as PNG (depth, color type, row, chunks) has it.
WHITE_16, NEAR_16 = 65535, 65279
TRANSPARENT = {
    "1 bit": (1, 0, b"\x80", [chunk(b"tRNS", words(1))], (0, 0, 0)),
    "2 bits": (2, 0, b"\xe0", [chunk(b"tRNS", words(3))], (0, 170, 0)),
    "4 bits": (4, 0, b"\xfe\x00", [chunk(b"tRNS", words(15))], (0, 238, 0)),
    "8 bits": (8, 0, bytes([255, 254, 0]), [chunk(b"tRNS", words(255))], (0, 254, 0)),
    "16 bits": (16, 0, words(65535, 65534, 0), [chunk(b"tRNS", words(65535))], (0, 255, 0)),
    "RGB": (8, 2, bytes([255] * 3 + [254] * 3 + [0] * 3), [chunk(b"tRNS", words(255, 255, 255))], (0, 254, 0)),
    "RGB of 16 bits": (
        *(16, 2, words(*[WHITE_16] * 3, *[NEAR_16] * 3, *[0] * 3), [chunk(b"tRNS", words(*[WHITE_16] * 3))]),
        (0, 254, 0),
    ),
    "middle RGB of 16 bits": (
        *(16, 2, words(*[0x1234] * 3, *[NEAR_16] * 3, *[0] * 3), [chunk(b"tRNS", words(*[0x1234] * 3))]),
        (0, 254, 0),
    ),
    "low bytes of RGB of 16 bits": (
        *(16, 2, words(*[0x1234] * 3, 0x1234, 0x1234, 0x1235, 0x1134, 0x1234, 0x1234)),
        *([chunk(b"tRNS", words(*[0x1234] * 3))], (0, 0x12, [0x11, 0x12, 0x12])),
    ),
    "low bytes of 16 bits": (16, 0, words(0x1234, 0x1235, 0x1334), [chunk(b"tRNS", words(0x1234))], (0, 18, 19)),
    "more bits than 2": (2, 0, b"\xe0", [chunk(b"tRNS", words(7))], (0, 170, 0)),
    "more bits than 4": (4, 0, b"\xfe\x00", [chunk(b"tRNS", words(31))], (0, 238, 0)),
    "more bits than 8": (8, 0, bytes([255, 254, 0]), [chunk(b"tRNS", words(511))], (0, 254, 0)),
    "RGB of more bits": (
        8,
        2,
        bytes([255] * 3 + [254] * 3 + [0] * 3),
        [chunk(b"tRNS", words(*[511] * 3))],
        (0, 254, 0),
    ),
    "palette": (
        *(8, 3, bytes([0, 1, 2]), [chunk(b"PLTE", bytes([255] * 6 + [0] * 3)), chunk(b"tRNS", b"\0\xff\xff")]),
        (0, 255, 0),
    ),
    "palette of 2 bits": (
        *(2, 3, b"\x18", [chunk(b"PLTE", bytes([255] * 6 + [0] * 3)), chunk(b"tRNS", b"\0")]),
        (0, 255, 0),
    ),
    "LA": (8, 4, bytes([255, 0, 255, 255, 0, 255]), [], (0, 255, 0)),
    "LA of 16 bits": (16, 4, words(65535, 0, 65535, 65535, 0, 65535), [], (0, 255, 0)),
    "RGBA": (8, 6, bytes([255] * 3 + [0] + [255] * 4 + [0] * 3 + [255]), [], (0, 255, 0)),
    "RGBA of 16 bits": (16, 6, words(*[65535] * 3, 0, *[65535] * 4, *[0] * 3, 65535), [], (0, 255, 0)),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_every_kind_of_transparency(kind, tmp_path):
    depth, colour_type, row, chunks, expected = TRANSPARENT[kind]
    (tmp_path / "a.png").write_bytes(png(3, 1, depth, colour_type, b"\0" + row, *chunks))
    got = read_image(tmp_path / "a.png", (0, 0, 0))[0].tolist()
    assert got == [grey if isinstance(grey, list) else [grey] * 3 for grey in expected]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_color_of_sixteen_bits_is_transparent_where_it_is_exactly_the_files(
    channels, interlaced, orientation, tmp_path
):
    """Every filter of rows, colors that differ in either byte, images that are stored turned or interlaced."""
    values = (
        np.random.default_rng(0)
        .choice([0x1234, 0x1235, 0x1334], (10, 9, channels), p=[0.8, 0.1, 0.1])
        .astype(np.uint16)
    )
    rows = b"".join(filtered(part, i) for i, part in enumerate(adam7(values) if interlaced else [values]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    extra = [chunk(b"eXIf", exif.tobytes()[6:]), chunk(b"tRNS", words(*[0x1234] * channels))]
    data = png(9, 10, 16, {1: 0, 3: 2}[channels], rows, *extra, interlaced=interlaced)
    opaque = (values != 0x1234).any(-1)
    upright = np.rot90(opaque, -1) if orientation == 6 else opaque
    for file in data, tmp_path / "a.png":
        (tmp_path / "a.png").write_bytes(data)
        np.testing.assert_array_equal(np.asarray(open_image(file))[..., 3], np.where(upright, 255, 0))


def adam7(values: np.ndarray) -> list[np.ndarray]:
    """The passes of an interlaced PNG (PNG specification, 8.2)."""
    starts = (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)
    return [part for y, x, dy, dx in starts if (part := values[y::dy, x::dx]).size]


def filtered(values: np.ndarray, first: int) -> bytes:
    """Rows of 16 bits as PNG keeps them, each by another of the filters none, sub and up (9.2)."""
    raw = np.ascontiguousarray(values.astype(">u2")).view(np.uint8).reshape(len(values), -1)
    above, pixel = np.vstack([np.zeros_like(raw[:1]), raw[:-1]]), 2 * values.shape[-1]
    left = np.hstack([np.zeros_like(raw[:, :pixel]), raw[:, :-pixel]])
    kinds = [(first + i) % 3 for i in range(len(raw))]
    return b"".join(
        bytes([kind]) + (raw[i] - [0 * raw, left, above][kind][i]).tobytes() for i, kind in enumerate(kinds)
    )


def test_cmyk_photograph(tmp_path):
    """Adobe's JPEG files hold inverted inks; a wrong reading gives the complementary colour."""
    image = read(tmp_path, encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(image.astype(int) - [255, 0, 0]).max() <= 3  # what JPEG loses


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: a.swapaxes(0, 1)[:, ::-1]),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: a.swapaxes(0, 1)[::-1]),
        (9, lambda a: a),  # there is no ninth
    ],
)
def test_every_camera_orientation(kind, orientation, upright, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(pixels), kind, exif=exif, **options)
    np.testing.assert_array_equal(read(tmp_path, data), upright(pixels))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.1, 255, -0.1])
def test_greys_that_are_no_numbers_or_no_greys_are_named(bad, tmp_path):
    data = encoded(Image.fromarray(np.array([[0.5, bad]], np.float32)), "TIFF")
    with pytest.raises(ImageError, match=r"picture cannot be read as an image \(its values are float32 from .* 0 to 1"):
        read(tmp_path, data)


def test_formats_that_start_programs_are_not_opened(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript; bytes decide what a file is, whatever it is called."""

    def started(*args, **kwargs):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    postscript = encoded(Image.new("RGB", (4, 4)), "EPS")
    with pytest.raises(ImageError, match=r"picture cannot be read as an image \(cannot identify image file"):
        read(tmp_path, postscript)
    with pytest.raises(ImageError, match=r"cannot be read as an image .* give a PNG as sample\.py wrote it"):
        read_metadata(tmp_path / "picture")


def test_a_file_that_would_unpack_to_gigabytes_is_refused(tmp_path):
    with pytest.raises(ImageError, match=r"picture cannot be read as an image \(Image size \(3600000000 pixels\)"):
        read(tmp_path, png(60000, 60000, 8, 2, b"\0"))


@pytest.mark.parametrize("tag", [0x013D, 0x011B])  # a number, and a fraction, given as text
def test_exif_of_wrong_types_is_one_sentence(tag, tmp_path):
    text = struct.pack(">HHII", tag, 2, 6, 38)
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"MM\0*" + struct.pack(">IH", 8, 2) + min(text, turned) + max(text, turned) + bytes(4) + b"hel\xafo\0"
    with pytest.raises(ImageError, match="cannot be read as an image"):
        read(tmp_path, png(1, 1, 8, 2, b"\0abc", chunk(b"eXIf", exif)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged EXIF and TIFF tags and reads on
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF"])
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    """Random bytes anywhere near the head, where sizes, types and EXIF stand; checksums made right in half the PNGs."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hello"
    options = {} if kind == "GIF" else {"exif": exif}
    whole = encoded(Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)), kind, **options)
    rng, read_on = random.Random(0), 0
    for n in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        if kind == "PNG" and n % 2:
            data = mended(data)
        try:
            image = read(tmp_path, bytes(data))
        except ImageError:  # no other error gets out
            continue
        read_on += 1
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
    assert 0 < read_on < 400


def mended(data: bytearray) -> bytearray:
    """A PNG with right checksums, as far as its chunks can be followed."""
    at = len(PNG)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return data


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (2, 5000), (3, 2)])
@pytest.mark.parametrize("size", [(1, 1), (128, 128), (8, 512)])
def test_images_of_any_shape_fit(shape, size):
    np.testing.assert_array_equal(fit(np.full((*shape, 3), 77, np.uint8), *size), np.full((*size, 3), 77))


def test_one_pixel_is_enough_to_start_from(tiny, tmp_path):
    dot = read(tmp_path, png(1, 1, 8, 2, b"\0" + bytes([200, 30, 90])))
    assert dot.shape == (1, 1, 3)
    drawn = jaxdiff.generate(*tiny, "a castle", image=fit(dot, SIDE, SIDE), strength=0.5, steps=2)
    assert drawn.shape == (1, SIDE, SIDE, 3)
    with pytest.raises(ValueError, match=rf"image has shape \[1, 1, 3\], but the output is \[{SIDE}, {SIDE}, 3\]"):
        jaxdiff.generate(*tiny, "a castle", image=dot, steps=2)


@pytest.mark.parametrize("shape", [(SIDE, SIDE, 4), (SIDE, SIDE, 1), (SIDE, SIDE), (SIDE, 3)])
def test_arrays_that_are_no_rgb_images_are_named(tiny, shape):
    with pytest.raises(ValueError, match=r"image has shape \[[\d, ]+\], but the output is"):
        jaxdiff.generate(*tiny, "a castle", image=np.zeros(shape, np.uint8), steps=2)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (np.full((SIDE, SIDE, 3), 40000, np.uint16), "uint16 from 40000 to 40000"),
        (np.full((SIDE, SIDE, 3), 128.0, np.float32), "float32 from 128 to 128"),
        (np.full((SIDE, SIDE, 3), -1.0), "float64 from -1 to -1"),
        (np.full((SIDE, SIDE, 3), np.nan), "float64 from nan to nan"),
    ],
)
def test_arrays_that_are_not_in_zero_to_one_are_named(tiny, image, complaint):
    with pytest.raises(ValueError, match=rf"image is {complaint}: give uint8 from 0 to 255, or numbers from 0 to 1"):
        jaxdiff.generate(*tiny, "a castle", image=image, steps=2)


@pytest.mark.parametrize(
    ("mask", "complaint"),
    [
        (np.full((SIDE, SIDE), np.nan), "float64 from nan to nan: give uint8"),
        (np.full((SIDE, SIDE), 255.0), "float64 from 255 to 255: give uint8"),
        (np.full((SIDE, SIDE), 1, np.uint8), "uint8 and nowhere above 1: white is 255"),
    ],
)
def test_masks_that_are_not_black_to_white_are_named(tiny, mask, complaint):
    with pytest.raises(ValueError, match=rf"mask is {complaint}"):
        jaxdiff.generate(*tiny, "a castle", image=np.zeros((SIDE, SIDE, 3)), mask=mask, steps=2)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_weights_cut_off_anywhere_are_named(folder):
    path = folder / WEIGHTS
    whole = path.read_bytes()
    for part in (*np.linspace(0, 0.999, 25), 1 - 1 / len(whole)):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(
            WeightsError, match=rf"{WEIGHTS} is damaged or not a safetensors file \(.*\): fetch it again"
        ):
            jaxdiff.load(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b'{"conv_in.weight": 7}',
        b'{"conv_in.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 9999999999999]}}',
        b'{"conv_in.weight": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}',
        b'{"conv_in.weight": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 16]}}',
        b'{"conv_in.weight": {"dtype": "X7", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": ' * 100_000,
        json.dumps({"__metadata__": {"a": 3}}).encode(),
        b"\xff" * 64,
    ],
)
def test_lying_headers_of_weights_are_named(header, folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(WeightsError, match=rf"{WEIGHTS} is damaged or not a safetensors file"):
        jaxdiff.load(folder)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9])
def test_a_header_longer_than_the_file_allocates_nothing(length, folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(WeightsError, match=rf"{WEIGHTS} is damaged or not a safetensors file"):
        jaxdiff.load(folder)


@pytest.mark.slow
def test_emoji_and_other_scripts_are_prompts(tiny):
    prompts = ["🎉👩‍👩‍👧🏰", "城の絵", "قلعة", "\u202e\u0000\ufeff", "a\udcffb", "((((", ""]
    drawn = jaxdiff.generate(*tiny, prompts, steps=1, seed=[0] * len(prompts))
    assert drawn.shape == (len(prompts), SIDE, SIDE, 3)
    assert (drawn[0] != drawn[1]).any()  # both are read, not dropped


def test_ten_thousand_words_are_cut_with_a_warning(tiny, caplog):
    words = " ".join(f"castle{i}" for i in range(10_000))
    long = jaxdiff.generate(*tiny, words, steps=1)
    assert long.shape == (1, SIDE, SIDE, 3)
    (record,) = caplog.records
    assert len(record.getMessage()) < 2_000  # shows what was cut, not all of it
    np.testing.assert_array_equal(jaxdiff.generate(*tiny, words + " and a dog", steps=1), long)
