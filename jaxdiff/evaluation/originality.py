"""Originality: how far each image is from the nearest training image.

A distance alone says little, since some training images are similar anyway. So it is divided by the *typical distance*,
the median distance of held-out real images. A ratio of 1 is as new as a new real image; a copy has 0. (After the
data-copying test of Meehan et al. 2020, with ratios instead of ranks.)
"""

from collections.abc import Iterable

import numpy as np

NEAR_COPY = 0.5  # a smaller ratio is a near copy: at most half the typical distance of a new real image
ROWS = 4096  # rows compared with a chunk at a time


def nearest(x: np.ndarray, chunks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The exact nearest neighbour of each row of x among many rows, which come in chunks.

    In each chunk the nearest row is found by |a|² + |b|² - 2 ab in float64, and its distance is then computed from the
    difference, so that an equal row has distance 0.

    Args:
        x: [N, D].
        chunks: [m, D] each, of any m.

    Returns:
        L2 distances float64 [N], and the indices int64 [N] of the nearest rows, counted over all chunks; inf and -1 if
        there are no rows.

    >>> distances, numbers = nearest(np.array([[0.0], [10.0]]), [np.array([[3.0], [4.0]]), np.array([[9.0]])])
    >>> distances.tolist(), numbers.tolist()
    ([3.0, 1.0], [0, 2])
    """
    x = np.asarray(x, np.float64)
    best, indices, start = np.full(len(x), np.inf), np.full(len(x), -1, np.int64), 0
    for chunk in chunks:
        if len(chunk):
            y = np.asarray(chunk, np.float64)
            squares = (y**2).sum(1)
            for i in range(0, len(x), ROWS):
                rows = slice(i, i + ROWS)
                row = np.argmin(squares - 2 * x[rows] @ y.T, 1)
                distance = np.sqrt(((x[rows] - y[row]) ** 2).sum(1))
                closer = distance < best[rows]
                best[rows][closer], indices[rows][closer] = distance[closer], start + row[closer]
        start += len(chunk)
    return best, indices


def distance_ratios(distances: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Distances [N] divided by the typical one, the median of `held_out` [M].

    Raises:
        ValueError: the median is 0: half of the held-out images are training images.

    >>> distance_ratios(np.array([0.0, 1.0, 4.0]), np.array([1.0, 2.0, 9.0])).tolist()
    [0.0, 0.5, 2.0]
    """
    typical = float(np.median(held_out))
    if typical == 0:
        raise ValueError("half of the held-out images are training images: hold others out.")
    return distances / typical
