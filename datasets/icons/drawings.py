"""Reading packages: one record for every drawing of the set, named and ready to render."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from datasets.icons import clipart
from datasets.icons.fetch import BuildError, read_json
from datasets.icons.lexicon import THINGS, Lexicon, Subject
from datasets.icons.sources import STYLES, Source, Style
from datasets.icons.splits import slug
from datasets.icons.words import WORDS


class Drawing(NamedTuple):
    """One drawing of a package."""

    source: Source
    name: str  # file stem, unique within the source
    subject: Subject
    style: Style
    svg: str | None = None  # the document, or
    path: Path | None = None  # its file


MARGIN = 1 / 32  # of the image's side, left empty on each side
_BRANDS = frozenset(WORDS["brands"])
_EVERYDAY = {slug(word): slug(name) for name, words in WORDS["everyday"].items() for word in words}
_FXEMOJI: dict[str, str] = WORDS["fxemoji"]


def read_drawings(source: Source, folder: Path, lexicon: Lexicon, flags: bool = False) -> list[Drawing]:
    """The drawings of an unpacked package, sorted by name.

    Skin tones and drawings without a meaningful name are left out, and flags of countries unless `flags`.

    Raises:
        BuildError: the package is malformed, or has no such drawing.
    """
    if source.kind == "iconify":
        unsorted = _iconify(source, folder, lexicon, flags)
    elif source.kind == "webp":
        unsorted = _webp(source, folder, lexicon)
    else:
        unsorted = _clip_art(source, folder, lexicon)
    drawings = sorted(unsorted, key=lambda drawing: drawing.name)
    if not drawings:
        raise BuildError(f"{folder} ({source.package}) holds no drawing that can be named: delete it and run again.")
    return drawings


def _iconify(source: Source, folder: Path, lexicon: Lexicon, flags: bool) -> Iterator[Drawing]:
    package = read_json(folder / "icons.json")
    icons = package.get("icons") if isinstance(package, dict) else None
    if not isinstance(icons, dict):
        raise BuildError(f"{folder / 'icons.json'} is not an Iconify set: delete the folder {folder} and run again.")
    former_names: dict[str, str] = {}
    for alias, entry in package.get("aliases", {}).items():
        if lexicon.by_name(alias) and not {"hFlip", "vFlip", "rotate"} & entry.keys():
            former_names.setdefault(entry["parent"], alias)
    name_of = _NAMING.get(source.name, _known_thing if source.names else _emoji_name)
    for name, icon in icons.items():
        if not re.search(source.names, name):
            continue
        is_flag = name.startswith("flag-") or name in lexicon.countries
        if icon.get("hidden") or lexicon.is_skin_tone(name) or (is_flag and not flags):
            continue
        subject = _flag(name) if is_flag else name_of(name, former_names.get(name), lexicon, icons)
        if subject is None:
            continue
        style = STYLES["outline_weather"] if source.name == "meteocons" and not name.endswith("-fill") else source.style
        width, height = (icon.get(side, package.get(side, 16)) for side in ("width", "height"))
        yield Drawing(source, name, subject, style, svg=_square(icon["body"], width, height))


def _square(body: str, width: float, height: float) -> str:
    """An SVG document with `body` centred on a square canvas with a margin."""
    if "<animate" in body:  # elements that an animation fades in (rain, snow) start transparent
        body = re.sub(r'(?<=\s)opacity="0"', "", body)
    side = max(width, height) / (1 - 2 * MARGIN)
    box = f"{(width - side) / 2:g} {(height - side) / 2:g} {side:g} {side:g}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} width="{side:g}" height="{side:g}" viewBox="{box}" color="black">{body}</svg>'


def _flag(name: str) -> Subject:
    country = re.sub(r"^(flag-|for-)+", "", name).replace("-", " ")
    return Subject(f"flag of {country}")


def _emoji_name(name: str, former_name: str | None, lexicon: Lexicon, icons: dict) -> Subject | None:
    """An emoji's CLDR name, or its own words for the few without one."""
    del icons
    subject = lexicon.by_name(name) or (lexicon.by_name(former_name) if former_name else None)
    return subject or Subject(name.replace("-", " "))


def _without_number(name: str, former_name: str | None, lexicon: Lexicon, icons: dict) -> Subject | None:
    """The name without the number of its variant ("fox-face-2"); None for brands."""
    if name in _BRANDS or not re.search("[a-z]{2}", name):
        return None
    plain = re.sub(r"-?\d+$", "", name)
    # Icons of user interfaces show actions as often as things: "add image".
    return lexicon.by_name(plain) or Subject(plain.replace("-", " "), counted=False)


def _known_thing(name: str, former_name: str | None, lexicon: Lexicon, icons: dict) -> Subject | None:
    """The subject of an icon whose name, or everyday English for it, is that of an emoji: "car-3-fill"."""
    del former_name, icons
    plain = re.sub(r"(-(fill|filled|outline|line|\d+))+$", "", name)
    subject = lexicon.by_name(plain) or lexicon.by_name(_EVERYDAY.get(plain, "")) or lexicon.by_run_together(plain)
    return subject if subject and subject.group in THINGS else None


def _weather(name: str, former_name: str | None, lexicon: Lexicon, icons: dict) -> Subject | None:
    """A weather name; None for clock times, codes and placeholders, which show no weather."""
    del former_name, lexicon, icons
    if re.match(r"(time|code|not-available|extreme$)", name):
        return None
    words = name.removesuffix("-fill").replace("-day", " by day").replace("-night", " at night").split("-")
    *rest, last = " ".join(words).replace("by day ", "by day, ").replace("at night ", "at night, ").split(", ")
    # "overcast by day, rain" becomes "overcast rain by day".
    name = f"{rest[0].rsplit(' ', 2)[0]} {last} {' '.join(rest[0].rsplit(' ', 2)[1:])}" if rest else last
    return Subject(name, counted=False)


def _run_together(name: str, former_name: str | None, lexicon: Lexicon, icons: dict) -> Subject | None:
    """fxemoji's names have no spaces; "dogside" is the dog, and then "dog" is the dog's face."""
    del former_name
    if name in _FXEMOJI:
        return lexicon.by_name(_FXEMOJI[name])
    if name.endswith("side") and (subject := lexicon.by_run_together(name.removesuffix("side"))):
        return subject
    if f"{name}side" in icons and (subject := lexicon.by_run_together(f"{name}face")):
        return subject
    return lexicon.by_run_together(name)


_NAMING: dict[str, Callable[[str, str | None, Lexicon, dict], Subject | None]] = {
    "fxemoji": _run_together,
    "streamline": _without_number,
    "flat-color-icons": _without_number,
    "meteocons": _weather,
}


def _webp(source: Source, folder: Path, lexicon: Lexicon) -> Iterator[Drawing]:
    taken_names = set()
    for path in sorted((folder / "assets").glob("*.webp")):
        subject = lexicon.by_code(path.stem)
        if subject and slug(subject.name) not in taken_names:
            taken_names.add(slug(subject.name))
            yield Drawing(source, slug(subject.name), subject, source.style, path=path)


def _clip_art(source: Source, folder: Path, lexicon: Lexicon) -> Iterator[Drawing]:
    taken_names = set()
    for path, name, subject, style in clipart.read_folder(folder, lexicon, source.style):
        if name in taken_names:
            continue
        taken_names.add(name)
        yield Drawing(source, name, subject, style, path=path)
