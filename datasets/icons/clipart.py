"""The Open Clip Art Library: thousands of files of mixed quality, of which those with a sane title are kept."""

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from datasets.icons.lexicon import Lexicon, Subject
from datasets.icons.sources import STYLES, Style
from datasets.icons.splits import slug
from datasets.icons.words import WORDS

_SKIPPED = tuple(WORDS["clip_art"]["skipped_folders"])
_NOISE, _MANNERS = frozenset(WORDS["clip_art"]["noise"]), frozenset(WORDS["clip_art"]["manners"])
# Titles that whole collections share; the file's name says more.
_COLLECTION = re.compile(r"clip ?art|icons?$|aiga|svg|symbols?$|submission|sibmission|collection|pattern|flag", re.I)
_DROPPED = re.compile(
    r"\b(colou?r(ed)?|simple|version|small|big|remix|contour|clip ?art|symbol|icon|alt|md|new|another)\b"
)


def read_folder(folder: Path, lexicon: Lexicon, style: Style) -> Iterator[tuple[Path, str, Subject, Style]]:
    """The files worth having of an unpacked openclipart-svg package: (file, unique name, subject, style)."""
    root = folder / "usr" / "share" / "openclipart" / "svg"
    seen = set()
    for path in sorted(root.rglob("*.svg")):
        place = path.relative_to(root).as_posix()
        if place.startswith(_SKIPPED):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        title, keywords = _described(text)
        plain = re.search(r"\((b and w|b/w|black and white)\)", title, re.I) or path.stem.endswith("_bw")
        content = hash(re.sub(r"<metadata.*?</metadata>|\s+", "", text, flags=re.S))
        if content in seen:  # some drawings are filed in several folders
            continue
        seen.add(content)
        subject = _subject(title, path.stem, keywords, lexicon)
        if subject:
            name = slug(place.removesuffix(".svg"))
            yield path, name, subject, STYLES["bw_clip_art"] if plain else style


def _described(svg: str) -> tuple[str, list[str]]:
    """The title and the keywords of the file's metadata."""
    title = re.search(r"<cc:Work.*?<dc:title>(.*?)</dc:title>", svg, re.S)
    keywords = (unescape(k).strip().lower() for k in re.findall(r"<rdf:li>(.*?)</rdf:li>", svg, re.S))
    return unescape(title.group(1)).strip() if title else "", [k for k in keywords if re.fullmatch(r"[a-z ]{3,}", k)]


def _words(text: str) -> list[str]:
    """Lower-case words without authors' numbers, remarks in parentheses and the words of drawing."""
    text = re.sub(r"\(.*?\)|\d+\w{0,2}\b|#", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)).lower()
    text = re.sub(r"\d+", " ", re.split(r" - ", text)[0].replace("_", " ").replace("-", " "))
    words = re.findall(r"[a-z']+", _DROPPED.sub(" ", text))
    return words[1:] if words and words[0] in ("a", "an", "the") else words


def _subject(title: str, stem: str, keywords: list[str], lexicon: Lexicon) -> Subject | None:
    """The subject that a title names, or the file's name where collections share the title; None if none is sane."""
    named = _words(stem)
    words = _words(title)
    if not words or _COLLECTION.search(title) or not set(words) & set(named):
        words = named
    known = lexicon.vocabulary | {word for k in keywords for word in k.split()}
    if not 1 <= len(words) <= 5 or words[-1] in _NOISE or len(words[-1]) < 3:
        return None
    # The last word is the head of an English noun phrase: an unknown one is a name or another language.
    english = lexicon.vocabulary | {f"{word}s" for word in lexicon.vocabulary}
    if words[-1] not in english or any(word not in known | english | _NOISE for word in words):
        return None
    if emoji := lexicon.by_name("-".join(words)):
        return emoji
    extra = [k for k in keywords if k not in _MANNERS and k not in words]
    return Subject(" ".join(words), keywords=tuple(dict.fromkeys(extra))[:3])
