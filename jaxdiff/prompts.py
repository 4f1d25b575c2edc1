r"""Prompts to what the text encoders read: emphasis, chunks of a text too long for one, and prompts from files.

Emphasis is written as in the AUTOMATIC1111 web UI, whose prompts people share:

    (word)  x 1.1      ((word))  x 1.21      (word:1.3)  x 1.3      [word]  / 1.1      \( a bracket itself

BREAK (a word, in capitals) starts the next chunk.
"""

import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging

from jaxdiff.errors import ArgumentError
from jaxdiff.tokenizer import Tokenizer
from jaxdiff.typing import Array

MAX_CHUNKS = 16  # of one prompt: 1,200 tokens; attention to the text costs time and memory in proportion
BACKTRACK = 20  # tokens: how far before a full chunk's end a comma is looked for, to cut there
MAX_WEIGHT = 1000.0  # of a token, either side of 0; brackets a thousand deep would be infinite

_STEP = 1.1  # the weight of one pair of round brackets, and one over that of square ones
_BRACKET = re.compile(r"[()\[\]]")
_MARKS = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)")
_BREAK = re.compile(r"\bBREAK\b")


class PromptError(ValueError):
    """A prompt, or a file of prompts, styles or wildcards, that cannot be used."""


class Tokens(NamedTuple):
    """What `encode_text` reads of B prompts, each in K chunks of L tokens (start, text, end, padding); B first."""

    ids: Array  # [B, K L] int32, for the first text encoder that the model has
    weights: Array | None = None  # [B, K L] float32, emphasis; None where no prompt has any
    ids_2: Array | None = None  # the same for the second encoder (SDXL)
    weights_2: Array | None = None
    zeros: Array | None = None  # [B] bool: whose embeddings are zeros, as SDXL has it for no negative prompt at all
    # [B, K L] float32: 1 in a prompt's own chunks and 0 in those that fill it up to the longest one's K, so that no
    # picture depends on the prompts beside it. None where K is 1.
    attention_mask: Array | None = None


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


class Encoders(Protocol):
    """What is asked of a model here."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def tokenizer_2(self) -> Tokenizer | None: ...
    @property
    def options(self) -> Any: ...


def tokens(
    model: Encoders,
    prompts: Sequence[str | None],
    prompts_2: Sequence[str | None] | None = None,
    *,
    emphasis: bool = True,
    chunks: int | None = None,
) -> Tokens:
    """Prompts to what the model's text encoders read. Host side.

    Prompts and negative prompts of one picture need the same number of chunks: encode them in one call and split the
    rows, or give `chunks`.

    Args:
        model: of one text encoder or two.
        prompts: B of them; None is the empty prompt, or no text at all (zeros) where the model's options say so.
        prompts_2: what the second encoder of SDXL reads, prompt by prompt; None, or None for a prompt, is the same.
        emphasis: whether brackets and BREAK mean something.
        chunks: K, how many chunks each prompt has; None takes as many as the longest needs, MAX_CHUNKS at most. What
            does not fit is left out with a warning, once a prompt.

    Raises:
        TypeError: `prompts` is not a sequence of strings or Nones.
        ValueError: as many `prompts_2` as `prompts` are needed, or none, and a second encoder that reads them;
            `chunks` is not 1 to MAX_CHUNKS.
    """
    for name, given in (("prompts", prompts), ("prompts_2", prompts_2 or ())):
        if isinstance(given, str) or not all(p is None or isinstance(p, str) for p in given):
            raise TypeError(f"{name} must be a list of strings, not {given!r}.")
    if prompts_2 is not None and len(prompts_2) != len(prompts):
        raise ArgumentError("prompts_2", f"holds {len(prompts_2)} for {len(prompts)} prompts: give one a prompt.")
    if model.tokenizer_2 is None and any(p is not None for p in prompts_2 or ()):
        raise ArgumentError("prompts_2", "are for the second text encoder of SDXL, which this model lacks.")
    if chunks is not None and not 1 <= chunks <= MAX_CHUNKS:
        raise ValueError(f"chunks {chunks} must be 1 to {MAX_CHUNKS}.")
    second = prompts if prompts_2 is None else [a if b is None else b for a, b in zip(prompts, prompts_2, strict=True)]
    tokenizers = [t for t in (model.tokenizer, model.tokenizer_2) if t is not None]
    split = [
        [_chunks(tokenizer, prompt or "", emphasis, chunks or MAX_CHUNKS) for prompt in texts]
        for tokenizer, texts in zip(tokenizers, (prompts, second), strict=False)  # the refiner's only one reads prompts
    ]
    own = np.array([[len(parts) for parts in rows] for rows in split]).max(0)  # [B]
    count = chunks or int(own.max(initial=1))
    (ids, weights), *rest = [_arrays(t, rows, count) for t, rows in zip(tokenizers, split, strict=True)]
    ids_2, weights_2 = rest[0] if rest else (None, None)
    force = model.tokenizer_2 is not None and model.options.force_zeros_for_empty_prompt
    zeros = np.array([p is None for p in prompts], bool) if force else None
    filled = np.arange(count) < own[:, None]  # [B, K]
    mask = None if count == 1 else filled.repeat(ids.shape[1] // count, axis=1).astype(np.float32)
    return Tokens(ids, weights, ids_2, weights_2, zeros, mask)


def weighed(tokens: Tokens) -> Tokens:
    """The tokens with a weight each, 1 where no prompt has any: with brackets or without, one compiled program."""

    def filled(ids: Array, weights: Array | None) -> Array:
        return np.ones(ids.shape, np.float32) if weights is None else weights

    second = None if tokens.ids_2 is None else filled(tokens.ids_2, tokens.weights_2)
    return tokens._replace(weights=filled(tokens.ids, tokens.weights), weights_2=second)


Chunk = list[tuple[int, float]]  # ids of the text with their weights, without start and end


def _chunks(tokenizer: Tokenizer, prompt: str, emphasis: bool, limit: int) -> list[Chunk]:
    """One prompt's chunks, `limit` at most, cut after a comma where one is near.

    A learned word of several vectors stays whole, as in the web UI: where it no longer fits, the next chunk begins.
    """
    size = tokenizer.max_length - 2
    pieces = parse_emphasis(prompt) if emphasis else [Piece(prompt)]
    encoded = iter(tokenizer.encode_words([p.text for p in pieces if p.text is not None]))
    (comma,) = tokenizer.encode([","])
    done: list[Chunk] = []
    chunk: Chunk = []
    for text, weight in pieces:
        if text is None:
            done.append(chunk)
            chunk = []
            continue
        for word in itertools.chain.from_iterable(map(_fitting, next(encoded), itertools.repeat(size))):
            if len(chunk) == size:
                hard = word == comma or len(done) == limit - 1
                cut = size if hard else _cut(chunk, comma)
                done.append(chunk[:cut])
                chunk = chunk[cut:]
            if len(chunk) + len(word) > size:
                done.append(chunk)
                chunk = []
            chunk += [(token, weight) for token in word]
    if chunk or not done:
        done.append(chunk)
    if len(done) > limit:
        left = tokenizer.decode([token for chunk in done[limit:] for token, _ in chunk])
        _warn_cut(prompt, len(done), limit, left)
    return done[:limit]


def _fitting(word: list[int], size: int) -> list[list[int]]:
    """A token's vectors in one piece, or in several where there are more than a chunk holds."""
    return [word[i : i + size] for i in range(0, len(word), size)]


