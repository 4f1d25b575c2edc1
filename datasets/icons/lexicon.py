"""Names of things: emojibase's names, keywords and groups, by name, code point or name without spaces."""

import re
from pathlib import Path
from typing import NamedTuple

from datasets.icons.fetch import npm_package, read_json
from datasets.icons.sources import WORDS_PACKAGE
from datasets.icons.splits import slug
from datasets.icons.words import COLOR_WORDS, WORDS

# emojibase's numbers of the groups of things that can be drawn.
PEOPLE, NATURE, FOOD, TRAVEL, ACTIVITIES, OBJECTS, SYMBOLS = 1, 3, 4, 5, 6, 7, 8
THINGS = (NATURE, FOOD, TRAVEL, ACTIVITIES, OBJECTS)
FLAGS, _COMPONENTS = 9, 2


class Subject(NamedTuple):
    """The subject of a drawing."""

    name: str  # canonical, without an article: "castle"
    synonyms: tuple[str, ...] = ()  # other names
    keywords: tuple[str, ...] = ()  # related words
    group: int = -1  # emojibase's group; -1 if it is no emoji
    counted: bool = True  # whether it may take an article


def readable(label: str) -> str:
    """An emojibase label as a noun phrase: no colons, no quotation marks.

    >>> readable("woman: red hair"), readable("kiss: woman, man"), readable("keycap: 3"), readable("person: bald")
    ('woman with red hair', 'kiss of woman and man', 'keycap 3', 'bald person')
    """
    label = re.sub(r"[“”\"()!⊛]", "", label).replace("’", "'").strip()
    head, colon, rest = label.partition(": ")
    if not colon:
        return label
    if head == "keycap":
        return f"{head} {rest}"
    if rest in ("bald", "facing right"):
        return f"bald {head}" if rest == "bald" else f"{head} {rest}"
    if head in ("family", "kiss", "couple with heart"):
        *first, last = rest.split(", ")
        return f"{head} of {', '.join(first)} and {last}" if first else f"{head} of {last}"
    return f"{head} with {'a ' if rest == 'beard' else ''}{rest}"


def read_lexicon(cache: Path) -> "Lexicon":
    """The lexicon of the pinned emojibase-data package. Raises BuildError where it cannot be fetched."""
    return Lexicon(npm_package(WORDS_PACKAGE["package"], WORDS_PACKAGE["version"], cache))


class Lexicon:
    """The emoji names of one emojibase-data package (its folder)."""

    def __init__(self, folder: Path):
        entries = [e for e in read_json(folder / "en" / "data.json") if e.get("group", _COMPONENTS) != _COMPONENTS]
        flags = [e for e in entries if e["label"].startswith("flag: ")]
        self.countries = {slug(e["label"].removeprefix("flag: ")) for e in flags}
        entries = [e for e in entries if not e["label"].startswith("flag: ")]
        labels = {slug(e["label"]) for e in entries}
        shortcodes = _shortcodes(folder)
        self._by_slug: dict[str, Subject] = {}
        self._by_code: dict[str, Subject] = {}
        for entry in entries:
            code = _code(entry["hexcode"])
            self._by_code[code] = _subject(entry, [s for s, owner in shortcodes.items() if owner == code], labels)
            self._by_slug[slug(entry["label"])] = self._by_code[code]
        by_shortcode = {
            s.replace("-", ""): self._by_code[owner] for s, owner in shortcodes.items() if owner in self._by_code
        }
        self._by_run = by_shortcode | {name.replace("-", ""): subject for name, subject in self._by_slug.items()}
        texts = (text for e in entries for text in (readable(e["label"]), *e.get("tags", ())))
        self.vocabulary = {word.strip(".,'") for text in texts for word in re.split(r"[\s-]+", text.lower())}

    def by_name(self, name: str) -> Subject | None:
        """The subject of a hyphenated name, current or former ("bear-face" is the bear)."""
        name = WORDS["renamed"].get(name, name).removeprefix("lower-left-")
        for candidate in (name, name.removesuffix("-face"), name.replace("cat-face", "cat"), f"{name}-face"):
            if candidate in self._by_slug:
                return self._by_slug[candidate]
        return None

    def by_code(self, code: str) -> Subject | None:
        """The subject of a code-point sequence such as "1f5a8-fe0f"; None for skin tones, flags and unknown ones."""
        return self._by_code.get(_code(code))

    def by_run_together(self, name: str) -> Subject | None:
        """The subject of a name without spaces, such as "postalhorn"."""
        return self._by_run.get(name)

    def is_skin_tone(self, name: str) -> bool:
        """Whether a hyphenated name is a skin-tone variant of another."""
        return "skin-tone" in name or (
            name not in self._by_slug and re.search(r"-(medium-)?(light|dark)$|-medium$", name) is not None
        )


def _code(hexcode: str) -> str:
    """A code-point sequence without its presentation selectors."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _subject(entry: dict, shortcodes: list[str], labels: set[str]) -> Subject:
    name = readable(entry["label"])
    words = re.split(r"[\s-]+", name.lower())
    tags = [tag for tag in entry.get("tags", ()) if tag.isascii() and tag.replace(" ", "").isalpha() and len(tag) > 2]
    # Inflections of the name's words add nothing: "castles" beside "castle".
    tags = [
        tag
        for tag in tags
        if not any(tag[:4] == word[:4] or tag == f"{word}s" for word in words)
        and not (tag[-1] == "s" and tag[:-1] in tags)
    ]
    codes = sorted(code for code in shortcodes if entry["group"] in THINGS and code not in labels)
    synonyms = [
        *WORDS["everyday"].get(name, ()),
        *(code.replace("-", " ") for code in codes if _is_other_name(code, words)),
    ]
    return Subject(name, tuple(dict.fromkeys(synonyms))[:2], tuple(tags[:4]), entry["group"])


def _is_other_name(code: str, words: list[str]) -> bool:
    """Whether a shortcode is another name than `words`, and not a respelling ("teddybear"), part or inversion of it."""
    parts = code.split("-")
    if len(code) < 4 or not "".join(parts).isalpha() or "left" in parts or not COLOR_WORDS.isdisjoint(parts):
        return False
    return "".join(parts) not in "".join(words) and not set(parts) <= {*words, "face"} and parts[: len(words)] != words


def _shortcodes(folder: Path) -> dict[str, str]:
    """Hyphenated shortcodes of exactly one emoji -> its code points."""
    owners: dict[str, set[str]] = {}
    for name in ("cldr", "emojibase", "github", "iamcal", "joypixels"):
        path = folder / "en" / "shortcodes" / f"{name}.json"
        for code, codes in (read_json(path) if path.exists() else {}).items():
            for shortcode in [codes] if isinstance(codes, str) else codes:
                owners.setdefault(slug(shortcode), set()).add(_code(code))
    return {shortcode: min(codes) for shortcode, codes in owners.items() if len(codes) == 1}
