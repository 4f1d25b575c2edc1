"""The images to measure: drawn into a folder, or found in one."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jaxdiff
from jaxdiff.config import ConfigError
from jaxdiff.data.listing import METADATA, examples, has_text_files, image_files, metadata_files
from jaxdiff.data.source import Record
from jaxdiff.files import write_text
from jaxdiff.io.images import read_metadata, write_png
from jaxdiff.models.model import Model
from jaxdiff.text.emphasis import parse_emphasis
from jaxdiff.text.other_programs import only_words
from jaxdiff.text.prompt_files import PromptLine
from jaxdiff.text.schedule import END, parse_schedule, text_at
from jaxdiff.typing import SEEDS, Params


class ImageRequest(NamedTuple):
    """An image to draw."""

    prompt: str
    negative_prompt: str | None
    seed: int


@dataclasses.dataclass(frozen=True)
class Images:
    """Image files and the prompt of each, as a `jaxdiff.data.source.Source`."""

    name: str
    paths: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int | None, ...]

    blocks: np.ndarray | None = None
    digest: str = ""  # their features are not cached

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, image: bool = True) -> Record:
        return Record(self.paths[index], self.paths[index], (self.prompts[index],), {})


def image_requests(
    lines: Sequence[PromptLine], num_images: int, seed: int, negative_prompt: str | None = None
) -> list[ImageRequest]:
    """The images to draw, prompt by prompt. As in sample.py, seeds count up over all images, or from a line's own seed.

    >>> [w.seed for w in image_requests([PromptLine("a"), PromptLine("b", seed=7)], 2, 3)]
    [3, 4, 7, 8]
    """
    requests: list[ImageRequest] = []
    for line in lines:
        negative = negative_prompt if line.negative_prompt is None else line.negative_prompt
        for k in range(num_images):
            image_seed = seed + len(requests) if line.seed is None else line.seed + k
            requests.append(ImageRequest(line.prompt, negative, image_seed % SEEDS))
    return requests


def plain(prompt: str) -> str:
    """A prompt as a caption: its final text if it is edited by step, without emphasis.

    >>> plain("a (red:1.3) [house:castle:0.5]")
    'a red castle'
    """
    words = text_at(parse_schedule(only_words(prompt)), 0, 1, stage=END)
    return " ".join(" ".join(p.text or " " for p in parse_emphasis(words)).split())


def draw(
    model: Model,
    params: Params,
    requests: Sequence[ImageRequest],
    folder: Path,
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> Images:
    """Draw images into a folder, 000000.png, 000001.png, …, and list them in its metadata.jsonl.

    Existing images are kept.

    Args:
        batch_size: images drawn at once; the last batch is padded, so that one compiled program draws all.
        progress: called with the number of images done since the last call.
        options: of `jaxdiff.generate`, for all images.

    Raises:
        ImageError, OSError: a file cannot be written.
        ArgumentError, FloatingPointError: see `jaxdiff.generate`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.png" for i in range(len(requests))]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    progress(len(requests) - len(missing))
    for i in range(0, len(missing), batch_size):
        batch = missing[i : i + batch_size]
        padded = [requests[j] for j in batch + batch[-1:] * (batch_size - len(batch))]
        negative = [w.negative_prompt for w in padded]
        generated = jaxdiff.generate(
            model, params, [w.prompt for w in padded], negative, seed=[w.seed for w in padded], **options
        )
        for j, image in zip(batch, generated, strict=False):
            flags = {"prompt": requests[j].prompt, "seed": requests[j].seed}
            write_png(paths[j], image, flags | ({"negative_prompt": w} if (w := requests[j].negative_prompt) else {}))
        progress(len(batch))
    lines = [
        {"file_name": path.name, "text": w.prompt, "seed": w.seed, "negative_prompt": w.negative_prompt}
        for path, w in zip(paths, requests, strict=True)
    ]
    write_text(folder / METADATA, "".join(json.dumps(line) + "\n" for line in lines))
    prompts, _, seeds = zip(*requests, strict=True)
    return Images(str(folder), tuple(map(str, paths)), prompts, seeds)


def find_images(folder: Path, lines: Sequence[PromptLine] | None) -> Images:
    """The images of a folder with their prompts.

    Args:
        folder: with captions as in training (metadata.jsonl, metadata.csv, or, without `lines`, text files next to the
            images), or of image files alone.
        lines: the prompts of the image files in order of their names; each prompt has one image, or the same number in
            a row. None: the captions, or the prompts that sample.py wrote into the PNG files.

    Raises:
        ConfigError: the folder is missing or empty, its images have no prompts or two, or the numbers do not match. The
            sentence begins with the flag at fault.
    """
    if not folder.is_dir():
        raise ConfigError(f"--images {folder} is not a folder: give a folder of images.")
    metadata = metadata_files(folder)
    if metadata and lines is not None:
        raise ConfigError(f"--prompts: the images of {folder} have theirs in its {metadata[0]}: leave --prompts out.")
    if metadata or (lines is None and has_text_files(folder)):
        captioned = [next(group) for _, group in itertools.groupby(examples(folder, "."), id)]  # repeats count once
        seeds = tuple(s if isinstance(s := e.extras.get("seed"), int) else None for e in captioned)
        return Images(str(folder), tuple(e.path for e in captioned), tuple(e.captions[0] for e in captioned), seeds)
    paths = image_files(folder)
    if not paths:
        raise ConfigError(f"--images {folder} holds no images: give a folder of PNG or JPEG files.")
    names = tuple(map(str, paths))
    if lines is None:
        return Images(str(folder), names, tuple(map(_embedded_prompt, paths)), (None,) * len(paths))
    per_prompt, remainder = divmod(len(paths), len(lines))
    if remainder or not per_prompt:
        raise ConfigError(
            f"--images {folder} holds {len(paths)} images, and --prompts {len(lines)} prompts: give as many "
            "of each, or a multiple."
        )
    prompts = tuple(line.prompt for line in lines for _ in range(per_prompt))
    line_seeds = (None if line.seed is None else (line.seed + k) % SEEDS for line in lines for k in range(per_prompt))
    return Images(str(folder), names, prompts, tuple(line_seeds))


def _embedded_prompt(path: Path) -> str:
    """The prompt that sample.py wrote into a PNG file."""
    with contextlib.suppress(Exception):  # a damaged file makes Pillow raise almost anything
        values = read_metadata(path)
        if isinstance(values, dict) and isinstance(values.get("prompt"), str):
            return values["prompt"]
    raise ConfigError(
        f"--images: {path} has no prompt: give --prompts, or a {METADATA} that names each image and its text."
    )
