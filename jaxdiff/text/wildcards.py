r"""Expands a prompt with alternatives into many prompts.

    {red|green} castle        one prompt for each alternative; several make a grid, the last one varying fastest
    __colour__ castle         one line, chosen at random, of the file colour.txt in the wildcards folder

Alternatives may be nested. A backslash escapes { } | and _.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdiff.text.prompt_files import PromptError, read_lines

MAX_DEPTH = 20  # braces inside braces
_MARK = re.compile(r"\\.|[{|}]|__([^\W_]+(?:[_/-][^\W_]+)*)__", re.DOTALL)


class Expansion(NamedTuple):
    """The result of `expand`."""

    prompts: list[str]  # in the order of itertools.product over the axes
    axes: list[list[str]]  # the alternatives of each place that has several: the labels of a grid


class _Choice(NamedTuple):
    """A place in a prompt with alternatives, each a list of texts and places."""

    options: "list[list[str | _Choice]]"


def expand(
    prompt: str,
    wildcards_dir: str | Path | None = None,
    *,
    seed: int = 0,
    matrix: bool = False,
    limit: int = 1000,
) -> Expansion:
    r"""The prompts that a prompt with alternatives stands for.

    Args:
        prompt: as above; without braces and wildcards it is returned as it is.
        wildcards_dir: folder of the wildcards' UTF-8 text files, one alternative a line, taken literally; empty lines
            and those that begin with # are skipped.
        seed: for the choice of a random line for each wildcard.
        matrix: whether wildcards expand to all their lines, like braces.
        limit: maximum number of prompts.

    Raises:
        PromptError: more than `limit` prompts, unmatched braces, or a wildcard without its file or folder.

    >>> expand("{red|green} {castle|dragon}").prompts
    ['red castle', 'red dragon', 'green castle', 'green dragon']
    >>> expand(r"\{a\|b\} \__c__").prompts
    ['{a|b} __c__']
    """
    rng = np.random.default_rng(seed)

    def wildcard(name: str) -> list[str]:
        lines = _read_wildcard(name, wildcards_dir)
        return lines if matrix else [lines[rng.integers(len(lines))]]

    parts = _parse(prompt, wildcard)
    count = _num_prompts(parts)
    if count > limit:
        number = str(count) if count < 10**12 else "over a million million"
        raise PromptError(f"The prompt stands for {number} prompts, more than {limit}: leave out alternatives.")
    alternatives = [_all_texts([part]) for part in parts]
    prompts = ["".join(texts) for texts in itertools.product(*alternatives)]
    return Expansion(prompts, [texts for texts in alternatives if len(texts) > 1])


def _parse(prompt: str, wildcard: Callable[[str], list[str]]) -> list[str | _Choice]:
    """The texts and places of a prompt."""
    stack: list[list[list[str | _Choice]]] = [[[]]]  # alternatives so far of each open brace, outermost first
    position = 0
    for match in _MARK.finditer(prompt):
        stack[-1][-1].append(prompt[position : match.start()])
        position, mark = match.end(), match[0]
        if mark == "{":
            stack.append([[]])
        elif mark == "}" and len(stack) > 1:
            options = stack.pop()
            stack[-1][-1].append(_Choice(options))
        elif mark == "|" and len(stack) > 1:
            stack[-1].append([])
        elif match[1]:
            stack[-1][-1].append(_Choice([[line] for line in wildcard(match[1])]))
        else:
            stack[-1][-1].append(mark[1:] if mark[0] == "\\" and mark[1] in "{|}_" else mark)
        if len(stack) > MAX_DEPTH:
            raise PromptError(f"The prompt has braces more than {MAX_DEPTH} deep.")
    if len(stack) > 1:
        raise PromptError(r"The prompt has a { that is not closed: add }, or write \{ for the character itself.")
    return [*stack[0][0], prompt[position:]]


def _num_prompts(parts: list[str | _Choice]) -> int:
    """How many prompts the parts stand for."""
    return math.prod(sum(_num_prompts(o) for o in part.options) for part in parts if isinstance(part, _Choice))


def _all_texts(parts: list[str | _Choice]) -> list[str]:
    """Every prompt that the parts stand for."""

    def alternatives(part: str | _Choice) -> Iterator[str]:
        return iter([part]) if isinstance(part, str) else itertools.chain.from_iterable(map(_all_texts, part.options))

    return ["".join(texts) for texts in itertools.product(*map(alternatives, parts))]


def _read_wildcard(name: str, folder: str | Path | None) -> list[str]:
    """The alternatives in a wildcard's file."""
    if folder is None:
        raise PromptError(
            f"The prompt has the wildcard __{name}__ and there is no wildcards folder: give one, or write \\__{name}__."
        )
    path = Path(folder, f"{name}.txt")
    lines = [line for line in read_lines(path, "wildcard file") if line and not line.startswith("#")]
    if not lines:
        raise PromptError(f"The wildcard file {path} holds no alternative: write one a line.")
    return lines
