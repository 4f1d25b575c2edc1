"""The prompts that models are judged by: `icons_prompts.json` as a list of images to draw."""

import json
from pathlib import Path
from typing import NamedTuple

from datasets.icons.captions import indefinite

PROMPTS = Path(__file__).with_name("icons_prompts.json")
KINDS = ("plain", "style", "color", "background", "variety", "look")
SEEDS = {"plain": 2, "variety": 4}  # images a prompt; one of the others
SHOWN = 40  # plain prompts on the sheet: the first ones


class Request(NamedTuple):
    """One image to draw."""

    prompt: str
    seed: int
    thing: str  # what is drawn, as plain prompts say it
    attribute: str = ""  # the style or colour that the prompt names


def subjects() -> dict[str, str]:
    """The CLDR name of what each plain prompt asks for."""
    return {entry["prompt"]: entry["subject"] for entry in _read()["plain"]}


def styles() -> list[str]:
    return _read()["style"]["styles"]


def requests(kind: str) -> list[Request]:
    """The images of one kind, those of one prompt together."""
    prompts = _prompts(kind, _read()[kind])
    # Seeds of kinds lie apart, so that no two images start from the same noise.
    first, seeds = 10_000 * KINDS.index(kind), SEEDS.get(kind, 1)
    repeated = [part for part in prompts for _ in range(seeds)]
    return [Request(prompt, first + i, thing, wanted) for i, (prompt, thing, wanted) in enumerate(repeated)]


def columns(kind: str) -> int:
    """Images in a row of the kind's sheet."""
    part = _read()[kind]
    for key in ("styles", "colors", "backgrounds"):
        if kind != "plain" and key in part:
            return len(part[key])
    return SEEDS["variety"] if kind == "variety" else 8


def _read() -> dict:
    return json.loads(PROMPTS.read_text(encoding="utf-8"))


def _prompts(kind: str, part) -> list[tuple[str, str, str]]:
    """(prompt, thing, wanted) of a kind."""
    if kind == "plain":
        return [(entry["prompt"], entry["prompt"], "") for entry in part]
    things = part["things"]
    if kind == "color":
        return [(indefinite(f"{c} {thing}"), indefinite(thing), c) for thing in things for c in part["colors"]]
    if kind == "background":
        return [
            (f"{thing}, on {indefinite(f'{c} background')}", thing, c) for thing in things for c in part["backgrounds"]
        ]
    if kind == "variety":
        return [(thing, thing, "") for thing in things]
    return [(f"{thing}, {style}" if style else thing, thing, style) for thing in things for style in part["styles"]]
