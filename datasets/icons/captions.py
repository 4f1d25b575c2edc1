"""Captions: prompts that a person would type for a drawing."""

import re

from datasets.icons.lexicon import SYMBOLS, Subject
from datasets.icons.sources import Style
from datasets.icons.words import WORDS

PLAIN = 3  # captions of a drawing that only name its subject
_UNCOUNTED, _PAIRED = frozenset(WORDS["uncounted"]), frozenset(WORDS["pairs"])
_SINGULAR_ENDINGS = tuple(WORDS["singular_endings"])
_VOWEL_SOUND = re.compile(
    r"(?!(uni|use|usb|uv|eu|one\b|ewe|u-))[aeiou]|(sos|nfc|hour|honest|heir|x-ray|mri|atm|8)\b", re.I
)


def indefinite(phrase: str) -> str:
    """The noun phrase with its indefinite article, if it takes one.

    >>> [indefinite(p) for p in ("castle", "owl", "red sunglasses", "fire", "hourglass", "bus", "slice of bread")]
    ['a castle', 'an owl', 'red sunglasses', 'fire', 'an hourglass', 'a bus', 'a slice of bread']
    """
    # The head of "box of chocolates" or "man with a hat" comes before the preposition.
    head = re.split(r" (?:of|with|in|on|at|behind|without|from|for|and|facing|holding|taking|by) ", phrase.lower())[0]
    word = head.split()[-1] if head.split() else head
    plural = word.endswith("s") and len(word) > 3 and not word.endswith(_SINGULAR_ENDINGS)
    if plural or word in _UNCOUNTED or re.search(r"^(letter|digit|keycap)\b|\b(o'clock|thirty)\b", head):
        return phrase
    if re.match(r"(statue of liberty|milky way|the )", phrase, re.I):
        return phrase if phrase.lower().startswith("the ") else f"the {phrase}"
    if re.match(r"(no|not|\d\w*|men|women|people|mount|mrs|mx|santa|tokyo) ", f"{phrase} ", re.I):
        return phrase
    return f"an {phrase}" if _starts_with_vowel_sound(phrase) else f"a {phrase}"


def _starts_with_vowel_sound(phrase: str) -> bool:
    return phrase.lower().startswith("hourglass") or _VOWEL_SOUND.match(phrase) is not None


def captions(subject: Subject, style: Style, color: str | None = None, plain: bool = True) -> list[str]:
    """The captions of one drawing, the fullest first: "a castle, flat emoji".

    With a color, that of a recoloured drawing, every caption names it ("a red castle, silhouette").

    Args:
        plain: whether the subject alone ("a castle") is a caption of this drawing. It is then repeated PLAIN times at
            the end, since this is what most people type.

    >>> captions(Subject("owl"), Style("flat emoji", of="a flat emoji of"), plain=False)
    ['an owl, flat emoji', 'owl, flat emoji', 'a flat emoji of an owl']
    """

    def named(noun: str) -> str:
        noun = f"{color} {noun}" if color else noun
        return indefinite(noun) if subject.counted else noun

    plain_name = f"{color} {subject.name}" if color else subject.name
    with_article = named(subject.name)
    texts = [f"{with_article}, {style.name}", f"{plain_name}, {style.name}"]
    texts += [f"{with_article}, {words}" for words in style.also]
    texts.append(f"{style.of} {with_article}" if style.of else f"{style.name}, {with_article}")
    if color and style.name.endswith("icon"):
        texts.append(
            f"{indefinite(f'{color} icon')} of {indefinite(subject.name) if subject.counted else subject.name}"
        )
    if subject.name in _PAIRED:
        texts.append(f"{indefinite(f'pair of {plain_name}')}, {style.name}")
    texts += [f"{named(text)}, {style.name}" for text in subject.synonyms]
    if subject.keywords and subject.group != SYMBOLS:
        texts.append(f"{with_article}, {', '.join(subject.keywords[:3])}, {style.name}")
    if color == "grey":
        texts += [text.replace("grey", "gray") for text in texts[:2]]
    texts += [text.replace("color", "colour") for text in texts[:1] if "color" in text]
    if plain:
        texts += [named(text) for text in subject.synonyms]
    return list(dict.fromkeys(texts)) + [with_article] * (PLAIN if plain else 0)
