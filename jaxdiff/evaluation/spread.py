"""Variety: how much images of one prompt, or real images of one caption, differ from each other."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdiff.evaluation.estimates import Estimate, mean_estimate

ROWS = 512  # rows compared with all at a time


class Variety(NamedTuple):
    """See `variety`."""

    estimate: Estimate  # mean over the groups
    groups: int  # number of groups with at least two members


def mean_distance(x: np.ndarray) -> float:
    """The mean distance over all pairs of features [n, D], n >= 2; exactly 0 if all are equal.

    >>> round(mean_distance(np.array([[0.0, 0.0], [3.0, 4.0]])), 6)
    5.0
    """
    x = np.asarray(x, np.float64)
    x = x - x.mean(0)
    squares, total = (x**2).sum(1), 0.0
    for i in range(0, len(x), ROWS):
        rows = slice(i, i + ROWS)
        distances = np.sqrt(np.maximum(squares[rows, None] + squares - 2 * x[rows] @ x.T, 0))
        np.fill_diagonal(distances[:, i:], 0)  # a row's distance to itself is not exactly 0 in floating point
        total += distances.sum()
    return float(total / (len(x) * (len(x) - 1)))


def variety(features: np.ndarray, groups: np.ndarray | Sequence[int]) -> Variety | None:
    """The mean distance between two images of a group, averaged over groups.

    For features of unit length it is in [0, 2]. It is 0 for a model that draws the same image for every seed.

    Args:
        features: [N, D].
        groups: int [N], the group of each row. Groups of one are left out.

    Returns:
        The variety; None if no group has two members.

    >>> variety(np.array([[0.0], [1.0], [5.0], [5.0], [9.0]]), [0, 0, 1, 1, 2]).estimate.value
    0.5
    """
    groups = np.asarray(groups)
    order = np.argsort(groups, kind="stable")
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    members = [order[s : s + n] for s, n in zip(starts, counts, strict=True) if n > 1]
    if not members:
        return None
    estimate = mean_estimate(np.array([mean_distance(features[m]) for m in members]))
    return Variety(estimate._replace(images=sum(map(len, members))), len(members))
