"""Measures of how good, how varied and how original images are.

`python -m jaxdiff.evaluation` draws images and measures them; the functions here measure existing images and features.
"""

from jaxdiff.evaluation.agreement import clip_scores, prompt_ranks
from jaxdiff.evaluation.distances import (
    block_moments,
    frechet_distance,
    frechet_estimates,
    frechet_limit,
    kernel_distance,
    kernel_estimate,
    moments,
    unit,
)
from jaxdiff.evaluation.encoder import Encoder, encode_texts, image_features, load_encoder, text_features
from jaxdiff.evaluation.estimates import Estimate, blocks, jackknife, mean_estimate
from jaxdiff.evaluation.features import Features, cached_features
from jaxdiff.evaluation.originality import distance_ratios, nearest
from jaxdiff.evaluation.spread import Variety, variety

__all__ = [
    "Encoder",
    "Estimate",
    "Features",
    "Variety",
    "block_moments",
    "blocks",
    "cached_features",
    "clip_scores",
    "distance_ratios",
    "encode_texts",
    "frechet_distance",
    "frechet_estimates",
    "frechet_limit",
    "image_features",
    "jackknife",
    "kernel_distance",
    "kernel_estimate",
    "load_encoder",
    "mean_estimate",
    "moments",
    "nearest",
    "prompt_ranks",
    "text_features",
    "unit",
    "variety",
]
