"""From a drawing to pixels on disk. Runs in worker processes: everything that crosses over is plain data."""

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
    """One file to write: the drawing as it is, filled or tinted with a color, or painted over by a filter."""

    path: Path
    color: str | None
    effect: str | None


class Job(NamedTuple):
    """One drawing and the files that are made of it."""

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
    # Without a resolution, sizes in millimetres and inches are refused; fonts would differ between machines.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, dpi=96.0, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def trimmed(svg: str, size: int) -> Image.Image | None:
    """An SVG document cut to its ink and centred on a square of `size` pixels; None when it has no ink."""
    width = 2 * size
    box = _ink(render_svg(svg, width))
    if box is None:
        return None
    ink = max(box[2] - box[0], box[3] - box[1])
    if ink < size:  # a small drawing on a big page: draw it again, larger
        width = min(width * size // max(ink, 1), 16 * size)
    image = render_svg(svg, width)
    return _centred(image.crop(_ink(image)), size)


def _ink(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The box of what is not transparent."""
    return image.getchannel("A").point(lambda alpha: 255 if alpha > 12 else 0).getbbox()


def _centred(image: Image.Image, size: int) -> Image.Image:
    scale = size * (1 - 2 * MARGIN) / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS, reducing_gap=3)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    # A page that is opaque to its corners has no transparent background to show another colour through.
    if np.asarray(small)[..., 3].min() > 250:
        paper = Image.new("RGBA", (size, size), "white")
        paper.alpha_composite(canvas)
        return paper
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
            image = _centred(opened.convert("RGBA"), job.size)
    if image is None:
        return None
    pixels = np.asarray(image)
    if (pixels[..., 3] > 64).mean() < 0.005:
        return None
    return np.where(pixels[..., 3:] == 0, np.uint8(0), pixels)


def write(job: Job) -> str | None:
    """Draw a job and write its files, each whole or not at all; what went wrong, or None."""
    cv2.setNumThreads(1)  # one process a core already
    try:
        pixels = draw(job)
    except (ValueError, OSError) as error:
        return f"{job.outputs[0].path.stem}: {error}"
    if pixels is None:
        return f"{job.outputs[0].path.stem}: blank"
    for output in job.outputs:
        image = _applied(pixels, output)
        if image is not None:
            save(image, output.path)
    return None


def _applied(pixels: Pixels, output: Output) -> Pixels | None:
    """What goes into the file; None when the drawing has no colour that could be changed to the wanted one."""
    if output.color:
        return (fill if output.effect == "fill" else tint)(pixels, COLORS[output.color])
    if output.effect:
        return EFFECTS[output.effect](pixels, np.random.default_rng(zlib.crc32(output.path.name.encode())))
    return pixels


def save(image: Pixels, path: Path) -> None:
    """Write lossless WebP under a temporary name, then rename it; without the alpha channel where all is opaque."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opaque = image[..., 3].min() == 255
    drawing = Image.fromarray(np.ascontiguousarray(image[..., :3] if opaque else image))
    with atomic_write(path) as temporary:
        drawing.save(temporary, "WEBP", lossless=True, method=4)