def _cut(chunk: Chunk, comma: list[int]) -> int:
    """How many tokens of a full chunk stay in it: up to the last comma, if it is among the last BACKTRACK tokens."""
    near = range(len(chunk) - 1, max(len(chunk) - BACKTRACK, 0) - 1, -1)
    return next((i + 1 for i in near if [chunk[i][0]] == comma), len(chunk))


def _arrays(tokenizer: Tokenizer, prompts: list[list[Chunk]], count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids and weights [B, K L] of B prompts; prompts of fewer chunks are filled up with empty ones."""
    length = tokenizer.max_length
    ids = np.full((len(prompts), count, length), tokenizer.pad_id, np.int32)
    weights = np.ones(ids.shape, np.float32)
    ids[..., 0], ids[..., 1] = tokenizer.bos_id, tokenizer.eos_id
    for i, chunks in enumerate(prompts):
        for j, chunk in enumerate(chunks):
            end = len(chunk) + 1
            ids[i, j, 1:end] = [token for token, _ in chunk]
            ids[i, j, end] = tokenizer.eos_id
            weights[i, j, 1:end] = [weight for _, weight in chunk]
    plain = bool((weights == 1).all())
    return ids.reshape(len(prompts), -1), None if plain else weights.reshape(len(prompts), -1)


@functools.lru_cache(maxsize=4096)
def _warn_cut(prompt: str, chunks: int, limit: int, left: str) -> None:
    logging.warning(
        "The prompt %.60r… fills %d chunks; the text after the first %d is left out: %s",
        prompt,
        chunks,
        limit,
        left if len(left) <= 200 else f"{left[:100]} … {left[-99:]}",
    )


class PromptLine(NamedTuple):
    """One picture's line of a prompts file."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None


def read_prompts(path: str | Path) -> list[PromptLine]:
    """Prompts from a UTF-8 text file, one a line; lines that begin with # are comments.

    In a file whose name ends in .jsonl each line is a JSON object instead, with the keys of `PromptLine`.

    Raises:
        PromptError: the file is missing, not UTF-8 or without a prompt; a line is empty (but for those at the end) or,
            in a .jsonl file, not such an object. The sentence names the file and the line.
    """
    path = Path(path)
    read = _from_json if path.suffix == ".jsonl" else PromptLine
    prompts = []
    for number, line in enumerate(read_lines(path, "prompts file"), 1):
        if not line:
            raise PromptError(f"Line {number} of {path} is empty: write a prompt there, or delete the line.")
        if not line.startswith("#"):
            try:
                prompts.append(read(line))
            except ValueError as e:
                raise PromptError(f"Line {number} of {path} {e}.") from None
    if not prompts:
        raise PromptError(f"{path} holds no prompt: write one a line.")
    return prompts


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 file, stripped, without the empty ones at its end; `what` names the file in errors."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PromptError(f"The {what} {path} does not exist.") from None
    except UnicodeDecodeError as e:
        raise PromptError(f"The {what} {path} is not UTF-8 text (byte {e.start}): save it as UTF-8.") from None
    except (OSError, ValueError) as e:
        raise PromptError(f"The {what} {path} cannot be read ({e}).") from None
    return [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []


def _from_json(line: str) -> PromptLine:
    """One line of a .jsonl file; raises ValueError, the end of a sentence."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError('is not JSON: write {"prompt": "a castle", "negative_prompt": "blurry", "seed": 1}') from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise ValueError('is not a JSON object with a text under "prompt"')
    if unknown := set(values) - set(PromptLine._fields):
        raise ValueError(f"has the key {min(unknown)!r}; known are {', '.join(PromptLine._fields)}")
    if not isinstance(values.get("negative_prompt"), str | None):
        raise ValueError("has a negative_prompt that is not text")
    if type(values.get("seed")) not in (int, type(None)):
        raise ValueError("has a seed that is not a whole number")
    return PromptLine(**values)
