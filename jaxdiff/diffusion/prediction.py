"""Prediction types, and the conversion of each to x0.

With x = alpha x0 + sigma eps, a network is trained to predict one of

    "epsilon"          eps                       x0 = (x - sigma eps) / alpha                        (1)
    "sample"           x0                        x0                                                  (2)
    "v_prediction"     v = alpha eps - sigma x0  x0 = (alpha x - sigma v) / (alpha^2 + sigma^2)      (3)
    "flow_prediction"  u = eps - x0              x0 = (x - sigma u) / (alpha + sigma)                (4)

(1) and (2): Ho et al. 2020, section 3.2; (3): Salimans & Ho 2022, appendix D; (4): Liu et al. 2023, equation 1.
(3) and (4) hold for any alpha and sigma; the divisor is 1 for a variance-preserving process in (3), for a flow in (4).
All but (1) are finite at alpha = 0, where x is pure noise, and all are finite at sigma = 0.
"""

import jax.numpy as jnp

from jaxdiff.config.scheduler import PREDICTION_TYPES
from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array


def expand(value: Array | float, x: Array) -> Array:
    """A scalar or one value a sample, [B], shaped to broadcast against x [B, ...]; other shapes are unchanged."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim == 1 else value


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"prediction_type {prediction_type!r} is unknown; known are {', '.join(PREDICTION_TYPES)}.")


def add_noise(x0: Array, eps: Array, time: Time) -> Array:
    """x = alpha x0 + sigma eps for x0 and eps [B, ...] and a time whose fields are scalars or [B]."""
    return expand(time.alpha, x0) * x0 + expand(time.sigma, x0) * eps


def to_denoised(output: Array, x: Array, time: Time, prediction_type: str) -> Array:
    """The prediction of x0, [B, ...], from the network's output: equations (1) to (4).

    Args:
        output, x: [B, ...], the network's output and its input.
        time: of x; fields scalar or [B].
        prediction_type: one of `PREDICTION_TYPES`; for "epsilon" alpha must not be 0.

    Raises:
        ValueError: an unknown prediction_type.
    """
    alpha, sigma = expand(time.alpha, x), expand(time.sigma, x)
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return (alpha * x - sigma * output) / (alpha**2 + sigma**2)
    if prediction_type == "flow_prediction":
        return (x - sigma * output) / (alpha + sigma)
    raise _unknown(prediction_type)


def target(x0: Array, eps: Array, time: Time, prediction_type: str) -> Array:
    """What the network should output for x = add_noise(x0, eps, time): the inverse of `to_denoised`.

    Args:
        x0, eps: [B, ...].
        time: fields scalar or [B].

    Raises:
        ValueError: an unknown prediction_type.
    """
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        return expand(time.alpha, x0) * eps - expand(time.sigma, x0) * x0
    if prediction_type == "flow_prediction":
        return eps - x0
    raise _unknown(prediction_type)
