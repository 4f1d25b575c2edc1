"""Guidance: combining the network's predictions with and without the prompt."""

import jax.numpy as jnp

from jaxdiff.diffusion.prediction import expand
from jaxdiff.diffusion.schedules import Time
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


def perturbed(guided: Array, cond: Array, perturbed_cond: Array, scale: Array | float) -> Array:
    """Perturbed-attention guidance: guided + scale (cond - perturbed_cond), Ahn et al. 2024, equation 15.

    Args:
        guided: the prediction [B, ...] with or without classifier-free guidance.
        cond: the prediction with the prompt, of the same type.
        perturbed_cond: the same by a network whose self-attention is switched off in some layers.
        scale: scalar or [B]; 0 changes nothing.

    >>> import jax.numpy as jnp
    >>> float(perturbed(jnp.float32(16), jnp.float32(3), jnp.float32(2), 3.0))
    19.0
    """
    return guided + expand(scale, cond) * (cond - perturbed_cond)


def rescale(guided: Array, cond: Array, factor: Array | float) -> Array:
    """Rescale the guided prediction towards the standard deviation of the conditional one, against over-exposure.

    factor (std(cond) / std(guided)) guided + (1 - factor) guided (Lin et al. 2023, equations 15 and 16; they recommend
    0.7). Standard deviations are over all values of each sample. A constant prediction is unchanged.

    Args:
        guided: of `classifier_free`, [B, ...].
        cond: the prediction with the prompt, [B, ...], of the same type.
        factor: phi in [0, 1], scalar or [B]; 0 changes nothing.

    >>> import jax.numpy as jnp
    >>> rescale(jnp.array([[2.0, -2.0]]), jnp.array([[1.0, -1.0]]), 0.5).tolist()
    [[1.5, -1.5]]
    """
    axes = tuple(range(1, guided.ndim))
    old, new = (jnp.std(x.astype(jnp.float32), axes, keepdims=True) for x in (guided, cond))
    ratio = jnp.where(old == 0, 1, new / jnp.where(old == 0, 1, old))
    return (guided * (1 + expand(factor, guided) * (ratio - 1))).astype(guided.dtype)


def in_interval(time: Time, low: Array | float, high: Array | float) -> Array:
    """Whether guidance is on: low < sigma / alpha <= high (Kynkäänniemi et al. 2024, section 3).

    Outside the interval the conditional prediction is used alone.

    Args:
        time: one or more times; at alpha = 0 (pure noise) the noise level is infinite.
        low, high: noise levels sigma / alpha, scalars or of the shape of the time's fields; high may be infinite.

    Returns:
        bool, of the shape of the time's fields.

    >>> import jax.numpy as jnp
    >>> in_interval(Time(0, jnp.array([0.0, 0.6, 0.8]), jnp.array([1.0, 0.8, 0.6])), 0.75, float("inf")).tolist()
    [True, True, False]
    """
    level = jnp.where(time.alpha == 0, jnp.inf, time.sigma / jnp.where(time.alpha == 0, 1, time.alpha))
    return (low < level) & (level <= high)
