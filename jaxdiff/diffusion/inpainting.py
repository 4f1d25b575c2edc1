"""Inpainting with a network that was never taught it: what is to be kept is put back wherever the network looks."""

import jax.numpy as jnp

from jaxdiff.diffusion.base import Scheduler, time_at
from jaxdiff.diffusion.prediction import add_noise
from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array, Denoise, Key


def keeping(scheduler: Scheduler, original: Array, noise: Array, mask: Array) -> Scheduler:
    """A scheduler whose samples are `original` where `mask` is 0 (Avrahami et al. 2022, Blended Latent Diffusion, 4.1).

    What is kept is replaced by the original with as much noise as there is by then, after each step and before each
    call of the network within one; in the end by the original itself. The very first call sees x as it is.

    Args:
        original: clean latents [B, ...].
        noise: unit Gaussian [B, ...], the same at all steps.
        mask: broadcastable to them; 1 (true) is to be redrawn.
    """

    def step(denoise: Denoise, state, times: Time, i: Array, keys: Key):
        def blended(x: Array, time: Time) -> Array:
            first = (i == 0) & (time.t == times.t[0])
            kept = jnp.where(first, x, add_noise(original, noise, time))
            return denoise(jnp.where(mask, x, kept), time)

        state = scheduler.step(blended, state, times, i, keys)
        kept = add_noise(original, noise, time_at(times, i + 1))
        kept = jnp.where(i == len(times.t) - 2, original, kept)
        return state._replace(x=jnp.where(mask, state.x, kept))

    return scheduler._replace(step=step)
