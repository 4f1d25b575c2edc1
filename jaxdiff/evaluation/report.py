"""The report as a table to read and as JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdiff.evaluation.estimates import Estimate
from jaxdiff.evaluation.measures import Row


def format_estimate(estimate: Estimate | None) -> str:
    """A value rounded to two digits of its error.

    >>> format_estimate(Estimate(0.51234, 0.0123, 8)), format_estimate(Estimate(12.5, None, 1)), format_estimate(None)
    ('0.512 ± 0.012', '12.5', '')
    """
    if estimate is None:
        return ""
    if not estimate.error or not math.isfinite(estimate.error):
        return f"{estimate.value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(estimate.error)))
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"


def table(rows: Sequence[Row], notes: Sequence[str], heading: Sequence[str]) -> str:
    """Markdown: the heading's lines, a table of the rows, and the notes."""
    lines = ["# Evaluation", "", *(f"- {line}" for line in heading), ""]
    cells = [["measure", "value", "images", "held-out real", "what it says"]]
    cells += [
        [
            f"{r.part}: {r.name}",
            format_estimate(r.estimate),
            str(r.estimate.images),
            format_estimate(r.real),
            r.meaning.replace("|", "/"),
        ]
        for r in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    for number, row in enumerate(cells):
        lines.append("| " + " | ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) + " |")
        if number == 0:
            lines.append("|" + "---|" * len(row))
    lines += ["", "Value ± standard error."]
    lines += [line for note in notes for line in ("", note)]
    # Lone surrogates (undecodable bytes of a command line) cannot be encoded as UTF-8.
    return ("\n".join(lines) + "\n").encode("utf-8", "replace").decode()


def as_json(rows: Sequence[Row], notes: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"settings", "measures": {part: {name: {"value", "error", "images", "real", "meaning"}}}, "notes"}."""
    measures: dict[str, dict[str, Any]] = {}
    for row in rows:
        real = {} if row.real is None else {"real": estimate_json(row.real)}
        measures.setdefault(row.part, {})[row.name] = {**estimate_json(row.estimate), **real, "meaning": row.meaning}
    return {"settings": dict(settings), "measures": measures, "notes": list(notes)}


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """An estimate as JSON; infinities and NaN become null."""
    return {name: x if x is not None and math.isfinite(x) else None for name, x in estimate._asdict().items()}
