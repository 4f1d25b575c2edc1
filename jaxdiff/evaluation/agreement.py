"""How well images agree with their prompts, by CLIP (Radford et al. 2021).

Features are those of `jaxdiff.evaluation.encoder`; they need not have unit length.
"""

import numpy as np

from jaxdiff.evaluation.distances import unit

ROWS = 4096  # images compared with all prompts at a time
TIE = 1e-6  # cosines closer than this count as equal: float32 features are no more precise


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The cosine between each image's features and its text's, in [-1, 1].

    It is CLIPScore without its rescaling (Hessel et al. 2021, section 3).

    Args:
        images, texts: [N, D]; row i of both belongs together.

    Returns:
        float64 [N].
    """
    return (unit(images) * unit(texts)).sum(1)


def prompt_ranks(images: np.ndarray, prompts: np.ndarray, prompt_index: np.ndarray) -> np.ndarray:
    """The rank of each image's own prompt among all prompts by cosine with the image, from 1 (best) to P.

    Each tie with the image's own prompt adds one half, so prompts that an encoder cannot tell apart rank at chance.

    Args:
        images: [N, D].
        prompts: [P, D], distinct prompts.
        prompt_index: int [N], index of each image's prompt.

    Returns:
        float64 [N].

    >>> prompt_ranks(np.array([[1.0, 0.1], [1.0, 0.1]]), np.eye(2), np.array([0, 1])).tolist()
    [1.0, 2.0]
    """
    prompts, ranks = unit(prompts), []
    for i in range(0, len(images), ROWS):
        scores, own = unit(images[i : i + ROWS]) @ prompts.T, prompt_index[i : i + ROWS, None]
        own_scores = np.take_along_axis(scores, own, 1)
        better, equal = scores > own_scores + TIE, np.abs(scores - own_scores) <= TIE
        ranks.append(1 + better.sum(1) + (equal.sum(1) - 1) / 2)
    return np.concatenate(ranks) if ranks else np.zeros(0)
