"""Image files: read common formats; write PNG, with the flags that reproduce the image, GIF and WebP."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from jaxdiff.data.images import FORMATS, WHITE, on_background, open_image, to_uint8
from jaxdiff.errors import ImageError
from jaxdiff.files import atomic_write, write_new, writing

CHUNK = "jaxdiff"  # name of the PNG text chunk that holds the metadata as JSON


def read_image(path: str | Path, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """An image file as RGB, decoded as in training: see `jaxdiff.data.images.open_image`.

    Transparent pixels are blended with `background`.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: the file is missing, damaged, too large, of another format, or of greys whose range is not known.
    """
    return np.array(_read_with(path, lambda path: on_background(open_image(path), background)))


def _read_with(path: str | Path, reader: Callable[[str | Path], Any]) -> Any:
    """The result of `reader` on an image file; its errors become ImageErrors."""
    try:
        return reader(path)
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist: give an existing image.") from None
    except Exception as e:  # damage shows as errors of many kinds: struct.error, TypeError, DecompressionBombError, …
        raise ImageError(f"{path} cannot be read as an image ({e}): save it again as PNG or JPEG.") from None


def read_with_alpha(path: str | Path) -> np.ndarray:
    """An image file as `read_image` reads it, but with its alpha channel if it has one: uint8 [H, W, 3 or 4]."""
    return np.array(_read_with(path, open_image))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in an image file's header, before any rotation by EXIF. Raises ImageError."""

    def size(path: str | Path) -> tuple[int, int]:
        with Image.open(path, formats=FORMATS) as image:
            return image.height, image.width

    return _read_with(path, size)


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image uint8 [H, W, 3] cropped at its centre to the new aspect ratio, then resized (Lanczos)."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS))


def fit_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask uint8 [H, W] cropped and resized as by `fit`, but to the nearest pixel, so that no greys appear."""
    if mask.shape[:2] == (height, width):
        return mask
    return np.array(ImageOps.fit(Image.fromarray(mask), (width, height), Image.Resampling.NEAREST))


SEAM = 8  # pixels of the old image next to a new margin that are redrawn with it


def extend(image: np.ndarray, left: int, top: int, right: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
    """An image on a larger canvas and the mask of the area to draw: outpainting as inpainting.

    Args:
        image: uint8 [H, W, 3].
        left, top, right, bottom: pixels added at each side, at least 0.

    Returns:
        uint8 [H + top + bottom, W + left + right, 3], with margins mirrored from the image, and the mask, uint8 of that
        height and width: 255 in the margins and SEAM pixels into the image, else 0.

    Raises:
        ValueError: no pixels are added, or a side is negative.

    >>> canvas, mask = extend(np.zeros((32, 32, 3), np.uint8), 16, 0, 0, 0)
    >>> canvas.shape, (mask[0] == 255).sum()
    ((32, 48, 3), np.int64(24))
    """
    sides: tuple[int, ...] = (left, top, right, bottom)
    if min(sides) < 0 or not any(sides):
        raise ValueError(f"outpaint {sides} must add pixels on at least one side, and none may be negative.")
    canvas = np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="symmetric")
    height, width = canvas.shape[:2]
    mask = np.full((height, width), 255, np.uint8)
    x, y, x_end, y_end = (n + SEAM * (n > 0) for n in sides)
    mask[y : height - y_end, x : width - x_end] = 0
    return canvas, mask


def grid(
    images: np.ndarray | Sequence[np.ndarray], columns: int, gap: int = 2, background: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """A contact sheet of images [N, H, W, 3], row by row, `gap` pixels apart; the last row may be short.

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
    """Frames [F, H, W, 3] of one image in a row, first to last: uint8 [H, F * (W + gap) - gap, 3]."""
    return grid(frames, columns=len(frames), gap=gap)


def layers(rows: Sequence[Sequence[np.ndarray]], gap: int = 2) -> np.ndarray:
    """A strip of frames for each layer of an image that was drawn small and enlarged, at its own size, stacked.

    Args:
        rows: for each layer its frames [H, W, 3], all of one size.

    >>> layers([[np.zeros((4, 4, 3))] * 3, [np.zeros((8, 8, 3))] * 2]).shape
    (14, 18, 3)
    """
    strips = [strip(np.asarray(row), gap) for row in rows]
    height = sum(len(s) + gap for s in strips) - gap
    sheet = np.full((height, max(s.shape[1] for s in strips), 3), WHITE, np.uint8)
    top = 0
    for s in strips:
        sheet[top : top + len(s), : s.shape[1]] = s
        top += len(s) + gap
    return sheet


