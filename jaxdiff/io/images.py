"""Pictures in files: images of common formats in, PNG out together with what it takes to draw the picture again."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from jaxdiff.data.folder import FORMATS

WHITE = (255, 255, 255)
CHUNK = "jaxdiff"  # name of the PNG text chunk that holds the metadata as JSON


class ImageError(ValueError):
    """A picture that is missing, unreadable, or cannot be written."""


def read_image(path: str | Path, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """A picture file as RGB, of the formats that training reads too: PNG, JPEG, WebP, GIF, BMP, TIFF.

    The camera's orientation (EXIF) is applied, transparency laid over `background`, 16-bit greys are scaled to 8,
    floating-point greys must be in [0, 1]; of an animation the first frame is read.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: the file is missing, damaged, of no such format, or of floating-point greys outside of [0, 1].
    """
    try:
        with Image.open(path, formats=FORMATS) as opened:
            return np.array(_to_rgb(ImageOps.exif_transpose(opened), background))
    except FileNotFoundError:
        raise ImageError(f"{path} is missing: give an existing picture.") from None
    except Exception as e:  # damage shows as errors of many kinds: struct.error, TypeError, DecompressionBombError, …
        raise ImageError(f"{path} cannot be read as a picture ({e}): save it again as PNG or JPEG.") from None


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F":
        image = Image.fromarray(to_uint8(np.asarray(image)))
    elif image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips instead of scaling
        image = Image.fromarray(to_uint8(np.clip(np.asarray(image) / 65535, 0, 1)))
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")


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


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] at another size: cut at its centre to the new shape, then resampled (Lanczos)."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS))


def fit_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask uint8 [H, W] cut and resized as `fit` does with its picture, but to the nearest pixel: no greys appear."""
    if mask.shape[:2] == (height, width):
        return mask
    return np.array(ImageOps.fit(Image.fromarray(mask), (width, height), Image.Resampling.NEAREST))


SEAM = 8  # pixels of the old picture beside a new margin that are drawn anew with it


def extend(image: np.ndarray, left: int, top: int, right: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture on a larger canvas, and the mask of what is to be drawn there: outpainting as inpainting.

    Args:
        image: uint8 [H, W, 3].
        left, top, right, bottom: pixels added at each side, at least 0.

    Returns:
        uint8 [H + top + bottom, W + left + right, 3], the margins mirrored from the picture, and the mask uint8 of that
        height and width: 255 in the margins and SEAM pixels into the picture, else 0.

    Raises:
        ValueError: nothing is added, or less than nothing.

    >>> canvas, mask = extend(np.zeros((32, 32, 3), np.uint8), 16, 0, 0, 0)
    >>> canvas.shape, (mask[0] == 255).sum()
    ((32, 48, 3), np.int64(24))
    """
    sides: tuple[int, ...] = (left, top, right, bottom)
    if min(sides) < 0 or not any(sides):
        raise ValueError(f"outpaint {sides} must add pixels at one side at least, and take none away.")
    canvas = np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="symmetric")
    height, width = canvas.shape[:2]
    mask = np.full((height, width), 255, np.uint8)
    x, y, x_end, y_end = (n + SEAM * (n > 0) for n in sides)
    mask[y : height - y_end, x : width - x_end] = 0
    return canvas, mask


def grid(
    images: np.ndarray | Sequence[np.ndarray], columns: int, gap: int = 2, background: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """A contact sheet: pictures [N, H, W, 3] side by side, row by row, `gap` pixels apart; the last row may be short.

    Returns:
        uint8 [rows * (H + gap) - gap, columns * (W + gap) - gap, 3].

    >>> grid(np.zeros((5, 8, 6, 3), np.uint8), columns=3, gap=1).shape
    (17, 20, 3)
    """
    images = to_uint8(np.asarray(images))
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap), columns * (width + gap), 3), background, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet[: sheet.shape[0] - gap, : sheet.shape[1] - gap]


def strip(frames: np.ndarray, gap: int = 2) -> np.ndarray:
    """Frames [F, H, W, 3] of one picture in a row, first to last: uint8 [H, F * (W + gap) - gap, 3]."""
    return grid(frames, columns=len(frames), gap=gap)


def describe(flags: Mapping[str, Any]) -> str:
    """Flags that drew a picture, as the text that picture viewers show under "parameters".

    >>> print(describe({"prompt": "a castle", "steps": 25, "scheduler": "ddim", "seed": 3}))
    a castle
    Steps: 25, Scheduler: ddim, Seed: 3
    """
    lines = [flags.get("prompt", "")]
    if flags.get("negative_prompt"):
        lines.append(f"Negative prompt: {flags['negative_prompt']}")
    rest = {k: v for k, v in flags.items() if k not in ("prompt", "negative_prompt")}
    lines.append(", ".join(f"{name.replace('_', ' ').capitalize()}: {value}" for name, value in rest.items()))
    return "\n".join(lines)


def write_png(
    path: str | Path, image: np.ndarray, metadata: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Write one picture, whole or not at all: under a temporary name first, then renamed.

    Args:
        image: [H, W, 3], uint8 or float in [0, 1].
        metadata: flags by name that draw this picture again (of a sheet: those of each picture). Kept as JSON in a
            text chunk "jaxdiff", for `read_metadata`, and for people in a chunk "parameters".

    Raises:
        ImageError: the file cannot be written.
    """
    path, text = Path(path), PngInfo()
    if metadata is not None:
        text.add_text(CHUNK, json.dumps(metadata))
        each = [metadata] if isinstance(metadata, Mapping) else metadata
        readable = "\n\n".join(describe(flags) for flags in each)
        # Lone surrogates (undecodable bytes of a command line) fit no PNG text.
        text.add_text("parameters", readable.encode("utf-8", "replace").decode())
    _write(path, lambda file: Image.fromarray(to_uint8(image)).save(file, format="png", pnginfo=text))


def write_gif(path: str | Path, frames: Sequence[np.ndarray], seconds: float) -> None:
    """Write pictures [H, W, 3], uint8 or float in [0, 1], as an endless animation of so many seconds a frame.

    Whole or not at all; raises ImageError if the file cannot be written.
    """
    first, *rest = (Image.fromarray(to_uint8(frame)) for frame in frames)
    options = {"append_images": rest, "duration": round(1000 * seconds), "loop": 0}
    _write(Path(path), lambda file: first.save(file, format="gif", save_all=True, **options))


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Let `save` write a temporary file, then give it the name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    except OSError as e:
        raise ImageError(f"{path} cannot be written ({e.strerror or e}): free it or choose another place.") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(path: str | Path) -> Any:
    """What `write_png` was given as metadata.

    Raises:
        ImageError: the file is no picture, or holds no metadata of this library.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return json.loads(image.info[CHUNK])
    except (KeyError, json.JSONDecodeError):
        raise ImageError(f"{path} does not say how it was drawn: give a PNG as sample.py wrote it.") from None
    except (OSError, SyntaxError) as e:
        raise ImageError(f"{path} cannot be read as a picture ({e}): give a PNG as sample.py wrote it.") from None
