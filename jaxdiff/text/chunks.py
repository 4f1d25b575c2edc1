"""Prompts to token ids in chunks: a prompt too long for the text encoder is encoded in several parts."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging

from jaxdiff.errors import ArgumentError
from jaxdiff.text.emphasis import Piece, parse_emphasis
from jaxdiff.text.plain_tokenizer import PlainTokenizer
from jaxdiff.text.tokenizer import Tokenizer
from jaxdiff.typing import Array

MAX_CHUNKS = 16  # of one prompt: 1,200 tokens; the cost of cross-attention grows with them
BACKTRACK = 20  # a full chunk is cut after a comma if there is one among this many last tokens


class Tokens(NamedTuple):
    """The input of `encode_text`: B prompts, each of K chunks of L tokens (start, text, end, padding)."""

    ids: Array  # [B, K L] int32, for the model's first text encoder
    weights: Array | None = None  # [B, K L] float32, emphasis; None if no prompt has any
    ids_2: Array | None = None  # the same for the second encoder (SDXL)
    weights_2: Array | None = None
    zeros: Array | None = None  # [B] bool: whether the embeddings are zeros, as for SDXL without a negative prompt
    # [B, K L] float32: 1 in a prompt's own chunks and 0 in those that pad it to the K of the longest, so that no image
    # depends on the other prompts. None if K is 1.
    attention_mask: Array | None = None
    ids_3: Array | None = None  # [B, L] int32, for the third encoder: T5, in SD 3


class HasTokenizers(Protocol):
    """The part of a model that `tokens` uses."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def tokenizer_2(self) -> Any: ...
    @property
    def tokenizer_3(self) -> PlainTokenizer | None: ...
    @property
    def options(self) -> Any: ...
    @property
    def transformer(self) -> Any: ...


