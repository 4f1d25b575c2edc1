"""How much images of one kind differ from each other: those of one prompt by their seeds, real ones of one caption."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdiff.evaluation.estimates import Estimate, mean_estimate

ROWS = 512  # that are compared with all at a time


class Variety(NamedTuple):
    """See `variety`."""

    estimate: Estimate  # over the groups
    groups: int  # that have at least two members


def mean_distance(x: np.ndarray) -> float:
    """The mean distance of all pairs among features [n, D], n >= 2; 0 where all are equal.

    >>> round(mean_distance(np.array([[0.0, 0.0], [3.0, 4.0]])), 6)
    5.0
    """
    x = np.asarray(x, np.float64)
    x = x - x.mean(0)
    squares, total = (x**2).sum(1), 0.0
    for i in range(0, len(x), ROWS):
        part = slice(i, i + ROWS)
        apart = np.sqrt(np.maximum(squares[part, None] + squares - 2 * x[part] @ x.T, 0))
        np.fill_diagonal(apart[:, i:], 0)  # a row and itself, which rounding leaves above 0
        total += apart.sum()
    return float(total / (len(x) * (len(x) - 1)))


def variety(features: np.ndarray, groups: np.ndarray | Sequence[int]) -> Variety | None:
    """The mean distance between two images of a group; every group counts alike.

    Of features at unit length it is in [0, 2]. A model that draws the same image for every seed has 0.

    Args:
        features: [N, D].
        groups: [N], the number of each row's group. Groups of one are left out.

    Returns:
        None where no group has two members.

    >>> variety(np.array([[0.0], [1.0], [5.0], [5.0], [9.0]]), [0, 0, 1, 1, 2]).estimate.value
    0.5
    """
    groups = np.asarray(groups)
    order = np.argsort(groups, kind="stable")
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    members = [order[s : s + n] for s, n in zip(starts, counts, strict=True) if n > 1]
    if not members:
        return None
    found = mean_estimate(np.array([mean_distance(features[m]) for m in members]))
    return Variety(found._replace(images=sum(map(len, members))), len(members))
