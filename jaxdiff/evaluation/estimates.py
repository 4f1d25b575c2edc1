"""Estimates with standard errors, which are due to the finite number of images.

Images of one prompt are not independent, so errors are computed over whole prompts if there are enough of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

BLOCKS = 12  # of images, for jackknife errors; even, so that halves are equal
DRAWS = 200  # resamples of a bootstrap


class Estimate(NamedTuple):
    """A value with its standard error."""

    value: float
    error: float | None  # standard error; None if there are too few images
    images: int  # number of images that it is computed from


def mean_estimate(values: np.ndarray, groups: np.ndarray | None = None) -> Estimate:
    """The mean with its cluster-robust standard error (Liang & Zeger 1986, with G / (G - 1)).

    Args:
        values: [N], N >= 1.
        groups: int [N], such as the index of each image's prompt; None, or a single group: values are independent.

    >>> mean_estimate(np.array([1.0, 2.0, 3.0]))
    Estimate(value=2.0, error=0.5773502691896257, images=3)
    """
    values = np.asarray(values, np.float64)
    count, mean = len(values), float(np.mean(values))
    sums: np.ndarray = values - mean
    if groups is not None and len(unique := np.unique(groups)) > 1:
        sums = np.bincount(np.searchsorted(unique, groups), sums)
    if len(sums) == 1:
        return Estimate(mean, None, count)
    error = np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / count
    return Estimate(mean, float(error), count)


def median_estimate(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """The median of values [N] and its standard error, by a bootstrap over whole groups [N] (Efron 1979)."""
    unique, group_ids = np.unique(groups, return_inverse=True)
    group_ids = np.arange(len(values)) if len(unique) == 1 else group_ids.ravel()
    members = np.split(np.argsort(group_ids, kind="stable"), np.cumsum(np.bincount(group_ids))[:-1])
    rng = np.random.default_rng(0)
    medians = []
    for _ in range(DRAWS if len(members) > 1 else 0):
        chosen = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        medians.append(np.median(values[chosen]))
    return Estimate(float(np.median(values)), float(np.std(medians)) if medians else None, len(values))


def blocks(groups: np.ndarray, count: int = BLOCKS, seed: int = 0) -> np.ndarray:
    """Assign rows to `count` blocks at random; whole groups stay together if there are at least `count` of them.

    Blocks differ by one group at most, and the larger ones are spread evenly, so that both halves of the blocks hold
    equally many groups.

    Args:
        groups: int [N], N >= count.

    Returns:
        int [N], the block of each row; each of 0 … count - 1 occurs.

    >>> sorted(blocks(np.repeat(np.arange(4), 2), 4).tolist())
    [0, 0, 1, 1, 2, 2, 3, 3]
    """
    unique, group_ids = np.unique(groups, return_inverse=True)
    if len(unique) < count:
        unique, group_ids = np.arange(len(groups)), np.arange(len(groups))
    return (np.random.default_rng(seed).permutation(len(unique)) * count // len(unique))[group_ids.ravel()]


def jackknife(statistic: Callable[[Sequence[int]], float], count: int = BLOCKS) -> tuple[float, float]:
    """A statistic of blocks and its jackknife standard error, leaving out one block at a time (Tukey 1958).

    Args:
        statistic: indices of blocks -> the statistic, a smooth function of their data.
        count: number of blocks, at least 3.
    """
    indices = list(range(count))
    without = np.array([statistic(indices[:i] + indices[i + 1 :]) for i in indices])
    return statistic(indices), float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))
