"""Captioned folders as a source, and how images are read and decoded; see `jaxdiff.data.listing` for the layout."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxdiff.data.images import BLACK, on_background, open_image
from jaxdiff.data.listing import HINT, examples
from jaxdiff.data.source import Record, Source

# Colours that transparent images are put on, by the name that goes into the caption: sRGB in 0..255.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "red": (215, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (50, 160, 70),
    "teal": (0, 140, 140),
    "blue": (50, 90, 220),
    "purple": (130, 60, 170),
    "pink": (250, 150, 190),
    "brown": (130, 80, 45),
}
WHITE_FRACTION = 0.5  # of the images with background="random"
MIN_BACKGROUND = 0.02  # fraction of the image; a smaller background is white: nobody would mention it
# Black ink does not show on black: this fraction of the subject must differ by more than so much in some channel of
# 0..255, or the background is white, or black.
MIN_SUBJECT, MIN_CONTRAST = 0.2, 48


class FolderSource:
    """The examples of a captioned folder as a `Source`."""

    blocks: np.ndarray | None = None

    def __init__(self, path: str | Path, split: str = "train", **columns: str) -> None:
        self.name, self._examples = str(path), examples(path, split, **columns)
        listed = [(e.path, e.captions) for e in self._examples]
        self.digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, index: int, image: bool = True) -> Record:
        path, captions, extras = self._examples[index]
        return Record(path, path, captions, extras)


class Warp(NamedTuple):
    """How far images are moved at random, evenly up to these; what the caption says stays true of small ones."""

    rotate: float = 0.0  # degrees, either way
    stretch: float = 0.0  # share by which each side grows or shrinks, by itself
    shift: float = 0.0  # share of each side

    def __call__(self, images: Sequence[Image.Image], rng: np.random.Generator) -> list[Image.Image]:
        """Images of one size, moved alike. What comes in from outside is transparent, or mirrored at the border."""
        width, height = images[0].size
        angle, *rest = rng.uniform(-1, 1, 5)
        turn = np.deg2rad(self.rotate * angle)
        size = np.exp(np.log1p(self.stretch) * np.array(rest[:2]))
        moved = self.shift * np.array(rest[2:]) * (width, height)
        # From where a pixel goes to where it comes from: about the centre, which shifts.
        back = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) / size[:, None]
        centre = np.array([width, height]) / 2
        offset = centre - back @ (centre + moved)
        return [self._moved(image, back, offset) for image in images]

    @staticmethod
    def _moved(image: Image.Image, back: np.ndarray, offset: np.ndarray) -> Image.Image:
        if image.mode != "RGBA":  # opaque: as much again on each side, mirrored
            pad = np.array(image.size)
            pixels = np.pad(np.asarray(image), ((pad[1],) * 2, (pad[0],) * 2, (0, 0)), "symmetric")
            size, image, offset = image.size, Image.fromarray(pixels), offset + pad
        else:
            size = image.size
        coefficients = (*back[0], offset[0], *back[1], offset[1])
        return image.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


NO_WARP = Warp()


@dataclasses.dataclass(frozen=True)
class ImageDecoder:
    """Decodes examples of a source, by their numbers, alone or with a size (height, width).

    (entry, generator) -> {"image": uint8 [H, W, 3], "text": str}, or {"skipped": name, "reason": str}. There is a
    "hint" of the image's shape where the metadata of a folder names one (HINT), or `make_control_image` is given.
    """

    source: Source
    image_size: int
    crop: int | None = None
    flip: bool = False
    background: str = "random"
    make_control_image: Callable[[np.ndarray], np.ndarray] | None = None
    warp: Warp = NO_WARP

    def __call__(self, entry: int | tuple[int, tuple[int, int]], rng: np.random.Generator) -> dict[str, Any]:
        index, size = entry if isinstance(entry, tuple) else (entry, (self.image_size, self.image_size))
        name = f"{self.source.name}: example {index}"
        try:
            name, encoded, captions, extras = self.source.read(index)
            text = captions[rng.integers(len(captions))]
            before = rng.bit_generator.state
            image = _cut(open_image(encoded, max(size)), size, self.crop, rng)
            hint = None
            # Only in folders, where names were checked: the metadata of a shard must not name files of this machine.
            if isinstance(encoded, str) and isinstance(extras.get(HINT), str):
                rng.bit_generator.state = before  # so that it is cut at the same place
                hint = _cut(on_background(open_image(extras[HINT], max(size)), BLACK), size, self.crop, rng)
        except Exception as e:  # a damaged file makes Pillow raise almost anything
            return {"skipped": name, "reason": str(e) or type(e).__name__}
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            hint = hint and hint.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if any(self.warp):
            image, *hints = self.warp([image, hint] if hint else [image], rng)
            hint = hints[0] if hints else None
        if image.mode == "RGBA":
            colour = _colour(image, rng) if self.background == "random" else "white"
            image = on_background(image, BACKGROUNDS[colour])
            if colour != "white":
                text = f"{text}, on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"
        found: dict[str, Any] = {"image": np.array(image), "text": text}
        if hint:
            found["hint"] = np.array(hint)
        elif self.make_control_image:
            found["hint"] = self.make_control_image(found["image"])
        return found


def _cut(image: Image.Image, size: tuple[int, int], crop: int | None, rng: np.random.Generator) -> Image.Image:
    """Resize until (height, width) `size` is covered, then cut its centre, or a square of `crop` pixels at random.

    Only what is cut is computed, so a long strip does not grow into a huge image.
    """
    covers = size[1], size[0]  # as Pillow counts: width, height
    scale = min(n / side for n, side in zip(image.size, covers, strict=True))
    sizes = [max(side, int(n / scale + 1e-6)) for n, side in zip(image.size, covers, strict=True)]
    out = (crop, crop) if crop else covers
    left, top = (int(rng.integers(n - o + 1)) if crop else (n - o) // 2 for n, o in zip(sizes, out, strict=True))
    if scale == 1:
        return image.crop((left, top, left + out[0], top + out[1]))
    width, height = image.size
    box = (left * scale, top * scale, min((left + out[0]) * scale, width), min((top + out[1]) * scale, height))
    return image.resize(out, Image.Resampling.LANCZOS, box)


def _colour(image: Image.Image, rng: np.random.Generator) -> str:
    """The name of a background for an RGBA image: white for half, otherwise any on which the image can be seen."""
    names = list(BACKGROUNDS)
    drawn = "white" if rng.random() < WHITE_FRACTION else names[1 + rng.integers(len(names) - 1)]
    step = max(1, min(image.size) // 32)  # a sparse grid of the pixels will do
    pixels = np.asarray(image)[::step, ::step].astype(int)
    if 1 - pixels[..., 3].mean() / 255 < MIN_BACKGROUND:
        return "white"
    subject = pixels[pixels[..., 3] > 127, :3]
    for name in (drawn, "white", "black"):
        differs = np.abs(subject - BACKGROUNDS[name]).max(-1, initial=0) > MIN_CONTRAST
        if differs.sum() > MIN_SUBJECT * len(subject):
            return name
    return drawn