def tokens(
    model: HasTokenizers,
    prompts: Sequence[str | None],
    prompts_2: Sequence[str | None] | None = None,
    *,
    emphasis: bool = True,
    chunks: int | None = None,
) -> Tokens:
    """Prompts to the input of the model's text encoders. Host side.

    Prompts and negative prompts of one image need the same number of chunks: tokenize them in one call and split the
    rows, or give `chunks`.

    Args:
        model: with its tokenizers.
        prompts: B prompts; None is the empty prompt, or zeros instead of its embedding if the model's options say so.
        prompts_2: B prompts for SDXL's second encoder; None, for all or for one, is the same as `prompts`.
        emphasis: whether to read brackets and BREAK as emphasis.
        chunks: K, chunks of each prompt, 1 to MAX_CHUNKS; None: as many as the longest prompt needs. Text that does not
            fit is left out, with one warning a prompt. Not for the transformer families.

    Raises:
        TypeError: `prompts` is not a sequence of strings or Nones.
        ArgumentError (a ValueError): `prompts_2` does not match `prompts`, or the model has no second encoder; `chunks`
            is out of range, or given for a transformer family.
    """
    for name, values in (("prompts", prompts), ("prompts_2", prompts_2 or ())):
        if isinstance(values, str) or not all(p is None or isinstance(p, str) for p in values):
            raise TypeError(f"{name} must be a list of strings, not {values!r}.")
    if prompts_2 is not None and len(prompts_2) != len(prompts):
        raise ArgumentError("prompts_2", f"holds {len(prompts_2)} for {len(prompts)} prompts: give one a prompt.")
    if model.tokenizer_2 is None and any(p is not None for p in prompts_2 or ()):
        raise ArgumentError("prompts_2", "are for the second text encoder of SDXL, which this model lacks.")
    if model.transformer is not None:
        if chunks is not None:
            raise ArgumentError("chunks", "are for CLIP's text encoders, and this model's read one row: leave it out.")
        return _plain_tokens(model, prompts, prompts_2 or prompts)
    if chunks is not None and not 1 <= chunks <= MAX_CHUNKS:
        raise ArgumentError("chunks", f"{chunks} must be 1 to {MAX_CHUNKS}.")
    texts_2 = prompts if prompts_2 is None else [a if b is None else b for a, b in zip(prompts, prompts_2, strict=True)]
    tokenizers = [t for t in (model.tokenizer, model.tokenizer_2) if t is not None]
    # SDXL's refiner has one tokenizer, which reads `prompts`.
    chunked = [
        [_chunks(tokenizer, prompt or "", emphasis, chunks or MAX_CHUNKS) for prompt in texts]
        for tokenizer, texts in zip(tokenizers, (prompts, texts_2), strict=False)
    ]
    num_chunks = np.array([[len(parts) for parts in rows] for rows in chunked]).max(0)  # [B]
    count = chunks or int(num_chunks.max(initial=1))
    (ids, weights), *others = [_to_arrays(t, rows, count) for t, rows in zip(tokenizers, chunked, strict=True)]
    ids_2, weights_2 = others[0] if others else (None, None)
    force_zeros = model.tokenizer_2 is not None and model.options.force_zeros_for_empty_prompt
    zeros = np.array([p is None for p in prompts], bool) if force_zeros else None
    in_use = np.arange(count) < num_chunks[:, None]  # [B, K]
    mask = None if count == 1 else in_use.repeat(ids.shape[1] // count, axis=1).astype(np.float32)
    return Tokens(ids, weights, ids_2, weights_2, zeros, mask)


def _plain_tokens(model: HasTokenizers, prompts: Sequence[str | None], prompts_2: Sequence[str | None]) -> Tokens:
    """Tokens for the transformer families: one row a prompt from each tokenizer, truncated with a warning."""
    texts = [p or "" for p in prompts]
    texts_2 = [text if p is None else p for text, p in zip(texts, prompts_2, strict=True)]

    def encode(tokenizer: Any, batch: list[str]) -> tuple[Any, Any]:
        """Ids, and a padding mask if the text encoder takes one."""
        if isinstance(tokenizer, PlainTokenizer):
            return tokenizer(batch)
        return None if tokenizer is None else tokenizer(batch), None

    ids, mask = encode(model.tokenizer, texts)
    ids_2, ids_3 = encode(model.tokenizer_2, texts_2)[0], encode(model.tokenizer_3, texts)[0]
    return Tokens(ids, ids_2=ids_2, attention_mask=mask, ids_3=ids_3)


def with_weights(tokens: Tokens) -> Tokens:
    """The tokens with weights of 1 if they have none, so that prompts with and without emphasis share one program."""

    def or_ones(ids: Array, weights: Array | None) -> Array:
        return np.ones(ids.shape, np.float32) if weights is None else weights

    weights_2 = None if tokens.ids_2 is None else or_ones(tokens.ids_2, tokens.weights_2)
    return tokens._replace(weights=or_ones(tokens.ids, tokens.weights), weights_2=weights_2)


Chunk = list[tuple[int, float]]  # (token id, weight), without start and end


def _chunks(tokenizer: Tokenizer, prompt: str, emphasis: bool, limit: int) -> list[Chunk]:
    """One prompt's chunks, `limit` at most, cut after a nearby comma if there is one.

    A textual-inversion token of several vectors is not split, as in the AUTOMATIC1111 web UI: if it does not fit, it
    starts the next chunk.
    """
    size = tokenizer.max_length - 2
    pieces = parse_emphasis(prompt) if emphasis else [Piece(prompt)]
    encoded = iter(tokenizer.encode_words([p.text for p in pieces if p.text is not None]))
    (comma,) = tokenizer.encode([","])
    finished: list[Chunk] = []
    chunk: Chunk = []
    for text, weight in pieces:
        if text is None:
            finished.append(chunk)
            chunk = []
            continue
        for word in itertools.chain.from_iterable(map(_split_word, next(encoded), itertools.repeat(size))):
            if len(chunk) == size:
                keep_all = word == comma or len(finished) == limit - 1
                cut = size if keep_all else _split_point(chunk, comma)
                finished.append(chunk[:cut])
                chunk = chunk[cut:]
            if len(chunk) + len(word) > size:
                finished.append(chunk)
                chunk = []
            chunk += [(token, weight) for token in word]
    if chunk or not finished:
        finished.append(chunk)
    if len(finished) > limit:
        left_out = tokenizer.decode([token for chunk in finished[limit:] for token, _ in chunk])
        _warn_cut(prompt, len(finished), limit, left_out)
    return finished[:limit]


def _split_word(word: list[int], size: int) -> list[list[int]]:
    """A token's vectors in one piece, or in several if a chunk cannot hold them all."""
    return [word[i : i + size] for i in range(0, len(word), size)]


def _split_point(chunk: Chunk, comma: list[int]) -> int:
    """How many tokens of a full chunk to keep: up to the last comma among its last BACKTRACK tokens, else all."""
    candidates = range(len(chunk) - 1, max(len(chunk) - BACKTRACK, 0) - 1, -1)
    return next((i + 1 for i in candidates if [chunk[i][0]] == comma), len(chunk))


def _to_arrays(tokenizer: Tokenizer, prompts: list[list[Chunk]], count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids and weights [B, K L] of B prompts; prompts with fewer chunks are padded with empty ones."""
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
def _warn_cut(prompt: str, chunks: int, limit: int, left_out: str) -> None:
    logging.warning(
        "The prompt %.60r… fills %d chunks; the text after the first %d is left out: %s",
        prompt,
        chunks,
        limit,
        left_out if len(left_out) <= 200 else f"{left_out[:100]} … {left_out[-99:]}",
    )
