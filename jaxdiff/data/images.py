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
        min_side: pixels needed of each side; a much larger JPEG is read at a half, quarter or eighth of its size.
        max_pixels: maximum number of pixels; None is `MAX_PIXELS`.

    Raises:
        ImageError: the image is larger than `max_pixels`, or the range of its greys is unknown.
        Exception: whatever Pillow raises on a damaged or missing file: OSError, SyntaxError, struct.error, …
    """
    with _open(file) as image:
        limit = MAX_PIXELS if max_pixels is None else max_pixels
        if image.width * image.height > limit:
            raise ImageError(f"{image.width}x{image.height} pixels are more than the {limit} allowed")
        if min_side:
            image.draft(None, (2 * min_side, 2 * min_side))
        max_grey = _max_grey(image) if image.mode.startswith("I") else 0
        transparent = transparent_value(image)
        if transparent is not None:
            image.info["transparency"] = transparent
        # Pillow drops the lower 8 of 16 bits a color, which are needed to find transparent pixels.
        low_bytes = _low_bytes(file) if isinstance(transparent, tuple) and _raw_mode(image) == "RGB;16B" else None
        ImageOps.exif_transpose(image, in_place=True)
        if low_bytes is not None:
            high_bytes = np.asarray(image.convert("RGB")).astype(np.uint16)
            opaque = (high_bytes << 8 | low_bytes != np.asarray(transparent)).any(-1)
            del image.info["transparency"]
            image.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
            return image
        if image.mode == "F":
            return Image.fromarray(to_uint8(np.asarray(image))).convert("RGB")
        if max_grey:  # Pillow's own conversion clips at 255 instead of scaling
            values = np.asarray(image)
            grey = Image.fromarray(to_uint8(values / max_grey)).convert("RGB")
            if transparent is not None:
                grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
            return grey
        return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _open(file: str | Path | bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
    except UnidentifiedImageError:
        head = file[:64] if isinstance(file, bytes) else first_bytes(file)
        if (reason := not_fetched(head)) is None:
            raise
        raise ImageError(f"it {reason}") from None


def _low_bytes(file: str | Path | bytes) -> np.ndarray:
    """The lower 8 bits of each color of a PNG of 16 bits a color, upright by its EXIF orientation: uint8 [H, W, 3]."""
    with _open(file) as image:
        # PNG stores the higher byte first. With "16L" Pillow keeps the lower one instead.
        image.tile = [(*tile[:3], "RGB;16L") for tile in image.tile]  # type: ignore[attr-defined]
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image)


def _raw_mode(image: Image.Image) -> Any:
    """Pillow's raw mode of an image file that is not decoded yet; None for other images."""
    tiles = getattr(image, "tile", None)
    mode = tiles[0][3] if tiles else None
    return mode[0] if isinstance(mode, tuple) and mode else mode  # TIFF has a tuple


def _max_grey(image: Image.Image) -> int:
    """The maximum grey of an image of more than 8 bits that is not decoded yet. Raises ImageError if unknown."""
    mode = str(_raw_mode(image))
    if not mode.startswith(("I;16", "I;12")) or mode.endswith("S"):
        raise ImageError("its greys are integers of 32 bits or with a sign, so that it is not known which is white")
    return 4095 if mode.startswith("I;12") else 65535


def transparent_value(image: Image.Image) -> Any:
    """The grey or color that is transparent in a PNG (tRNS); None if there is none.

    It has the file's bit depth, like Pillow's value, but greys of 2 and 4 bits are scaled to 8 like Pillow's pixels.
    """
    value, mode = image.info.get("transparency"), _raw_mode(image)
    if isinstance(value, int) and mode in ("L;2", "L;4"):
        return (value & 3) * 85 if mode == "L;2" else (value & 15) * 17
    return value


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
        value_range = f"{image.dtype} from {image.min():g} to {image.max():g}"
        raise ImageError(f"its values are {value_range}, and must be uint8 or from 0 to 1")
    return levels.astype(np.uint8)
