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

MAX_WEIGHT = 1000.0  # of a token, in absolute value; a thousand nested brackets would overflow

_STEP = 1.1  # factor of a pair of round brackets; square ones divide by it
_BRACKET = re.compile(r"[()\[\]]")
_MARKS = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)")
_BREAK = re.compile(r"\bBREAK\b")


class Piece(NamedTuple):
    """A stretch of a prompt with one weight."""

    text: str | None  # None: the next chunk begins here
    weight: float = 1.0


def parse_emphasis(prompt: str) -> list[Piece]:
    r"""A prompt as stretches of text with their weights.

    Weights of nested brackets multiply. An unmatched closing bracket is text; an unmatched opening one reaches to the
    end of the prompt. A prompt without brackets is left as it is, backslashes included.

    >>> [tuple(p) for p in parse_emphasis("a (red:1.3) castle (at night) \\(photo\\)")]
    [('a ', 1.0), ('red', 1.3), (' castle ', 1.0), ('at night', 1.1), (' (photo)', 1.0)]
    """
    texts: list[str | None] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # index of the first text inside each bracket still open
    spans: list[tuple[int, int | None, float]] = []  # texts from, to, factor

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
            spans.append((opened["("].pop(), len(texts), factor))
        elif mark == "]" and opened["["]:
            spans.append((opened["["].pop(), len(texts), 1 / _STEP))
        else:
            texts.append(mark[1:] if mark[0] == "\\" else mark)
    add(prompt[position:])
    spans += [(start, None, _STEP if mark == "(" else 1 / _STEP) for mark in opened for start in opened[mark]]
    weights = np.ones(len(texts))
    for start, end, factor in spans:
        weights[start:end] = np.clip(factor * weights[start:end], -MAX_WEIGHT, MAX_WEIGHT)
    return _merge_neighbours([Piece(*pair) for pair in zip(texts, weights.tolist(), strict=True)])


def _merge_neighbours(pieces: list[Piece]) -> list[Piece]:
    """Merge neighbours of equal weight, so that a word is not tokenized in parts, and drop empty ones."""
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
    """Multiply each token's embedding by its weight, then rescale each chunk to its original mean.

    (The AUTOMATIC1111 web UI takes the mean over the whole batch, so that an image depends on the other prompts.)

    Args:
        states: the embeddings [B, K L, D].
        weights: [B, K L]; None, or all 1: the embeddings are returned as they are.
        length: L, tokens of a chunk.

    Returns:
        [B, K L, D] in the dtype of `states`.
    """
    if weights is None:
        return states
    before = states.astype(jnp.float32).reshape(len(states), -1, min(length, states.shape[1]), states.shape[-1])
    weights = jnp.asarray(weights).reshape(*before.shape[:3], 1)
    after = before * weights
    old, new = (jnp.mean(x, (-2, -1), keepdims=True) for x in (before, after))
    # Exactly 1 without emphasis, even if the compiler sums the two means in different orders.
    unchanged = (new == 0) | (weights == 1).all(-2, keepdims=True)
    ratio = jnp.where(unchanged, 1, old / jnp.where(new == 0, 1, new))
    return (after * ratio).reshape(states.shape).astype(states.dtype)
