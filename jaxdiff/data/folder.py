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

# Background colours for transparent images, sRGB in 0..255, by their names in captions.
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
MIN_BACKGROUND = 0.02  # fraction of the image below which a background is white, as a caption would not mention it
# The subject must be visible: more than MIN_SUBJECT of its pixels differ from the background by more than MIN_CONTRAST
# in some channel of 0..255. Otherwise the background is white, or black.
MIN_SUBJECT, MIN_CONTRAST = 0.2, 48


class FolderSource:
    """The examples of a captioned folder as a `Source`."""

    blocks: np.ndarray | None = None

    def __init__(self, path: str | Path, split: str = "train", **columns: str) -> None:
        self.name, self._examples = str(path), examples(path, split, **columns)
        description = [(example.path, example.captions) for example in self._examples]
        self.digest = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, index: int, image: bool = True) -> Record:
        path, captions, extras = self._examples[index]
        return Record(path, path, captions, extras)


class Warp(NamedTuple):
    """Maxima of random warps, sampled uniformly; captions should stay true."""

    rotate: float = 0.0  # degrees, in both directions
    stretch: float = 0.0  # share by which each side grows or shrinks independently
    shift: float = 0.0  # share of each side

    def __call__(self, images: Sequence[Image.Image], rng: np.random.Generator) -> list[Image.Image]:
        """Warp images of one size alike. Beyond the border they are transparent, or mirrored if they are opaque."""
        width, height = images[0].size
        angle, *factors = rng.uniform(-1, 1, 5)
        radians = np.deg2rad(self.rotate * angle)
        scales = np.exp(np.log1p(self.stretch) * np.array(factors[:2]))
        translation = self.shift * np.array(factors[2:]) * (width, height)
        # Maps output to input coordinates, about the centre.
        inverse = np.array([[np.cos(radians), np.sin(radians)], [-np.sin(radians), np.cos(radians)]]) / scales[:, None]
        centre = np.array([width, height]) / 2
        offset = centre - inverse @ (centre + translation)
        return [self._warp(image, inverse, offset) for image in images]

    @staticmethod
    def _warp(image: Image.Image, inverse: np.ndarray, offset: np.ndarray) -> Image.Image:
        if image.mode != "RGBA":  # opaque: pad each side by the image's size, mirrored
            padding = np.array(image.size)
            pixels = np.pad(np.asarray(image), ((padding[1],) * 2, (padding[0],) * 2, (0, 0)), "symmetric")
            size, image, offset = image.size, Image.fromarray(pixels), offset + padding
        else:
            size = image.size
        coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
        return image.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


NO_WARP = Warp()


@dataclasses.dataclass(frozen=True)
class ImageDecoder:
    """Decodes examples of a source. An entry is an example's index, alone or with a size (height, width).

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
            rng_state = rng.bit_generator.state
            image = _resize_and_crop(open_image(encoded, max(size)), size, self.crop, rng)
            hint = None
            # Only in folders, whose paths were checked: metadata of a shard must not refer to files of this machine.
            if isinstance(encoded, str) and isinstance(extras.get(HINT), str):
                rng.bit_generator.state = rng_state  # for the same crop
                hint = _resize_and_crop(on_background(open_image(extras[HINT], max(size)), BLACK), size, self.crop, rng)
        except Exception as e:  # a damaged file makes Pillow raise almost anything
            return {"skipped": name, "reason": str(e) or type(e).__name__}
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            hint = hint and hint.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if any(self.warp):
            image, *hints = self.warp([image, hint] if hint else [image], rng)
            hint = hints[0] if hints else None
        if image.mode == "RGBA":
            colour = _choose_background(image, rng) if self.background == "random" else "white"
            image = on_background(image, BACKGROUNDS[colour])
            if colour != "white":
                text = f"{text}, on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"
        example: dict[str, Any] = {"image": np.array(image), "text": text}
        if hint:
            example["hint"] = np.array(hint)
        elif self.make_control_image:
            example["hint"] = self.make_control_image(example["image"])
        return example


def _resize_and_crop(
    image: Image.Image, size: tuple[int, int], crop: int | None, rng: np.random.Generator
) -> Image.Image:
    """Resize to cover (height, width) `size`, then crop its centre, or a square of `crop` pixels at random.

    Only the cropped area is resized, so that a long strip does not become a huge image.
    """
    target = size[1], size[0]  # (width, height), as in Pillow
    scale = min(n / side for n, side in zip(image.size, target, strict=True))
    resized = [max(side, int(n / scale + 1e-6)) for n, side in zip(image.size, target, strict=True)]
    out = (crop, crop) if crop else target
    left, top = (int(rng.integers(n - c + 1)) if crop else (n - c) // 2 for n, c in zip(resized, out, strict=True))
    if scale == 1:
        return image.crop((left, top, left + out[0], top + out[1]))
    width, height = image.size
    box = (left * scale, top * scale, min((left + out[0]) * scale, width), min((top + out[1]) * scale, height))
    return image.resize(out, Image.Resampling.LANCZOS, box)


def _choose_background(image: Image.Image, rng: np.random.Generator) -> str:
    """The name of a background for an RGBA image: white for half, otherwise any on which the image is visible."""
    names = list(BACKGROUNDS)
    choice = "white" if rng.random() < WHITE_FRACTION else names[1 + rng.integers(len(names) - 1)]
    step = max(1, min(image.size) // 32)  # a sparse grid of pixels suffices
    pixels = np.asarray(image)[::step, ::step].astype(int)
    if 1 - pixels[..., 3].mean() / 255 < MIN_BACKGROUND:
        return "white"
    subject = pixels[pixels[..., 3] > 127, :3]
    for name in (choice, "white", "black"):
        is_visible = np.abs(subject - BACKGROUNDS[name]).max(-1, initial=0) > MIN_CONTRAST
        if is_visible.sum() > MIN_SUBJECT * len(subject):
            return name
    return choice
