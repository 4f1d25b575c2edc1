"""Inpainting with a network that was not trained for it: the known part is restored at every step."""

import jax.numpy as jnp

from jaxdiff.diffusion.base import Scheduler, step_count, time_at
from jaxdiff.diffusion.prediction import add_noise
from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array, Denoise, Key


def masked_blending(scheduler: Scheduler, original: Array, noise: Array, mask: Array) -> Scheduler:
    """A scheduler whose samples equal `original` where `mask` is 0 (Avrahami et al. 2022, Blended Latent Diffusion).

    Where the mask is 0, x is replaced by the original at the current noise level, after each step and before each
    network call within a step, and by the original itself after the last step. The first call gets x unchanged.

    Args:
        original: clean latents [B, ...].
        noise: unit Gaussian [B, ...], the same at all steps.
        mask: bool, broadcastable to [B, ...]; true where the image is redrawn.
    """

    def step(denoise: Denoise, state, times: Time, i: Array, keys: Key):
        def denoise_blended(x: Array, time: Time) -> Array:
            first_call = (i == 0) & (time.t == times.t[0])
            noised = jnp.where(first_call, x, add_noise(original, noise, time))
            return denoise(jnp.where(mask, x, noised), time)

        state = scheduler.step(denoise_blended, state, times, i, keys)
        noised = add_noise(original, noise, time_at(times, i + 1))
        noised = jnp.where(i == step_count(times) - 1, original, noised)
        return state._replace(x=jnp.where(mask, state.x, noised))

    return scheduler._replace(step=step)
