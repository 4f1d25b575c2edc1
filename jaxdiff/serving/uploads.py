"""Images in and out of requests: read as in training, with lower limits."""

import base64
import binascii
import io
import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.data.images import FORMATS, MAX_PIXELS, WHITE, on_background, open_image
from jaxdiff.errors import ArgumentError
from jaxdiff.io.edges import canny
from jaxdiff.io.images import CHUNK, extend, fit, png_text

PIXELS = 4096 * 4096  # of an uploaded image
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
COMPRESSION = 3  # of PNGs, 0 to 9: 3 % larger files than zlib's default 6, in two thirds of the time
_decoding = threading.Semaphore(2)  # limits the memory of images being decoded


def open_upload(name: str, data: bytes, pixels: int = PIXELS) -> Image.Image:
    """An uploaded file as RGB or RGBA. Raises ArgumentError, named after the parameter it came in."""
    try:
        with _decoding:
            return open_image(data, max_pixels=min(pixels, MAX_PIXELS))
    except Exception as e:  # a damaged file makes Pillow raise almost anything
        reason = str(e) if type(e).__module__.startswith("jaxdiff") else "it is damaged, or no image"
        raise ArgumentError(name, f"cannot be read ({reason}): send a PNG, JPEG or WebP.") from None


def from_base64(name: str, text: str) -> bytes:
    """The bytes of base64, with or without "data:image/png;base64," before it. Raises ArgumentError."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ArgumentError(name, "is not an image in base64; paths and URLs are not opened.") from None


def as_image(image: Image.Image, width: int, height: int, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """uint8 [H, W, 3] at the size drawn, cut at its centre, with transparency laid over `background`."""
    return fit(np.array(on_background(image, background)), height, width)


def outpaint(
    name: str, image: Image.Image, margins: tuple[int, int, int, int], pixels: int = PIXELS
) -> tuple[np.ndarray, np.ndarray]:
    """An image on a larger canvas and the mask of what is drawn there, as `extend` has them. Raises ArgumentError."""
    left, top, right, bottom = margins
    width, height = image.width + left + right, image.height + top + bottom
    if width * height > pixels:
        raise ArgumentError(name, f"makes {width}x{height} pixels, more than {pixels}: add fewer.")
    try:
        return extend(np.array(on_background(image)), *margins)
    except ValueError as e:
        raise ArgumentError(name, f"cannot be used: {e}") from None


def edges(name: str, image: np.ndarray, *thresholds: float) -> np.ndarray:
    """The edges of an image, for a ControlNet. Raises ArgumentError."""
    try:
        return canny(image, *thresholds)
    except ValueError as e:
        raise ArgumentError(name, f"cannot be used: {e}") from None


def transparency(name: str, image: Image.Image, width: int, height: int) -> np.ndarray:
    """Bool [H, W] at the size drawn, true where it is transparent. Raises ArgumentError if no pixel is."""
    if image.mode == "RGBA":
        transparent = 255 - np.array(image.getchannel("A"))
        if transparent.any():
            return fit(np.repeat(transparent[..., None], 3, -1), height, width)[..., 0] >= 128
    raise ArgumentError(name, "is nowhere transparent: make transparent what is to be redrawn.")


def encode_image(image: np.ndarray, metadata: Mapping[str, Any], format: str = "png", quality: int = 95) -> bytes:
    """An image uint8 [H, W, 3] as a file; a PNG holds the flags that draw it again, as `write_png` has it."""
    file = io.BytesIO()
    options: dict[str, Any] = {"quality": quality}
    if format == "png":
        options = {"pnginfo": png_text(metadata), "compress_level": COMPRESSION}
    Image.fromarray(image).save(file, format, **options)
    return file.getvalue()


def infotext(data: bytes) -> tuple[str, dict[str, Any]]:
    """What a PNG says about how it was drawn: as people read it, and as flags (none if it says nothing)."""
    open_upload("image", data)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        text, flags_text = image.info.get("parameters", ""), image.info.get(CHUNK, "{}")
    try:
        flags = json.loads(flags_text)
    except (ValueError, TypeError, RecursionError):
        flags = {}
    return str(text), flags if isinstance(flags, dict) else {}
