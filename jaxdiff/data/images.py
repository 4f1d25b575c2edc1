"""The one reader of image files, for training, evaluation and drawing."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxdiff.errors import ImageError
from jaxdiff.files import first_bytes, not_fetched

WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
# Pillow's bound: a small file may claim an image that fills the memory.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26
# What Pillow may read: some of its other formats start programs (Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def open_image(file: str | Path | bytes, min_side: int | None = None, *, max_pixels: int | None = None) -> Image.Image:
    """An image as RGB, or RGBA when it has transparency; upright by its EXIF orientation, 8 bits a channel.

    Greys of 16 and 12 bits are scaled to 8; floating-point greys must be in [0, 1] and are scaled too. Integers of 32
    bits or with a sign are refused: nothing says which of them is white.

    Args:
        file: a PNG, JPEG, WebP, GIF, BMP or TIFF file, or its bytes; of an animation the first frame is read.
        min_side: pixels wanted of each side: a much larger JPEG is read at a half, quarter or eighth of its size.
        max_pixels: of the image, at most; None is `MAX_PIXELS`.

    Raises:
        ImageError: the image is larger than `max_pixels`, or its greys are of a range that is not known.
        Exception: whatever Pillow raises on a damaged or missing file: OSError, SyntaxError, struct.error, …
    """
    with _opened(file) as image:
        most = MAX_PIXELS if max_pixels is None else max_pixels
        if image.width * image.height > most:
            raise ImageError(f"{image.width}x{image.height} pixels are more than the {most} allowed")
        if min_side:
            image.draft(None, (2 * min_side, 2 * min_side))
        white = _white(image) if image.mode.startswith("I") else 0
        clear = transparent_value(image)
        if clear is not None:
            image.info["transparency"] = clear
        # Pillow reads 16 bits a color as 8: the other 8 tell which pixels are transparent.
        low = _low_bytes(file) if isinstance(clear, tuple) and _raw_mode(image) == "RGB;16B" else None
        ImageOps.exif_transpose(image, in_place=True)
        if low is not None:
            high = np.asarray(image.convert("RGB")).astype(np.uint16)
            opaque = (high << 8 | low != np.asarray(clear)).any(-1)
            del image.info["transparency"]
            image.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
            return image
        if image.mode == "F":
            return Image.fromarray(to_uint8(np.asarray(image))).convert("RGB")
        if white:  # Pillow's own conversion clips at 255 instead of scaling
            values = np.asarray(image)
            grey = Image.fromarray(to_uint8(values / white)).convert("RGB")
            if clear is not None:
                grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
            return grey
        return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _opened(file: str | Path | bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
    except UnidentifiedImageError:
        head = file[:64] if isinstance(file, bytes) else first_bytes(file)
        if (reason := not_fetched(head)) is None:
            raise
        raise ImageError(f"it {reason}") from None


def _low_bytes(file: str | Path | bytes) -> np.ndarray:
    """The lower 8 bits of each color of a PNG of 16 bits a color, upright by its EXIF orientation: uint8 [H, W, 3]."""
    with _opened(file) as image:
        # PNG has the higher byte first. Pillow keeps the one that it takes for the higher, here the second.
        image.tile = [(*tile[:3], "RGB;16L") for tile in image.tile]  # type: ignore[attr-defined]
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image)


def _raw_mode(image: Image.Image) -> Any:
    """How a file that is not yet decoded holds its pixels, in Pillow's words; None of other images."""
    tiles = getattr(image, "tile", None)
    found = tiles[0][3] if tiles else None
    return found[0] if isinstance(found, tuple) and found else found  # of TIFF with more about the decoder


def _white(image: Image.Image) -> int:
    """The largest value of greys of more than 8 bits, in a file that is not yet decoded. Raises ImageError."""
    kind = str(_raw_mode(image))
    if not kind.startswith(("I;16", "I;12")) or kind.endswith("S"):
        raise ImageError("its greys are integers of 32 bits or with a sign, so that it is not known which is white")
    return 4095 if kind.startswith("I;12") else 65535


def transparent_value(image: Image.Image) -> Any:
    """The grey or color of a PNG that counts as transparent (tRNS); None if there is none.

    In the file's own bits, as Pillow has it, but of 2 and 4 bits a grey in 8, as Pillow has the pixels.
    """
    clear, kind = image.info.get("transparency"), _raw_mode(image)
    if isinstance(clear, int) and kind in ("L;2", "L;4"):
        return (clear & 3) * 85 if kind == "L;2" else (clear & 15) * 17
    return clear


def on_background(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """An RGB or RGBA image as RGB, with transparency laid over a color."""
    if image.mode == "RGB":
        return image
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as bytes: round(255 x). Bytes stay as they are. Others raise ImageError.

    >>> to_uint8(np.array([0.0, 0.5, 1.0])), to_uint8(np.array([7], np.uint8))
    (array([  0, 128, 255], dtype=uint8), array([7], dtype=uint8))
    """
    image = np.asarray(image)
    if image.dtype == np.uint8:
        return image
    levels = np.round(255 * image.astype(np.float64))
    if not (levels.min() >= 0 and levels.max() <= 255):  # true of not-a-number too
        found = f"{image.dtype} from {image.min():g} to {image.max():g}"
        raise ImageError(f"its values are {found}, and must be uint8 or from 0 to 1")
    return levels.astype(np.uint8)
