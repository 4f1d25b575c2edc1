r"""Emphasis: brackets in a prompt become weights of its tokens, which scale the embeddings.

It is written as in the AUTOMATIC1111 web UI, whose prompts people share:

    (word)  x 1.1      ((word))  x 1.21      (word:1.3)  x 1.3      [word]  / 1.1      \( a bracket itself

BREAK (a word, in capitals) starts the next chunk.
"""

import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.typing import Array

MAX_WEIGHT = 1000.0  # of a token, either side of 0; brackets a thousand deep would be infinite

_STEP = 1.1  # the weight of one pair of round brackets, and one over that of square ones
_BRACKET = re.compile(r"[()\[\]]")
_MARKS = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)")
_BREAK = re.compile(r"\bBREAK\b")


class Piece(NamedTuple):
    """A stretch of a prompt with one weight."""

    text: str | None  # None: the next chunk begins here
    weight: float = 1.0


def parse_emphasis(prompt: str) -> list[Piece]:
    r"""A prompt as stretches of text with their weights.

    Weights of nested brackets multiply. A closing bracket without an opening one is text; an opening one that is never
    closed reaches to the end of the prompt. A text without any bracket is left as it is, backslashes included.

    >>> [tuple(p) for p in parse_emphasis("a (red:1.3) castle (at night) \\(photo\\)")]
    [('a ', 1.0), ('red', 1.3), (' castle ', 1.0), ('at night', 1.1), (' (photo)', 1.0)]
    """
    texts: list[str | None] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # index of the first text inside each bracket still open
    scaled: list[tuple[int, int | None, float]] = []  # texts from, to, factor

    def add(text: str) -> None:
        for i, part in enumerate(_BREAK.split(text)):
            texts.extend([None, part] if i else [part])

    position = 0
    for match in _MARKS.finditer(prompt) if _BRACKET.search(prompt) else ():
        add(prompt[position : match.start()])
        position, mark = match.end(), match[0]
        if mark in opened:
            opened[mark].append(len(texts))
        elif mark[0] in ":)" and opened["("]:
            factor = min(float(match[1]), MAX_WEIGHT) if match[1] else _STEP
            scaled.append((opened["("].pop(), len(texts), factor))
        elif mark == "]" and opened["["]:
            scaled.append((opened["["].pop(), len(texts), 1 / _STEP))
        else:
            texts.append(mark[1:] if mark[0] == "\\" else mark)
    add(prompt[position:])
    scaled += [(start, None, _STEP if mark == "(" else 1 / _STEP) for mark in opened for start in opened[mark]]
    weights = np.ones(len(texts))
    for start, end, factor in scaled:
        weights[start:end] = np.clip(factor * weights[start:end], -MAX_WEIGHT, MAX_WEIGHT)
    return _merged([Piece(*pair) for pair in zip(texts, weights.tolist(), strict=True)])


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one weight as one piece, so that a word is not tokenized in parts, and no empty ones."""
    merged: list[Piece] = []
    for text, weight in pieces:
        last = merged[-1] if merged else Piece(None)
        if text is None:
            merged.append(Piece(None))
        elif text and last.text is not None and last.weight == weight:
            merged[-1] = Piece(last.text + text, weight)
        elif text:
            merged.append(Piece(text, weight))
    return merged


def apply_emphasis(states: Array, weights: Array | None, length: int) -> Array:
    """Each token's embedding times its weight, and each chunk rescaled to its former mean; weights of 1 change nothing.

    The AUTOMATIC1111 web UI takes the mean over the whole batch, which makes an image depend on the prompts beside it.

    Args:
        states: the embeddings [B, K L, D].
        weights: [B, K L], or None, which changes nothing.
        length: L, tokens of a chunk.
    """
    if weights is None:
        return states
    before = states.astype(jnp.float32).reshape(len(states), -1, min(length, states.shape[1]), states.shape[-1])
    weights = jnp.asarray(weights).reshape(*before.shape[:3], 1)
    after = before * weights
    old, new = (jnp.mean(x, (-2, -1), keepdims=True) for x in (before, after))
    # Without emphasis exactly 1, though the sums of both means may be taken in different orders.
    kept = (new == 0) | (weights == 1).all(-2, keepdims=True)
    ratio = jnp.where(kept, 1, old / jnp.where(new == 0, 1, new))
    return (after * ratio).reshape(states.shape).astype(states.dtype)
