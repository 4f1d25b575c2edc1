r"""Prompt editing: a prompt whose words change with the step.

It is written as in the AUTOMATIC1111 web UI, and follows its documentation:

    [cat:dog:10]    cat for 10 steps, then dog        [dog:10]  from step 11 on      [cat::10]  for 10 steps
    [cat:dog:0.5]   the same after half of the steps: a number with a decimal point is a fraction of them
    [cat|dog]       cat and dog in alternate steps

Texts may be empty, contain emphasis, or be edited themselves. Steps count from the first one taken. A second stage
(hires) continues the count: with 10 steps each, 1.5 and 15 are the middle of the second stage. Other brackets are left
for emphasis; a backslash escapes : and |.
"""

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

MAX_DEPTH = 20  # of nested brackets; deeper ones are emphasis

_MARKS = re.compile(r"\\.|[()\[\]:|]", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_MAX_STEP = 1e9  # more steps than any run has
END = 10**10  # a stage after all switches


class Switch(NamedTuple):
    """One text before a step, another from it on."""

    before: "Parts"
    after: "Parts"
    when: float
    is_fraction: bool


class Cycle(NamedTuple):
    """Texts that alternate from step to step."""

    texts: "tuple[Parts, ...]"


class _Separator(str):
    """A : or | that is not inside inner brackets."""


Parts = tuple[str | Switch | Cycle, ...]


def parse_schedule(prompt: str) -> Parts:
    """A prompt as a sequence of fixed texts and of `Switch` and `Cycle` places; one text if it is not edited.

    >>> parse_schedule("a [red:blue:3] [old] house")
    ('a ', Switch(before=('red',), after=('blue',), when=3.0, is_fraction=False), ' [old] house')
    """
    stack: list[list] = [[]]  # the contents of each open bracket, the bracket first; the prompt outermost
    position = 0
    for match in _MARKS.finditer(prompt):
        stack[-1].append(prompt[position : match.start()])
        position, mark = match.end(), match[0]
        if mark in ("(", "["):
            stack.append([mark])
        elif mark in (")", "]") and stack[-1][:1] == [{")": "(", "]": "["}[mark]]:
            contents = stack.pop()[1:]
            edit = _parse_brackets(contents) if mark == "]" and len(stack) <= MAX_DEPTH else None
            stack[-1] += _join(["[" if mark == "]" else "(", *contents, mark]) if edit is None else [edit]
        elif mark in (")", "]"):  # unmatched: it and the open brackets are text
            stack = [[*_join(itertools.chain(*stack)), mark]]
        elif mark in (":", "|"):
            stack[-1].append(_Separator(mark))
        else:  # an escape; escaped brackets are left to `parse_emphasis`
            stack[-1].append(mark[1] if mark[1] in ":|" else mark)
    parts = _join([*itertools.chain(*stack), prompt[position:]])
    return parts if is_edited(parts) else (prompt,)


def is_edited(parts: Parts) -> bool:
    """Whether a parsed prompt has more than one text."""
    return not all(isinstance(part, str) for part in parts)


def text_at(parts: Parts, step: int, steps: int, stage: int = 0) -> str:
    """The text at a step, counted from 0 within its stage of `steps` steps.

    >>> [text_at(parse_schedule("[a|b|][ c:0.5]"), step, 4) for step in range(4)]
    ['a', 'b', ' c', 'a c']
    """

    def text(part: str | Switch | Cycle) -> str:
        if isinstance(part, str):
            return part
        if isinstance(part, Cycle):
            return text_at(part.texts[step % len(part.texts)], step, steps, stage)
        switch_step = int((part.when - stage) * steps if part.is_fraction else part.when - stage * steps)
        return text_at(part.before if step < switch_step else part.after, step, steps, stage)

    return "".join(map(text, parts))


def _join(parts: Iterable) -> Parts:
    """Join neighbouring texts, and drop empty ones."""
    joined: list[str | Switch | Cycle] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] = joined[-1] + part
        elif part != "":
            joined.append(str(part) if isinstance(part, _Separator) else part)
    return tuple(joined)


def _parse_brackets(contents: list) -> Switch | Cycle | None:
    """The `Switch` or `Cycle` of square brackets with these contents; None: emphasis."""
    marks = [part for part in contents if isinstance(part, _Separator)]
    texts: list[list] = [[]]
    for part in contents:
        if isinstance(part, _Separator):
            texts.append([])
        else:
            texts[-1].append(part)
    options = [_join(text) for text in texts]
    if marks and set(marks) == {"|"}:
        return Cycle(tuple(options))
    when = options[-1][0].strip() if len(options[-1]) == 1 and isinstance(options[-1][0], str) else ""
    if set(marks) != {":"} or len(options) > 3 or not _NUMBER.fullmatch(when):
        return None
    before = options[0] if len(options) == 3 else ()
    return Switch(before, options[-2], max(-_MAX_STEP, min(float(when), _MAX_STEP)), "." in when)
