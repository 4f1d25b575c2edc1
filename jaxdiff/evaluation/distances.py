"""Distances between two sets of images, in the feature space of an encoder.

    Fréchet distance   |m_x - m_y|² + tr(C_x + C_y - 2 (C_x C_y)^(1/2))           (1)  Heusel et al. 2017, equation 6
    MMD²               E k(x, x') + E k(y, y') - 2 E k(x, y),                     (2)  Gretton et al. 2012, Lemma 6
                       k(a, b) = exp(-|a - b|² / 2σ²)

(1) of finite samples is too large by about c / N, where c depends on the distributions, so distances of different
numbers of images cannot be compared. `frechet_limit` removes that bias. (2) has an unbiased estimator.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.evaluation.estimates import jackknife

BANDWIDTH = 10.0  # σ of (2) for features of unit length (CMMD: Jayasumana et al. 2024)
CMMD_SCALE = 1000.0  # CMMD is (2) times this
ROWS = 2048  # rows of both sets compared at a time


class Moments(NamedTuple):
    """Sums over features; those of two sets can be added."""

    size: int  # N
    total: np.ndarray  # [D]
    outer: np.ndarray  # [D, D], the sum of x xᵀ


def moments(x: np.ndarray) -> Moments:
    """The moments of features [N, D]."""
    x = np.asarray(x, np.float64)
    return Moments(len(x), x.sum(0), x.T @ x)


def combine(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together."""
    counts, totals, outers = zip(*parts, strict=True)
    return Moments(sum(counts), np.sum(totals, 0), np.sum(outers, 0))


def block_moments(chunks: Iterable[tuple[np.ndarray, np.ndarray]], count: int) -> list[Moments]:
    """The moments of each of `count` blocks, from chunks (features [n, D], block indices [n])."""
    blocks: list[Moments] = []
    for features, indices in chunks:
        width = features.shape[1]
        blocks = blocks or [Moments(0, np.zeros(width), np.zeros((width, width))) for _ in range(count)]
        for b in np.unique(indices):
            blocks[b] = combine([blocks[b], moments(features[indices == b])])
    return blocks


def gaussian(m: Moments) -> tuple[np.ndarray, np.ndarray]:
    """The mean [D] and the unbiased covariance [D, D]."""
    mean = m.total / m.size
    return mean, (m.outer - m.size * np.outer(mean, mean)) / (m.size - 1)


def frechet_distance(mean_x: np.ndarray, cov_x: np.ndarray, mean_y: np.ndarray, cov_y: np.ndarray) -> float:
    """The squared Fréchet distance between two Gaussians, equation (1); 0 if they are equal.

    The trace of the root is computed as that of the symmetric (A C_y A)^(1/2) with A² = C_x, which has the same
    eigenvalues.

    Args:
        mean_x, mean_y: [D].
        cov_x, cov_y: [D, D], symmetric and positive semidefinite; they may be singular.

    >>> round(frechet_distance(np.zeros(2), np.eye(2), np.ones(2), 4 * np.eye(2)), 6)
    4.0
    """
    values, vectors = np.linalg.eigh(np.asarray(cov_x, np.float64))
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = root @ np.asarray(cov_y, np.float64) @ root
    root_trace = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    difference = np.asarray(mean_x, np.float64) - np.asarray(mean_y, np.float64)
    return float(max(difference @ difference + np.trace(cov_x) + np.trace(cov_y) - 2 * root_trace, 0.0))


def frechet_of(x: Sequence[Moments], y: Sequence[Moments]) -> float:
    """Equation (1) for two sets given as moments of blocks."""
    return frechet_distance(*gaussian(combine(x)), *gaussian(combine(y)))


def frechet_limit(x: Sequence[Moments], y: Sequence[Moments]) -> float:
    """Equation (1) extrapolated to infinitely many images of both sets (Chong & Forsyth 2020).

    The bias is c / N to first order. The distance is computed from all blocks, and as the mean over both halves of the
    blocks of *both* sets; a line in 1 / N through the two values is extended to 0. The result may be negative. The
    first order is accurate if half of either set has several times as many images as features have dimensions.

    Args:
        x, y: the moments of equally many blocks, at least 2, each a random part of its set.
    """
    half = len(x) // 2
    parts = [slice(0, half), slice(half, None)]
    full, halves = frechet_of(x, y), np.mean([frechet_of(x[p], y[p]) for p in parts])
    # The ratio of 1 / N in the halves to 1 / N in the full sets. Blocks of whole prompts differ in size.
    inverse = np.mean([sum(m.size for m in z) / sum(m.size for m in z[p]) for z in (x, y) for p in parts])
    return float(full - (halves - full) / (inverse - 1))


