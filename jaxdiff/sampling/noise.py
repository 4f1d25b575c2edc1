"""Keys from seeds, and the noise that images are drawn from."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import ArgumentError
from jaxdiff.typing import PRNG, Array, Key


def image_keys(seed: int | Sequence[int], count: int, name: str = "seed") -> Key:
    """Keys [count]: image i of a call with seed s has key(s + i); a sequence of seeds gives one key each.

    The PRNG is fixed, so that an application with another default PRNG draws the same images.
    """
    seeds = np.asarray(seed)
    if seeds.dtype.kind not in "iu" or seeds.shape not in ((), (count,)):
        raise ArgumentError(name, f"{seed} must be a whole number below 2**64, or one for each of {count} prompts.")
    seeds = seeds.astype(np.int64) + (np.arange(count) if seeds.ndim == 0 else 0)
    return _keys((seeds % 2**32).astype(np.uint32))


@jax.jit
def _keys(seeds: Array) -> Key:
    """A key of each seed, uint32 [B]."""
    return jax.vmap(lambda seed: jax.random.key(seed, impl=PRNG))(seeds)


@functools.partial(jax.jit, static_argnums=1)
def initial_noise(keys: Key, shape: tuple[int, ...]) -> Array:
    """Unit Gaussian latents [B, *shape] float32, each drawn from its own key alone, as `generate` draws them.

    Args:
        keys: [B].
        shape: (h, w, C), static.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape, jnp.float32))(keys)
