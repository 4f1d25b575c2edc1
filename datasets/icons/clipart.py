"""The Open Clip Art Library: thousands of files of mixed quality, filtered by their titles."""

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from datasets.icons.lexicon import Lexicon, Subject
from datasets.icons.sources import STYLES, Style
from datasets.icons.splits import slug
from datasets.icons.words import WORDS

_SKIPPED = tuple(WORDS["clip_art"]["skipped_folders"])
_NOISE, _STYLE_WORDS = frozenset(WORDS["clip_art"]["noise"]), frozenset(WORDS["clip_art"]["manners"])
# Titles of whole collections, for which the file's name is more specific.
_COLLECTION = re.compile(r"clip ?art|icons?$|aiga|svg|symbols?$|submission|sibmission|collection|pattern|flag", re.I)
_IGNORED_WORDS = re.compile(
    r"\b(colou?r(ed)?|simple|version|small|big|remix|contour|clip ?art|symbol|icon|alt|md|new|another)\b"
)


def read_folder(folder: Path, lexicon: Lexicon, style: Style) -> Iterator[tuple[Path, str, Subject, Style]]:
    """The usable files of an unpacked openclipart-svg package: (file, unique name, subject, style)."""
    root = folder / "usr" / "share" / "openclipart" / "svg"
    seen = set()
    for path in sorted(root.rglob("*.svg")):
        relative_path = path.relative_to(root).as_posix()
        if relative_path.startswith(_SKIPPED):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        title, keywords = _title_and_keywords(text)
        is_black_and_white = re.search(r"\((b and w|b/w|black and white)\)", title, re.I) or path.stem.endswith("_bw")
        content = hash(re.sub(r"<metadata.*?</metadata>|\s+", "", text, flags=re.S))
        if content in seen:  # some drawings are in several folders
            continue
        seen.add(content)
        subject = _subject(title, path.stem, keywords, lexicon)
        if subject:
            name = slug(relative_path.removesuffix(".svg"))
            yield path, name, subject, STYLES["bw_clip_art"] if is_black_and_white else style


def _title_and_keywords(svg: str) -> tuple[str, list[str]]:
    """The title and the keywords of the file's metadata."""
    title = re.search(r"<cc:Work.*?<dc:title>(.*?)</dc:title>", svg, re.S)
    keywords = (unescape(keyword).strip().lower() for keyword in re.findall(r"<rdf:li>(.*?)</rdf:li>", svg, re.S))
    return unescape(title.group(1)).strip() if title else "", [
        keyword for keyword in keywords if re.fullmatch(r"[a-z ]{3,}", keyword)
    ]


def _words(text: str) -> list[str]:
    """Lower-case words without numbers, remarks in parentheses and words about the drawing itself."""
    text = re.sub(r"\(.*?\)|\d+\w{0,2}\b|#", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)).lower()
    text = re.sub(r"\d+", " ", re.split(r" - ", text)[0].replace("_", " ").replace("-", " "))
    words = re.findall(r"[a-z']+", _IGNORED_WORDS.sub(" ", text))
    return words[1:] if words and words[0] in ("a", "an", "the") else words


def _subject(title: str, stem: str, keywords: list[str], lexicon: Lexicon) -> Subject | None:
    """The subject of a title, or of the file's name if the title is a collection's; None if neither is usable."""
    stem_words = _words(stem)
    words = _words(title)
    if not words or _COLLECTION.search(title) or not set(words) & set(stem_words):
        words = stem_words
    known = lexicon.vocabulary | {word for keyword in keywords for word in keyword.split()}
    if not 1 <= len(words) <= 5 or words[-1] in _NOISE or len(words[-1]) < 3:
        return None
    # The last word is the head of an English noun phrase. An unknown one is a proper name or another language.
    english = lexicon.vocabulary | {f"{word}s" for word in lexicon.vocabulary}
    if words[-1] not in english or any(word not in known | english | _NOISE for word in words):
        return None
    if emoji := lexicon.by_name("-".join(words)):
        return emoji
    other_keywords = [keyword for keyword in keywords if keyword not in _STYLE_WORDS and keyword not in words]
    return Subject(" ".join(words), keywords=tuple(dict.fromkeys(other_keywords))[:3])
