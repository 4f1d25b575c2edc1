"""The packages that the icons set is drawn from and the styles that it names: the tables of `sources.toml`."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Style(NamedTuple):
    """A style of drawing, and its words in captions."""

    name: str  # canonical: the `style` column, the held-out pairs, and the first caption use it
    also: tuple[str, ...] = ()  # synonyms, used after a comma: "a castle, <words>"
    of: str = ""  # words before the subject: "<words> a castle"


class Source(NamedTuple):
    """One package of drawings, pinned."""

    name: str
    kind: Literal["iconify", "webp", "openclipart"]
    package: str
    version: str
    style: Style
    license: str
    author: str
    url: str
    paintings: bool = False  # its drawings are also repainted by every effect
    recolor: int = 0  # for one-color drawings: number of named colors to fill them with, including black
    tint: bool = False  # color drawings of things are also tinted with other colors
    trim: bool = False  # crop drawings to their ink, as their canvas is mostly empty
    plain: bool = True  # whether the subject alone is a caption of its drawings
    names: str = ""  # pattern of the names to take, which must also be known things; "": all


def _style(entry: Mapping[str, Any]) -> Style:
    return Style(entry["name"], tuple(entry.get("also", ())), entry.get("of", ""))


_TABLES = tomllib.loads(Path(__file__).with_name("sources.toml").read_text(encoding="utf-8"))
SOURCES = tuple(Source(**{**entry, "style": _style(entry["style"])}) for entry in _TABLES["sources"])
WORDS_PACKAGE: dict[str, str] = _TABLES["words"]  # package, version, license, author
STYLES = {name: _style(entry) for name, entry in _TABLES["styles"].items()}
PAINTINGS = {effect: _style(entry) for effect, entry in _TABLES["paintings"].items()}
COLORS: dict[str, tuple[int, int, int]] = {name: (r, g, b) for name, (r, g, b) in _TABLES["colors"].items()}
COLORLESS = ("pencil", "line")  # paintings that show no color


def select(names: str) -> tuple[Source, ...]:
    """The sources of a comma-separated list of names, in the table's order; "all" or "" means every one.

    Raises:
        ValueError: a name is not in the table; the message lists those that are.
    """
    requested = {name.strip() for name in names.split(",") if name.strip()}
    known = {source.name for source in SOURCES}
    if not requested or requested == {"all"}:
        return SOURCES
    if unknown := sorted(requested - known):
        raise ValueError(f"--sources: unknown {', '.join(unknown)}; the known ones are {', '.join(sorted(known))}.")
    return tuple(source for source in SOURCES if source.name in requested)
