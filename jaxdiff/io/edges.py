"""Edge maps for ControlNets: Canny's detector (Canny 1986) in integers, without a dependency."""

import numpy as np

# Neighbours along the gradient, by its angle rounded to 0, 45, 90 or 135 degrees: (row, column) of the one ahead.
AHEAD = ((0, 1), (1, 1), (1, 0), (1, -1))
FRACTION_BITS = 15  # of the fixed-point tangents that the angle is compared with
TAN_22, TAN_67 = (round(np.tan(np.deg2rad(angle)) * 2**FRACTION_BITS) for angle in (22.5, 67.5))


def canny(image: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """White edges on black, as in the training data of published Canny ControlNets.

    Follows OpenCV's `Canny`: no smoothing beforehand, Sobel gradients with the border repeated, |gx| + |gy| as the
    strength, and at each pixel the channel in which it is largest.

    Args:
        image: uint8 [H, W, 3].
        low, high: strengths, 0 to 2040. An edge starts where it is stronger than `high`, and continues along its line
            while it is stronger than `low` (Canny 1986, section VIII: hysteresis).

    Returns:
        uint8 [H, W, 3] of 0 and 255.

    Raises:
        ValueError: an image of another type or shape, or `low` above `high`.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(f"image is {image.dtype} {list(image.shape)}: give uint8 [height, width, 3].")
    if not 0 <= low <= high:
        raise ValueError(f"low {low} and high {high} must be in order: 0 <= low <= high.")
    gx, gy = gradient(image)
    strength = np.abs(gx) + np.abs(gy)
    thin = is_ridge(strength, gx, gy)
    edges = connected(thin & (strength > low), thin & (strength > high))
    return np.repeat(np.where(edges, np.uint8(255), np.uint8(0))[..., None], 3, -1)


def gradient(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's differences along columns and rows, int32 [H, W] each, of the channel where they are strongest."""
    x = np.pad(image.astype(np.int32), ((1, 1), (1, 1), (0, 0)), "edge")
    across = x[:, 2:] - x[:, :-2]
    along = x[2:] - x[:-2]
    gx = across[:-2] + 2 * across[1:-1] + across[2:]
    gy = along[:, :-2] + 2 * along[:, 1:-1] + along[:, 2:]
    strongest = (np.abs(gx) + np.abs(gy)).argmax(-1)[..., None]
    return np.take_along_axis(gx, strongest, -1)[..., 0], np.take_along_axis(gy, strongest, -1)[..., 0]


def is_ridge(strength: np.ndarray, gx: np.ndarray, gy: np.ndarray) -> np.ndarray:
    """Whether a pixel is the strongest of three along its gradient; ties in a row or column go to the later one."""
    x, y = np.abs(gx).astype(np.int64), np.abs(gy).astype(np.int64) << FRACTION_BITS
    diagonal = np.where((gx < 0) != (gy < 0), 3, 1)
    direction = np.where(y < x * TAN_22, 0, np.where(y > x * TAN_67, 2, diagonal))
    padded = np.pad(strength, 1)
    height, width = strength.shape
    ridge = np.zeros(strength.shape, bool)
    for i, (row, column) in enumerate(AHEAD):
        ahead = padded[1 + row : 1 + row + height, 1 + column : 1 + column + width]
        behind = padded[1 - row : 1 - row + height, 1 - column : 1 - column + width]
        equal_ahead = (strength == ahead) & (i % 2 == 0)
        ridge |= (direction == i) & (strength > behind) & ((strength > ahead) | equal_ahead)
    return ridge


def connected(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The pixels of `weak` that are 8-connected within it to a pixel of `strong`."""
    unvisited = np.pad(weak, 1).ravel()
    reached = np.zeros_like(unvisited)
    row_length = weak.shape[1] + 2
    neighbours = np.array([row * row_length + column for row in (-1, 0, 1) for column in (-1, 0, 1)])
    frontier = np.flatnonzero(np.pad(strong, 1))
    while frontier.size:
        reached[frontier] = True
        unvisited[frontier] = False
        adjacent = np.unique(frontier[:, None] + neighbours)
        frontier = adjacent[unvisited[adjacent]]
    return reached.reshape(weak.shape[0] + 2, row_length)[1:-1, 1:-1]
