"""Contact sheets of images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from jaxdiff.evaluation.encoder import square
from jaxdiff.io.images import grid

SIDE, LINE, GAP = 128, 14, 8  # pixels of an image, of the line of text above it, and between cells
PAIRS, COLUMNS = 24, 4  # pairs on a sheet, and in a row
ROWS, IMAGES = 12, 8  # prompts on a sheet of drawn images, and images of each


class Pair(NamedTuple):
    """A drawn image and the training image nearest to it."""

    drawn: Image.Image
    nearest: Image.Image
    text: str


def labelled(images: Sequence[Image.Image], text: str) -> np.ndarray:
    """Images side by side under a line of text: uint8 [LINE + SIDE, n * SIDE, 3]."""
    cell = Image.new("RGB", (SIDE * len(images), LINE + SIDE), "white")
    # Pillow's default font may raise for letters that it lacks.
    ImageDraw.Draw(cell).text((2, 1), text.encode("ascii", "replace").decode()[: 20 * len(images)], "black")
    for i, image in enumerate(images):
        cell.paste(Image.fromarray(square(image, SIDE)), (SIDE * i, LINE))
    return np.array(cell)


def pair_sheet(pairs: Sequence[Pair]) -> np.ndarray:
    """Pairs (drawn | nearest), row by row: uint8 [H, W, 3]."""
    cells = [labelled((pair.drawn, pair.nearest), pair.text) for pair in pairs]
    return grid(np.stack(cells), min(COLUMNS, len(cells)), GAP)


def image_sheet(prompts: Sequence[tuple[str, Sequence[Image.Image]]]) -> np.ndarray:
    """A row for each prompt, of its images: uint8 [H, W, 3]."""
    widest = max(len(images) for _, images in prompts)
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    cells = [labelled([*images, *[blank] * (widest - len(images))], prompt) for prompt, images in prompts]
    return grid(np.stack(cells), 1, GAP)
