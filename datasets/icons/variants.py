"""The images made of a drawing: unchanged, in named colours, or repainted; each with captions and a split."""

import hashlib
from typing import NamedTuple

from datasets.icons.captions import captions
from datasets.icons.drawings import Drawing
from datasets.icons.lexicon import (
    ACTIVITIES,
    FLAGS,
    FOOD,
    NATURE,
    OBJECTS,
    PEOPLE,
    SYMBOLS,
    THINGS,
    TRAVEL,
)
from datasets.icons.sources import COLORLESS, COLORS, PAINTINGS, STYLES, Style
from datasets.icons.splits import slug, split_of
from datasets.icons.words import COLOR_WORDS

SILHOUETTES = 3  # number of silhouettes, each of another colour, of a repainted drawing
REPEATS = 3  # of an unchanged drawing, others have 1: most prompts ask for no style
GROUPS = {
    -1: "other", 0: "smileys", PEOPLE: "people", NATURE: "nature", FOOD: "food", TRAVEL: "travel",
    ACTIVITIES: "activities", OBJECTS: "objects", SYMBOLS: "symbols", FLAGS: "flags",
}  # fmt: skip
TINTS = 3  # tints of a colour drawing; fewer if it has one of the colours already or no main colour


class ImageSpec(NamedTuple):
    """An image of the set, before it is drawn."""

    split: str
    file_name: str  # relative to the split's folder
    text: list[str]
    subject: str
    style: str
    source: str
    license: str
    group: str  # kind of its subject, one of GROUPS
    repeats: int  # per epoch
    color: str | None = None  # that it is filled or tinted with
    effect: str | None = None  # "fill", "tint" or an effect's name; None for the drawing as it is

    def row(self) -> dict:
        """Its line of metadata.jsonl."""
        row = self._asdict()
        row.pop("split")
        row.pop("effect")
        return {key: value for key, value in row.items() if value is not None}


def colors_of(name: str, count: int) -> list[str]:
    """`count` names of COLORS, always including black, which depend only on the drawing's name.

    >>> colors_of("castle", 3) == colors_of("castle", 3), colors_of("castle", 1)
    (True, ['black'])
    """
    others = [color for color in COLORS if color != "black"]
    ranked = sorted(others, key=lambda color: hashlib.sha256(f"{color} {name}".encode()).digest())
    return ["black", *ranked[: count - 1]]


def image_specs(drawing: Drawing) -> list[ImageSpec]:
    """Every image made of one drawing."""
    source, stem, style = drawing.source, drawing.name, drawing.style
    # "An orange heart" would be wrong in black or in pencil.
    has_color_word = not COLOR_WORDS.isdisjoint(slug(drawing.subject.name).split("-"))
    is_thing = drawing.subject.group in THINGS and not has_color_word
    if source.recolor:
        # A colour word before "woman" would be read as a skin colour.
        colors = [] if has_color_word or drawing.subject.group == PEOPLE else colors_of(stem, source.recolor)
        return [_spec(drawing, style, f"{stem}-{color}", color, "fill") for color in colors]
    specs = [_spec(drawing, style, stem)]
    if source.paintings:
        names = [name for name in PAINTINGS if not (has_color_word and name in COLORLESS)]
        specs += [_spec(drawing, PAINTINGS[name], f"{stem}-{name}", effect=name) for name in names]
        colors = colors_of(f"{stem} {source.name}", SILHOUETTES) if is_thing else []
        specs += [_spec(drawing, STYLES["silhouette"], f"{stem}-silhouette-{color}", color, "fill") for color in colors]
    if source.tint and is_thing:
        colors = colors_of(f"{stem} {source.name} tint", TINTS + 1)[1:]
        specs += [_spec(drawing, style, f"{stem}-tint-{color}", color, "tint") for color in colors]
    return specs


def _spec(drawing: Drawing, style: Style, stem: str, color: str | None = None, effect: str | None = None) -> ImageSpec:
    subject, source = drawing.subject, drawing.source
    file_name = f"images/{source.name}/{slug(stem)}.webp"
    split = split_of(subject.name, style.name)
    is_plain = source.plain and effect in (None, "tint")  # neither painted over nor of one colour
    texts, repeats = captions(subject, style, color, plain=is_plain), REPEATS if effect is None else 1
    group = GROUPS[subject.group]
    return ImageSpec(
        split, file_name, texts, subject.name, style.name, source.name, source.license, group, repeats, color, effect
    )
