r"""Prompt editing: a prompt whose words change with the step.

It is written as in the AUTOMATIC1111 web UI, and follows its documentation:

    [cat:dog:10]    cat for 10 steps, then dog        [dog:10]  from step 11 on      [cat::10]  for 10 steps
    [cat:dog:0.5]   the same after half of the steps: a number with a point is a part of them
    [cat|dog]       cat and dog by turns, step by step

Texts may be empty, hold emphasis, or be edited themselves. Steps count from the first one taken. A second stage (hires)
goes on counting: 0.5 is then over, 1.5 is the half of it, and so is step 15 where each has 10. Brackets of another form
stay as they are, for emphasis; a backslash escapes : and |.
"""

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

MAX_DEPTH = 20  # brackets inside of brackets; further ones are emphasis

_MARKS = re.compile(r"\\.|[()\[\]:|]", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_MANY = 1e9  # steps: more than any run has
END = 10**10  # a stage at which all switches are over


class Switch(NamedTuple):
    """One text, and from a step on another."""

    before: "Parts"
    after: "Parts"
    when: float
    is_fraction: bool


class Cycle(NamedTuple):
    """Texts by turns."""

    texts: "tuple[Parts, ...]"


class _Separator(str):
    """A : or | that is not inside of other brackets."""


Parts = tuple[str | Switch | Cycle, ...]


def parse_schedule(prompt: str) -> Parts:
    """A prompt as texts and places that change with the step; without any, it is one text.

    >>> parse_schedule("a [red:blue:3] [old] house")
    ('a ', Switch(before=('red',), after=('blue',), when=3.0, is_fraction=False), ' [old] house')
    """
    stack: list[list] = [[]]  # what each bracket still open holds, itself first; the prompt outermost
    position = 0
    for match in _MARKS.finditer(prompt):
        stack[-1].append(prompt[position : match.start()])
        position, mark = match.end(), match[0]
        if mark in ("(", "["):
            stack.append([mark])
        elif mark in (")", "]") and stack[-1][:1] == [{")": "(", "]": "["}[mark]]:
            inside = stack.pop()[1:]
            place = _place(inside) if mark == "]" and len(stack) <= MAX_DEPTH else None
            stack[-1] += _joined(["[" if mark == "]" else "(", *inside, mark]) if place is None else [place]
        elif mark in (")", "]"):  # closes nothing: it and what is open are text
            stack = [[*_joined(itertools.chain(*stack)), mark]]
        elif mark in (":", "|"):
            stack[-1].append(_Separator(mark))
        else:  # an escape; of brackets it is left to emphasis
            stack[-1].append(mark[1] if mark[1] in ":|" else mark)
    parts = _joined([*itertools.chain(*stack), prompt[position:]])
    return parts if is_edited(parts) else (prompt,)


def is_edited(parts: Parts) -> bool:
    """Whether a parsed prompt has more than one text."""
    return not all(isinstance(part, str) for part in parts)


def text_at(parts: Parts, step: int, steps: int, stage: int = 0) -> str:
    """The text at a step, counted from 0 in its stage (of `steps` steps each).

    >>> [text_at(parse_schedule("[a|b|][ c:0.5]"), step, 4) for step in range(4)]
    ['a', 'b', ' c', 'a c']
    """

    def text(part: str | Switch | Cycle) -> str:
        if isinstance(part, str):
            return part
        if isinstance(part, Cycle):
            return text_at(part.texts[step % len(part.texts)], step, steps, stage)
        last = int((part.when - stage) * steps if part.is_fraction else part.when - stage * steps)
        return text_at(part.before if step < last else part.after, step, steps, stage)

    return "".join(map(text, parts))


def _as_text(part: str | Switch | Cycle) -> str | Switch | Cycle:
    return str(part) if isinstance(part, _Separator) else part


def _joined(parts: Iterable) -> Parts:
    """Neighbouring texts as one, and no empty ones."""
    found: list[str | Switch | Cycle] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] = found[-1] + part
        elif part != "":
            found.append(_as_text(part))
    return tuple(found)


def _place(inside: list) -> Switch | Cycle | None:
    """What square brackets with these contents mean; None: emphasis."""
    marks = [part for part in inside if isinstance(part, _Separator)]
    texts: list[list] = [[]]
    for part in inside:
        if isinstance(part, _Separator):
            texts.append([])
        else:
            texts[-1].append(part)
    found = [_joined(text) for text in texts]
    if marks and set(marks) == {"|"}:
        return Cycle(tuple(found))
    when = found[-1][0].strip() if len(found[-1]) == 1 and isinstance(found[-1][0], str) else ""
    if set(marks) != {":"} or len(found) > 3 or not _NUMBER.fullmatch(when):
        return None
    before = found[0] if len(found) == 3 else ()
    return Switch(before, found[-2], max(-_MANY, min(float(when), _MANY)), "." in when)