def describe(flags: Mapping[str, Any]) -> str:
    """The flags of an image as the text that image viewers show under "parameters".

    >>> print(describe({"prompt": "a castle", "steps": 25, "scheduler": "ddim", "seed": 3}))
    a castle
    Steps: 25, Scheduler: ddim, Seed: 3
    """
    lines = [flags.get("prompt", "")]
    if flags.get("negative_prompt"):
        lines.append(f"Negative prompt: {flags['negative_prompt']}")
    settings = {k: v for k, v in flags.items() if k not in ("prompt", "negative_prompt")}
    lines.append(", ".join(f"{name.replace('_', ' ').capitalize()}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def png_text(metadata: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> PngInfo:
    """The text chunks of a PNG: see `write_png`."""
    text = PngInfo()
    text.add_text(CHUNK, json.dumps(metadata))
    entries = [metadata] if isinstance(metadata, Mapping) else metadata
    readable = "\n\n".join(describe(flags) for flags in entries)
    # Lone surrogates (undecodable bytes of a command line) fit no PNG text.
    text.add_text("parameters", readable.encode("utf-8", "replace").decode())
    return text


def write_png(
    path: str | Path,
    image: np.ndarray,
    metadata: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    overwrite: bool = True,
) -> Path:
    """Write one image, atomically.

    Args:
        image: [H, W, 3], uint8 or float in [0, 1].
        metadata: flags by name that reproduce this image (for a sheet: those of each image). Written as JSON in a text
            chunk "jaxdiff", for `read_metadata`, and as readable text in a chunk "parameters".
        overwrite: whether to replace an existing file; otherwise the new file's name is numbered.

    Returns:
        The file's path.

    Raises:
        ImageError: the file cannot be written.
    """
    path, text = Path(path), None if metadata is None else png_text(metadata)
    return _write(path, lambda file: Image.fromarray(to_uint8(image)).save(file, format="png", pnginfo=text), overwrite)


def write_gif(path: str | Path, frames: Sequence[np.ndarray], seconds: float, *, overwrite: bool = True) -> Path:
    """Write images [H, W, 3], uint8 or float in [0, 1], as an endless animation of `seconds` a frame.

    See `write_png` for `overwrite`, the result and errors.
    """
    first, *others = (Image.fromarray(to_uint8(frame)) for frame in frames)
    options = {"append_images": others, "duration": round(1000 * seconds), "loop": 0}
    return _write(Path(path), lambda file: first.save(file, format="gif", save_all=True, **options), overwrite)


def write_webp(
    path: str | Path, frames: Sequence[np.ndarray], seconds: float, last: float, *, overwrite: bool = True
) -> Path:
    """Write images uint8 [H, W, 3] as an endless animation at the size of the last one, which shows for `last` seconds.

    Smaller ones are enlarged to the nearest pixel. See `write_png` for `overwrite`, the result and errors.
    """
    height, width = frames[-1].shape[:2]
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST) for frame in frames]
    times = [round(1000 * seconds)] * (len(resized) - 1) + [round(1000 * last)]
    options: dict[str, Any] = {"append_images": resized[1:], "duration": times, "loop": 0, "quality": 90}
    return _write(Path(path), lambda file: resized[0].save(file, format="webp", save_all=True, **options), overwrite)


def _write(path: Path, save: Callable[[Path], None], overwrite: bool) -> Path:
    """Let `save` write a temporary file, then rename it to `path` or a numbered name, which is returned."""
    with writing(path, ImageError, "free it or choose another place."):
        if overwrite:
            with atomic_write(path) as temporary:
                save(temporary)
            return path
        with write_new(path) as (temporary, written):
            save(temporary)
        return written[0]


def read_text(path: str | Path) -> str:
    """The "parameters" text in which other programs describe how an image was drawn; "" if there is none.

    Raises:
        ImageError: the file is not an image.
    """
    return str(_info(path).get("parameters", ""))


def _info(path: str | Path) -> dict[Any, Any]:
    """An image file's metadata; its pixels are not decoded. Raises ImageError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.info
    except Exception as e:  # damage shows as errors of many kinds: DecompressionBombError, ValueError, …
        raise ImageError(f"{path} cannot be read as an image ({e}): give a PNG as sample.py wrote it.") from None


def read_metadata(path: str | Path) -> Any:
    """The metadata that `write_png` wrote.

    Raises:
        ImageError: the file is not an image, or holds no metadata of this library.
    """
    info = _info(path)
    try:
        return json.loads(info[CHUNK])
    except (KeyError, TypeError, ValueError, RecursionError):  # no metadata, or not JSON
        raise ImageError(
            f"{path} does not say how it was drawn: give a PNG as sample.py or AUTOMATIC1111 wrote it."
        ) from None
