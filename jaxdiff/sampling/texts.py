"""The prompts of a call to what the text encoders read, and to which text each step attends to."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxdiff.models.model import Model
from jaxdiff.sampling.checks import as_batch
from jaxdiff.text import chunks as text
from jaxdiff.text.other_programs import only_words
from jaxdiff.text.schedule import is_edited, parse_schedule, text_at

Texts = str | Sequence[str | None] | None
Group = tuple[list[str | None], list[str | None]]  # what the first text encoder reads, and the second


def encoder_inputs(
    model: Model,
    given: Mapping[str, tuple[Texts, Texts] | None],
    count: int,
    emphasis: bool,
    steps: int,
    stages: int,
) -> tuple[list[text.Tokens | None], np.ndarray | None]:
    """Tokens of each group of prompts, such as the negative ones, in as many chunks as any prompt of any group needs.

    Args:
        given: a group, by its name: what the first text encoder reads and what SDXL's second one reads instead, None
            where it is the same. A group that is None stays None.
        count: B, prompts of each group.
        emphasis: whether brackets and tags mean something.
        steps, stages: of the time grid, and how often it is gone through.

    Returns:
        Tokens [B, …] and None; or, where prompts are edited by step, [B, T, …] and which of the T texts each step of
        each stage attends to, int32 [B, stages, steps].
    """
    groups: dict[str, Group | None] = {
        name: None if pair is None else (as_batch(name, pair[0], count), as_batch(f"{name}_2", pair[1], count))
        for name, pair in given.items()
    }
    picks, each = None, 1
    if emphasis:
        columns = [[p and only_words(p) for p in column] for pair in groups.values() if pair for column in pair]
        columns, picks = edited(columns, steps, stages)
        each = 1 if picks is None else len(columns[0]) // count
        pairs = iter(zip(columns[::2], columns[1::2], strict=True))
        groups = {name: None if pair is None else next(pairs) for name, pair in groups.items()}
    first, second = ([p for pair in groups.values() if pair for p in pair[i]] for i in (0, 1))
    every = text.tokens(model, first, second, emphasis=emphasis)
    every = text.with_weights(every) if emphasis else every
    starts = iter(range(0, len(first), count * each))

    def part(i: int) -> text.Tokens:
        rows = jax.tree.map(lambda a: a[i : i + count * each], every)
        return rows if picks is None else jax.tree.map(lambda a: a.reshape(count, each, *a.shape[1:]), rows)

    return [None if pair is None else part(next(starts)) for pair in groups.values()], picks


def edited(
    columns: list[list[str | None]], steps: int, stages: int
) -> tuple[list[list[str | None]], np.ndarray | None]:
    """Prompts with every text that they are edited to: T of each, the last one repeated where there are fewer.

    Args:
        columns: prompts of B images; those of an image are edited together.

    Returns:
        Columns of B T texts, image by image, and the text of each step, int32 [B, stages, steps]; None and B texts
        where no step has another text than the first.
    """
    parsed = [[None if p is None else parse_schedule(p) for p in column] for column in columns]
    if not any(is_edited(p) for column in parsed for p in column if p is not None):
        return columns, None
    rows: list[list[tuple[str | None, ...]]] = []
    picks = np.zeros((len(columns[0]), stages, steps), np.int32)
    for image, places in enumerate(zip(*parsed, strict=True)):
        found: dict[tuple[str | None, ...], int] = {}
        for stage, step in np.ndindex(stages, steps):
            texts = tuple(None if p is None else text_at(p, step, steps, stage) for p in places)
            picks[image, stage, step] = found.setdefault(texts, len(found))
        rows.append(list(found))
    most = max(map(len, rows))
    filled = [texts for row in rows for texts in row + row[-1:] * (most - len(row))]
    return [list(column) for column in zip(*filled, strict=True)], None if most == 1 else picks