def frechet_estimates(x: Sequence[Moments], y: Sequence[Moments]) -> dict[str, tuple[float, float]]:
    """{"frechet": (value, standard error), "frechet_limit": …} from as many blocks of x as of y, at least 3."""
    estimates = {}
    for name, distance in (("frechet", frechet_of), ("frechet_limit", frechet_limit)):

        def statistic(block_ids: Sequence[int], distance: Any = distance) -> float:
            return float(distance([x[i] for i in block_ids], [y[i] for i in block_ids]))

        estimates[name] = jackknife(statistic, len(x))
    return estimates


def unit(x: np.ndarray) -> np.ndarray:
    """Features [N, D] at length 1, float64."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def kernel_sums(
    x: np.ndarray, y: np.ndarray, in_x: np.ndarray, in_y: np.ndarray, num_blocks: int, bandwidth: float
) -> np.ndarray:
    """The sum of k (equation 2) over all pairs of a block of x and a block of y: float64 [num_blocks, num_blocks].

    Args:
        x, y: [N, D], [M, D].
        in_x, in_y: int [N], [M], the block of each.
    """
    sums = np.zeros((num_blocks, num_blocks))
    one_hot = np.eye(num_blocks)
    squares = (np.asarray(y, np.float64) ** 2).sum(1)
    for i in range(0, len(x), ROWS):
        a = np.asarray(x[i : i + ROWS], np.float64)
        for j in range(0, len(y), ROWS):
            b = np.asarray(y[j : j + ROWS], np.float64)
            sq_distances = (a**2).sum(1)[:, None] + squares[j : j + ROWS] - 2 * a @ b.T
            kernel = np.exp(-np.maximum(sq_distances, 0) / (2 * bandwidth**2))
            sums += one_hot[in_x[i : i + ROWS]].T @ kernel @ one_hot[in_y[j : j + ROWS]]
    return sums


def kernel_estimate(
    x: np.ndarray, y: np.ndarray, in_x: np.ndarray, in_y: np.ndarray, bandwidth: float = BANDWIDTH
) -> tuple[float, float]:
    """The unbiased estimate of MMD² (Gretton et al. 2012, equation 3) and its standard error (jackknife over blocks).

    Args:
        x, y: [N, D], [M, D].
        in_x, in_y: int [N], [M], block of each row, 0 … B - 1; every block must have members in both sets.
        bandwidth: σ of the kernel.
    """
    num_blocks = int(max(in_x.max(), in_y.max())) + 1
    pairs = [(x, x, in_x, in_x), (y, y, in_y, in_y), (x, y, in_x, in_y)]
    within_x, within_y, between = (kernel_sums(*pair, num_blocks, bandwidth) for pair in pairs)
    n, m = (np.bincount(blocks, minlength=num_blocks) for blocks in (in_x, in_y))

    def statistic(block_ids: Sequence[int]) -> float:
        pick = np.ix_(block_ids, block_ids)
        sums = (within_x[pick].sum(), within_y[pick].sum(), between[pick].sum())
        return mmd(*sums, n[block_ids].sum(), m[block_ids].sum())

    return jackknife(statistic, num_blocks)


def mmd(within_x: float, within_y: float, between: float, n: int, m: int) -> float:
    """The unbiased estimate of MMD² from the sums of k over all pairs of n and m features, where k(a, a) = 1."""
    return float((within_x - n) / (n * (n - 1)) + (within_y - m) / (m * (m - 1)) - 2 * between / (n * m))


def kernel_distance(x: np.ndarray, y: np.ndarray, bandwidth: float = BANDWIDTH) -> float:
    """The unbiased estimate of MMD² with a Gaussian kernel, equation (2).

    Between samples of one distribution it is near 0, and may be negative; it is at most 2. CMMD (Jayasumana et al.
    2024) is 1000 times this, for CLIP features of unit length.

    Args:
        x, y: [N, D], [M, D], at least two rows each.
        bandwidth: σ of the kernel.

    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> round(kernel_distance(x, x + 100, bandwidth=1.0), 6)  # twice the mean of exp(-1/2), exp(-1/2) and exp(-2)
    0.898931
    """
    within_x, within_y, between = (
        kernel_sums(a, b, np.zeros(len(a), int), np.zeros(len(b), int), 1, bandwidth)[0, 0]
        for a, b in ((x, x), (y, y), (x, y))
    )
    return mmd(within_x, within_y, between, len(x), len(y))
