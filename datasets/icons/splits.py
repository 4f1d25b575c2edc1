"""The split of an image, by a hash of names, so that every build has the same splits."""

import hashlib
import re
import unicodedata

from datasets.icons.words import COLOR_WORDS, WORDS

SPLITS = ("train", "heldout_subjects", "heldout_pairs")
HELD_OUT = 0.03  # fraction of the subjects, and of the (subject, style) pairs
ALWAYS_TRAINED = tuple(WORDS["always_trained"])
_QUALIFIERS = {*WORDS["people"], *COLOR_WORDS, "a", "an", "the", "light"}


def slug(text: str) -> str:
    """Lower-case ASCII words joined by hyphens.

    >>> slug("Piñata: man’s No. 1")
    'pinata-mans-no-1'
    """
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower().replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def subject_key(subject: str) -> str:
    """A key that subjects of nearly the same drawing share, so that they are held out together.

    Leading genders and colours, a final "face" or "facing right", and a plural s are dropped.

    >>> subject_key("woman farmer") == subject_key("farmer"), subject_key("dog face"), subject_key("red hearts")
    (True, 'dog', 'heart')
    """
    words = slug(subject).split("-")
    while len(words) > 1 and words[0] in _QUALIFIERS:
        words = words[1:]
    if len(words) > 2 and words[-2] == "facing":
        words = words[:-2]
    if len(words) > 1 and words[-1] in ("face", "head"):
        words = words[:-1]
    if len(words[-1]) > 3 and words[-1].endswith("s") and not words[-1].endswith("ss"):
        words[-1] = words[-1][:-1]
    return "-".join(words)


def _hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(subject: str, style: str) -> str:
    """The split of an image of `subject` drawn in `style`: one of SPLITS.

    >>> split_of("castle", "3d render")
    'train'
    """
    key = subject_key(subject)
    if key in {subject_key(name) for name in ALWAYS_TRAINED}:
        return "train"
    if _hash_fraction(f"subject:{key}") < HELD_OUT:
        return "heldout_subjects"
    return "heldout_pairs" if _hash_fraction(f"pair:{key}|{slug(style)}") < HELD_OUT else "train"
