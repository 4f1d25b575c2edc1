"""The training loss and its weight at each time.

A squared error of the prediction is a squared error of x0 times 1 / g^2, where g = |d x0 / d output| follows from
equations (1) to (4) of prediction.py. Min-SNR-gamma (Hang et al. 2023, equation 7) asks for the weight min(SNR, gamma),
SNR = alpha^2 / sigma^2, on the error of x0, hence for

    w = min(SNR, gamma) g^2                                                                                (1)
      epsilon  g = sigma / alpha                     w = min(1, gamma sigma^2 / alpha^2)
      sample   g = 1                                 w = min(SNR, gamma)
      v        g = sigma / (alpha^2 + sigma^2)       w = min(alpha^2, gamma sigma^2) / (alpha^2 + sigma^2)^2
      flow     g = sigma / (alpha + sigma)           w = min(alpha^2, gamma sigma^2) / (alpha + sigma)^2
"""

import jax.numpy as jnp

from jaxdiff.diffusion.prediction import target
from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array


def min_snr_weight(time: Time, prediction_type: str, gamma: float = 5.0) -> Array:
    """Weight of the squared error of the prediction, equation (1), in the shape of the time's fields.

    Finite at alpha = 0 and at sigma = 0. At alpha = 0 the weight of v and of flow is 0, as SNR is.
    """
    signal, noise = time.alpha**2, time.sigma**2
    if prediction_type == "epsilon":
        return jnp.minimum(1.0, gamma * noise / signal)
    if prediction_type == "sample":
        return jnp.minimum(signal / noise, gamma)
    divisor = (signal + noise) if prediction_type == "v_prediction" else (time.alpha + time.sigma)
    return jnp.minimum(signal, gamma * noise) / divisor**2


def diffusion_loss(
    output: Array, x0: Array, eps: Array, time: Time, prediction_type: str, min_snr_gamma: float | None = None
) -> Array:
    """Mean squared error of each sample, [B] float32: Ho et al. 2020, equation 14, for any prediction type.

    Args:
        output: of the network at x = add_noise(x0, eps, time), [B, ...].
        x0, eps: clean latents and the noise added to them, [B, ...].
        time: of each sample, fields [B] (or scalar).
        min_snr_gamma: gamma of the min-SNR weight, 5 in the paper; None weighs all times equally.

    Raises:
        ValueError: an unknown prediction_type.
    """
    error = output.astype(jnp.float32) - target(x0, eps, time, prediction_type)
    loss = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return loss if min_snr_gamma is None else loss * min_snr_weight(time, prediction_type, min_snr_gamma)
