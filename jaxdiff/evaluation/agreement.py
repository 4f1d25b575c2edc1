"""How well images agree with their prompts, by CLIP (Radford et al. 2021).

Features are those of `jaxdiff.evaluation.encoder`; they need no unit length.
"""

import numpy as np

from jaxdiff.evaluation.distances import unit

ROWS = 4096  # images that are compared with all prompts at a time
TIE = 1e-6  # cosines nearer to each other are equal: float32 features know them no better


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The cosine between each image's features and those of its own text, in [-1, 1] (CLIPScore before it is rescaled:
    Hessel et al. 2021, section 3).

    Args:
        images, texts: [N, D], row by row.

    Returns:
        float64 [N].
    """
    return (unit(images) * unit(texts)).sum(1)


def prompt_ranks(images: np.ndarray, prompts: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The rank of each image's own prompt among all, by their cosine with the image: 1 is the best, P the last.

    Prompts that score the same as the own one count half each: prompts that an encoder cannot tell apart gain nothing.

    Args:
        images: [N, D].
        prompts: [P, D], of prompts that differ.
        own: int [N], in 0 … P - 1.

    Returns:
        float64 [N].

    >>> prompt_ranks(np.array([[1.0, 0.1], [1.0, 0.1]]), np.eye(2), np.array([0, 1])).tolist()
    [1.0, 2.0]
    """
    prompts, found = unit(prompts), []
    for i in range(0, len(images), ROWS):
        scores, mine = unit(images[i : i + ROWS]) @ prompts.T, own[i : i + ROWS, None]
        best = np.take_along_axis(scores, mine, 1)
        better, equal = scores > best + TIE, np.abs(scores - best) <= TIE
        found.append(1 + better.sum(1) + (equal.sum(1) - 1) / 2)
    return np.concatenate(found) if found else np.zeros(0)
