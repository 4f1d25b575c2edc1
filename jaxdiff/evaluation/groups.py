"""Groups of real images: rows of a source that share a caption or a metadata value."""

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.data.hashes import content_hash
from jaxdiff.data.source import Source

MOST_GROUPS, MOST_MEMBERS = 1000, 50  # chosen at random if there are more


def labels(captions: tuple[str, ...], extras: Mapping[str, Any], column: str | None) -> tuple[str, ...]:
    """The labels by which a row is grouped: its captions, ignoring case and white space, or its value of `column`.

    Empty labels are dropped.
    """
    if column is None:
        return tuple({" ".join(c.lower().split()) for c in captions} - {""})
    value = extras.get(column)
    return () if value in (None, "") else (str(value),)


def has_column(source: Source, column: str) -> bool:
    """Whether any row has this column in its metadata."""

    def has_value(row: int) -> bool:
        try:
            return source.read(row, image=False).extras.get(column) is not None
        except (OSError, ValueError):  # a damaged row
            return False

    return any(map(has_value, range(len(source))))


def real_groups(source: Source, index: np.ndarray, column: str | None = None, seed: int = 0) -> list[np.ndarray]:
    """Groups of at least two rows, at most MOST_GROUPS of MOST_MEMBERS each.

    An image that a captioned folder repeats counts once.

    Args:
        source: only its captions and metadata are read.
        index: int [N], the records to group.
        column: of the metadata, such as "subject"; None: group by caption.
        seed: for the choice of groups and members.

    Returns:
        For each group int [n], positions in `index`.
    """
    keys, positions, previous = array("Q"), array("q"), ""
    for position, record in enumerate(index.tolist()):
        name, _, captions, extras = source.read(record, image=False)
        if name == previous:  # repeats are adjacent
            continue
        previous = name
        for label in labels(captions, extras, column):
            keys.append(content_hash(label.encode("utf-8", "replace")))
            positions.append(position)
    hashes, row_positions = np.asarray(keys, np.uint64), np.asarray(positions, np.int64)
    order = np.argsort(hashes, kind="stable")
    _, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    rng = np.random.default_rng(seed)
    shared = np.flatnonzero(counts > 1)
    chosen = np.sort(rng.permutation(shared)[:MOST_GROUPS])
    groups = [row_positions[order[starts[i] : starts[i] + counts[i]]] for i in chosen]
    return [np.sort(rng.permutation(members)[:MOST_MEMBERS]) for members in groups]
