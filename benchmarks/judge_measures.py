"""The arithmetic of `judge_icons`: ranks, shares with standard errors, confusions, probes, colours.

An image is ranked among subjects by the mean cosine between its features and those of each subject's real drawings.
The cosine is taken in `Space`, where what differs between designers of one thing counts for little.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxdiff.evaluation.distances import unit
from jaxdiff.evaluation.spread import mean_distance

Colors = Mapping[str, tuple[int, int, int]]
RESAMPLES = 1000  # of the bootstrap
BORDER = 1 / 32  # of the side: drawings leave so much empty
DIFFERENT = 40  # in 0..255: a pixel whose every channel is closer to the background than this belongs to it
BINS = 5  # of a histogram, per colour channel

spread = mean_distance  # between the members [N, D] of a set


class Space(NamedTuple):
    """Features in which the designs of one subject lie close together: whitened within subjects, of unit length."""

    mean: np.ndarray  # [D]
    whiten: np.ndarray  # [D, D]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features [N, D] in this space: [N, D]."""
        return unit((features - self.mean) @ self.whiten)


def fit_space(features: np.ndarray, subjects: np.ndarray) -> Space:
    """The space of designs [N, D] of subjects [N]: their covariance about each subject's mean becomes the identity.

    The covariance is shrunk halfway towards a multiple of the identity, for there are fewer designs than features.
    """
    _, index = np.unique(subjects, return_inverse=True)
    counts = np.bincount(index)
    sums = np.zeros((len(counts), features.shape[1]))
    np.add.at(sums, index, features)
    about = (features - (sums / counts[:, None])[index])[counts[index] > 1]
    covariance = about.T @ about / max(1, len(about))
    covariance += np.eye(len(covariance)) * np.trace(covariance) / len(covariance)
    return Space(features.mean(0), np.linalg.cholesky(np.linalg.inv(covariance)))


def scores(queries: np.ndarray, designs: np.ndarray, subjects: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Mean cosine of each query [Q, D] to the designs [N, D] of each subject: [Q, S], and the subjects' names."""
    names, subject_index = np.unique(subjects, return_inverse=True)
    sums = np.zeros((len(names), len(queries)))
    np.add.at(sums, subject_index, designs @ queries.T)
    return (sums / np.bincount(subject_index)[:, None]).T, [str(name) for name in names]


def ranks(table: np.ndarray, names: Sequence[str], correct: Sequence[Collection[str]]) -> np.ndarray:
    """Place of the best right name for each row of scores [Q, S], 1 for the first: [Q].

    >>> ranks(np.array([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5]]), ["cat", "dog", "fox"], [{"dog"}, {"cat", "fox"}])
    array([1, 2])
    """
    places = []
    for row, accepted in zip(table, correct, strict=True):
        best = max(row[i] for i, name in enumerate(names) if name in accepted)
        places.append(1 + int((row > best).sum()))
    return np.array(places)


def share(hits: Sequence[float] | np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """Mean of `hits`, and its standard error by a bootstrap over groups: images of one prompt are not independent.

    >>> share([1, 1, 0, 0], ["a", "a", "b", "b"])["mean"]
    0.5
    """
    hits = np.asarray(hits, np.float64)
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, hits, len(names))
    counts = np.bincount(index, minlength=len(names))
    resampled = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    means = sums[resampled].sum(1) / counts[resampled].sum(1)
    return {"mean": float(hits.mean()), "error": float(means.std()), "count": len(hits)}


def confusion(expected: Sequence[str], predicted: Sequence[str]) -> dict[str, dict[str, int]]:
    """How often each expected label was predicted as which.

    >>> confusion(["a", "a", "b"], ["a", "b", "b"])
    {'a': {'a': 1, 'b': 1}, 'b': {'b': 1}}
    """
    counts = Counter(zip(expected, predicted, strict=True))
    table: dict[str, dict[str, int]] = {}
    for (label, prediction), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1])):
        table.setdefault(label, {})[prediction] = count
    return table


def shuffled(items: Sequence, seed: int = 0) -> list:
    """The items in another order, always the same one: what images would score for prompts that are not theirs."""
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def border_color(image: np.ndarray) -> np.ndarray:
    """Mean colour of the outermost pixels of an image [H, W, 3]: [3]."""
    width = max(1, round(min(image.shape[:2]) * BORDER))
    inside = np.zeros(image.shape[:2], bool)
    inside[width:-width, width:-width] = True
    return image[~inside].mean(0)


def nearest_color(color: np.ndarray, colors: Colors) -> str:
    """The name of the colour of least distance in sRGB.

    >>> nearest_color(np.array([250, 10, 20]), {"red": (220, 30, 30), "blue": (30, 90, 220)})
    'red'
    """
    return min(colors, key=lambda name: float(np.sum((color - np.array(colors[name])) ** 2)))


def color_histogram(image: np.ndarray) -> np.ndarray:
    """Square roots of the shares of colours among the pixels [H, W, 3] that are not background: [BINS ** 3]."""
    pixels = image.reshape(-1, 3).astype(np.int64)
    foreground = np.abs(pixels - border_color(image)).max(1) > DIFFERENT
    bins = (pixels[foreground] * BINS) // 256 @ np.array([BINS * BINS, BINS, 1])
    counts = np.bincount(bins, minlength=BINS**3)
    return np.sqrt(counts / max(1, counts.sum()))


class Probe:
    """Multinomial logistic regression with an L2 penalty, fitted by L-BFGS on standardised inputs."""

    def __init__(self, inputs: np.ndarray, labels: Sequence[str], penalty: float = 1e-3) -> None:
        from scipy.optimize import minimize

        self.names = sorted(set(labels))
        self.mean, self.scale = inputs.mean(0), inputs.std(0) + 1e-3 * inputs.std()
        x = self._standard(inputs)
        target = np.eye(len(self.names), dtype=np.float32)[[self.names.index(label) for label in labels]]

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = flat.reshape(x.shape[1], -1).astype(x.dtype)
            log_p = log_softmax(x @ weights)
            gradient = x.T @ (np.exp(log_p) - target) / len(x) + penalty * weights
            return -(target * log_p).sum() / len(x) + penalty * (flat @ flat) / 2, gradient.ravel().astype(np.float64)

        start = np.zeros(x.shape[1] * len(self.names))
        self.weights = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 100}).x
        self.weights = self.weights.reshape(x.shape[1], -1)

    def _standard(self, inputs: np.ndarray) -> np.ndarray:
        x = (inputs - self.mean) / self.scale / np.sqrt(inputs.shape[1])
        return np.concatenate([x, np.ones((len(x), 1))], 1, dtype=np.float32)

    def __call__(self, inputs: np.ndarray) -> list[str]:
        """The most likely label of each row [N, D]."""
        return [self.names[i] for i in (self._standard(inputs) @ self.weights).argmax(1)]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))
