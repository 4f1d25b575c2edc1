"""The real drawings that `judge_icons` measures by: galleries that no model sees, and the icons set itself.

Galleries are Twemoji (CC-BY-4.0), EmojiOne (CC-BY-4.0) and OpenMoji (CC-BY-SA-4.0). They are for measuring alone: no
model is trained on them, and nothing made of them is given away.
"""

import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.judge_features import Images, cached_arrays, features
from datasets.icons import render
from datasets.icons.drawings import Drawing, read_drawings
from datasets.icons.fetch import npm_package
from datasets.icons.lexicon import THINGS, Lexicon, Subject, read_lexicon
from datasets.icons.sources import SOURCES, Source, Style
from datasets.icons.splits import subject_key

GALLERIES = ("twemoji", "emojione", "openmoji")
DESIGNERS = ("noto", "fluent-flat", *GALLERIES)  # one set each of five designers: how much real drawings vary
OPENMOJI = Source(
    "openmoji",
    "iconify",
    "@iconify-json/openmoji",
    "1.2.29",
    Style("openmoji"),
    "CC-BY-SA-4.0",
    "OpenMoji",
    "https://github.com/hfg-gmuend/openmoji",
)
PACKAGES = Path("~/.cache/jaxdiff/icons").expanduser()
SIZE = 128


class Drawings(NamedTuple):
    """Features of drawings of things, on white."""

    features: np.ndarray  # [N, D]
    subject: np.ndarray  # [N] CLDR names
    source: np.ndarray  # [N]


class Row(NamedTuple):
    """One image of the icons set."""

    path: Path
    subject: str
    style: str
    source: str
    color: str | None


@functools.cache
def lexicon() -> Lexicon:
    return read_lexicon(PACKAGES)


def on_color(image: Image.Image | np.ndarray, color: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """An RGBA image laid on a colour, [H, W, 3] uint8."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*color, 255))
    canvas.alpha_composite(image)
    return np.asarray(canvas)[..., :3]


def source_of(name: str) -> Source:
    return next(source for source in (*SOURCES, OPENMOJI) if source.name == name)


def things(source: Source) -> list[Drawing]:
    """The drawings of an emoji set that show things: no faces, people, symbols."""
    drawings = read_drawings(source, npm_package(source.package, source.version, PACKAGES), lexicon())
    return [drawing for drawing in drawings if drawing.subject.group in THINGS]


def render_drawing(drawing: Drawing) -> np.ndarray | None:
    """A drawing on white at SIZE; None where it is blank."""
    pixels = render.draw(render.Job(drawing.svg, drawing.path, drawing.source.trim, SIZE, ()))
    return None if pixels is None else on_color(pixels)


def images_of(name: str, only: Collection[str] = ()) -> tuple[Images, list[str]]:
    """The things of one emoji set on white, and their subjects: all of them, or only some."""
    selected = [drawing for drawing in things(source_of(name)) if not only or drawing.subject.name in only]
    pairs = [(render_drawing(drawing), drawing.subject.name) for drawing in selected]
    images, subjects = zip(*((image, subject) for image, subject in pairs if image is not None), strict=True)
    return np.stack(images), list(subjects)


def drawings_of(name: str, only: Collection[str] = ()) -> Drawings:
    """Features of the things of one emoji set, kept on disk."""
    source = source_of(name)

    def compute() -> dict[str, np.ndarray]:
        images, subjects = images_of(name, only)
        return {"features": features(images), "subject": np.array(subjects)}

    key = (source.package, source.version, SIZE, *([sorted(only)] if only else []))
    arrays = cached_arrays(name, key, compute)
    return Drawings(arrays["features"], arrays["subject"], np.full(len(arrays["subject"]), name))


def concatenate(parts: list[Drawings]) -> Drawings:
    return Drawings(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def galleries() -> Drawings:
    """The drawings of all galleries."""
    return concatenate([drawings_of(name) for name in GALLERIES])


def matching_subjects(prompt: str, subject: str, subjects: list[str]) -> set[str]:
    """Those of `subjects` that are right for a prompt: "a camera" is also a "camera with flash"."""
    words = prompt.split(" ", 1)[-1] if prompt.startswith(("a ", "an ")) else prompt
    subjects_by_name = {name: lexicon().by_name(name.replace(" ", "-")) or Subject(name) for name in subjects}
    return {
        name
        for name in subjects
        if subject_key(name) == subject_key(subject) or words in (name, *subjects_by_name[name].synonyms)
    }


def rows(data: Path, split: str) -> list[Row]:
    """The images of a split of the icons set that a judge may learn from: none of the galleries'."""
    lines = (data / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [
        Row(data / split / row["file_name"], row["subject"], row["style"], row["source"], row.get("color"))
        for row in entries
        if row["source"] not in GALLERIES
    ]


def sample_rows(rows: list[Row], count: int, seed: int = 0) -> list[Row]:
    """At most `count` of the rows, the same ones each time."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(chosen)]


def read(rows: list[Row], color: tuple[int, int, int] = (255, 255, 255)) -> Images:
    """Images of the set on a colour, [N, H, W, 3] uint8."""
    images = []
    for row in rows:
        with Image.open(row.path) as image:
            images.append(on_color(image, color))
    return np.stack(images)


def features_of(name: str, rows: list[Row]) -> np.ndarray:
    """Features of images of the set on white, kept on disk."""
    key = [(row.path, row.path.stat().st_size) for row in rows]
    return cached_arrays(name, key, lambda: {"features": features(read(rows))})["features"]
