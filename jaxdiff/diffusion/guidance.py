"""Guidance: combining what the network predicts with and without the prompt."""

from jaxdiff.diffusion.prediction import expand
from jaxdiff.typing import Array


def classifier_free(cond: Array, uncond: Array, scale: Array | float) -> Array:
    """uncond + scale (cond - uncond): Ho & Salimans 2022, equation 6, with scale = w + 1.

    Args:
        cond, uncond: predictions [B, ...] of one type, with the prompt and with the negative or the empty one.
        scale: scalar or [B]; 1 is the conditional prediction, 0 the unconditional one.

    >>> import jax.numpy as jnp
    >>> float(classifier_free(jnp.float32(3), jnp.float32(1), 7.5))
    16.0
    """
    return uncond + expand(scale, cond) * (cond - uncond)
