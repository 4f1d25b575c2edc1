"""From the prompts of a call to tokens, and to the text that each step attends to."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxdiff.models.model import Model
from jaxdiff.sampling.checks import as_batch
from jaxdiff.text import chunks as text
from jaxdiff.text.other_programs import only_words, read_as_it_is
from jaxdiff.text.schedule import is_edited, parse_schedule, text_at
from jaxdiff.typing import Array

Texts = str | Sequence[str | None] | None
Group = tuple[list[str | None], list[str | None]]  # prompts of the first text encoder, and of the second


def tokenize(
    model: Model,
    prompts: str | Sequence[str | None],
    prompts_2: Texts = None,
    *,
    emphasis: bool = True,
    chunks: int | None = None,
) -> text.Tokens | Array:
    """Prompts to the input of `encode_text`: token ids int32 [B, K L], or `Tokens` if ids alone do not do. Host side.

    Prompts and negative prompts of one image need the same number of chunks: give both calls the same `chunks` if any
    of them may be long.

    Args:
        prompts: one prompt or B of them; see jaxdiff/text/ for emphasis and limits.
        prompts_2: prompts for SDXL's second text encoder, one for all or one a prompt; None: the same.
        emphasis: whether to read brackets and BREAK in prompts as emphasis.
        chunks: K, number of chunks of L tokens; None: as many as the longest prompt needs. Not for the transformer
            families.

    Raises:
        ArgumentError (a ValueError): one sentence naming the argument and what it may be.
        TypeError: a prompt is not a string.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    second = as_batch("prompts_2", prompts_2, len(prompts))
    tokens = text.tokens(model, prompts, second, emphasis=emphasis, chunks=chunks)
    return tokens.ids if all(field is None for field in tokens[1:]) else tokens


def encoder_inputs(
    model: Model,
    prompts: Mapping[str, tuple[Texts, Texts] | None],
    count: int,
    emphasis: bool,
    steps: int,
    stages: int,
) -> tuple[list[text.Tokens | None], np.ndarray | None]:
    """Tokens of each group of prompts, such as the negative ones; all groups get the same number of chunks.

    Args:
        prompts: by the group's name its prompts for the first text encoder and for SDXL's second one (None: the same).
            A group that is None stays None.
        count: B, prompts of each group.
        emphasis: whether to read brackets and tags; with a transformer brackets stay, and tags are left out.
        steps: of the time grid.
        stages: 1, or 2 with `hires`.

    Returns:
        Tokens [B, …] and None; or, if prompts are edited by step, tokens [B, T, …] and int32 [B, stages, steps]: which
        of the T texts each step of each stage attends to.
    """
    groups: dict[str, Group | None] = {
        name: None if pair is None else (as_batch(name, pair[0], count), as_batch(f"{name}_2", pair[1], count))
        for name, pair in prompts.items()
    }
    picks, num_texts = None, 1
    as_written = model.transformer is not None  # its text encoders have no emphasis and no editing by step
    if emphasis:
        read = read_as_it_is if as_written else only_words
        columns = [[p and read(p) for p in column] for pair in groups.values() if pair for column in pair]
        columns, picks = (columns, None) if as_written else expand_edits(columns, steps, stages)
        num_texts = 1 if picks is None else len(columns[0]) // count
        pairs = iter(zip(columns[::2], columns[1::2], strict=True))
        groups = {name: None if pair is None else next(pairs) for name, pair in groups.items()}
    first, second = ([p for pair in groups.values() if pair for p in pair[i]] for i in (0, 1))
    all_tokens = text.tokens(model, first, second, emphasis=emphasis)
    all_tokens = text.with_weights(all_tokens) if emphasis and not as_written else all_tokens
    starts = iter(range(0, len(first), count * num_texts))

    def group_tokens(i: int) -> text.Tokens:
        rows = jax.tree.map(lambda a: a[i : i + count * num_texts], all_tokens)
        return rows if picks is None else jax.tree.map(lambda a: a.reshape(count, num_texts, *a.shape[1:]), rows)

    return [None if pair is None else group_tokens(next(starts)) for pair in groups.values()], picks


def expand_edits(
    columns: list[list[str | None]], steps: int, stages: int
) -> tuple[list[list[str | None]], np.ndarray | None]:
    """All texts that prompts are edited to: T for each image, padded with the last one.

    Args:
        columns: lists of B prompts; the prompts of an image in all columns are edited together.

    Returns:
        Columns of B T texts, image by image, and the number of each step's text, int32 [B, stages, steps]; the B texts
        and None if no step changes the text.
    """
    parsed = [[None if p is None else parse_schedule(p) for p in column] for column in columns]
    if not any(is_edited(p) for column in parsed for p in column if p is not None):
        return columns, None
    rows: list[list[tuple[str | None, ...]]] = []
    picks = np.zeros((len(columns[0]), stages, steps), np.int32)
    for image, image_prompts in enumerate(zip(*parsed, strict=True)):
        text_ids: dict[tuple[str | None, ...], int] = {}
        for stage, step in np.ndindex(stages, steps):
            texts = tuple(None if p is None else text_at(p, step, steps, stage) for p in image_prompts)
            picks[image, stage, step] = text_ids.setdefault(texts, len(text_ids))
        rows.append(list(text_ids))
    max_texts = max(map(len, rows))
    padded = [texts for row in rows for texts in row + row[-1:] * (max_texts - len(row))]
    return [list(column) for column in zip(*padded, strict=True)], None if max_texts == 1 else picks
