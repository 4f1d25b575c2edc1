"""From a drawing to image files. Runs in worker processes, so that jobs are plain data."""

import io
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import resvg_py
from PIL import Image

from datasets.icons.drawings import MARGIN
from datasets.icons.effects import EFFECTS, Pixels, fill, tint
from datasets.icons.sources import COLORS
from jaxdiff.files import atomic_write


class Output(NamedTuple):
    """One file to write: the drawing unchanged, filled or tinted with a color, or repainted by an effect."""

    path: Path
    color: str | None
    effect: str | None


class Job(NamedTuple):
    """One drawing and the files made of it."""

    svg: str | None
    path: Path | None
    trim: bool
    size: int
    outputs: tuple[Output, ...]


def render_svg(svg: str, width: int) -> Image.Image:
    """An SVG document at `width` pixels, RGBA, in its own proportions.

    Raises:
        ValueError: it cannot be drawn.
    """
    # Sizes in millimetres and inches need a resolution. System fonts would differ between machines.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, dpi=96.0, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def trimmed(svg: str, size: int) -> Image.Image | None:
    """An SVG document cropped to its ink and centred on a square of `size` pixels; None if it has no ink."""
    width = 2 * size
    box = _ink(render_svg(svg, width))
    if box is None:
        return None
    ink_size = max(box[2] - box[0], box[3] - box[1])
    if ink_size < size:  # a small drawing on a large page: render it again, larger
        width = min(width * size // max(ink_size, 1), 16 * size)
    image = render_svg(svg, width)
    return _center(image.crop(_ink(image)), size)


def _ink(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The bounding box of pixels that are not transparent."""
    return image.getchannel("A").point(lambda alpha: 255 if alpha > 12 else 0).getbbox()


def _center(image: Image.Image, size: int) -> Image.Image:
    scale = size * (1 - 2 * MARGIN) / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(resized, ((size - resized.width) // 2, (size - resized.height) // 2))
    # A fully opaque drawing has no transparent background: its margin becomes white.
    if np.asarray(resized)[..., 3].min() > 250:
        white_page = Image.new("RGBA", (size, size), "white")
        white_page.alpha_composite(canvas)
        return white_page
    return canvas


def draw(job: Job) -> Pixels | None:
    """The job's drawing, [size, size, 4] uint8; None when it is blank.

    Raises:
        ValueError: the drawing is broken.
        OSError: its file cannot be read.
    """
    image: Image.Image | None
    if job.path is None or job.path.suffix == ".svg":
        svg = job.path.read_text(encoding="utf-8", errors="replace") if job.path else job.svg or ""
        image = trimmed(svg, job.size) if job.trim else render_svg(svg, job.size)
    else:
        with Image.open(job.path) as opened:
            image = _center(opened.convert("RGBA"), job.size)
    if image is None:
        return None
    pixels = np.asarray(image)
    if (pixels[..., 3] > 64).mean() < 0.005:
        return None
    return np.where(pixels[..., 3:] == 0, np.uint8(0), pixels)


def write(job: Job) -> str | None:
    """Draw a job and write its files atomically. Returns what went wrong, or None."""
    cv2.setNumThreads(1)  # there is one process per core
    try:
        pixels = draw(job)
    except (ValueError, OSError) as error:
        return f"{job.outputs[0].path.stem}: {error}"
    if pixels is None:
        return f"{job.outputs[0].path.stem}: blank"
    for output in job.outputs:
        painted = _apply(pixels, output)
        if painted is not None:
            save(painted, output.path)
    return None


def _apply(pixels: Pixels, output: Output) -> Pixels | None:
    """The pixels of an output; None if the drawing has no colour that can be changed to the output's."""
    if output.color:
        return (fill if output.effect == "fill" else tint)(pixels, COLORS[output.color])
    if output.effect:
        return EFFECTS[output.effect](pixels, np.random.default_rng(zlib.crc32(output.path.name.encode())))
    return pixels


def save(image: Pixels, path: Path) -> None:
    """Write lossless WebP atomically, without an alpha channel if all pixels are opaque."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opaque = image[..., 3].min() == 255
    drawing = Image.fromarray(np.ascontiguousarray(image[..., :3] if opaque else image))
    with atomic_write(path) as temporary:
        drawing.save(temporary, "WEBP", lossless=True, method=4)
