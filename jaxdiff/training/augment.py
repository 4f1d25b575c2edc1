"""Differentiable augmentation (Zhao et al. 2020), which keeps a discriminator from memorising a small data set.

Real and generated images are augmented alike before they are scored, and the generator's gradient flows through the
augmentation.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxdiff.typing import Array, Key

SHIFT = 1 / 8  # maximum translation, as a share of each side
HOLE = 1 / 2  # size of the hole, as a share of each side


def color(x: Array, key: Key) -> Array:
    """Brightness, saturation and contrast of an image [H, W, C] around 0."""
    brightness, saturation, contrast = jax.random.uniform(key, (3,), x.dtype)
    x = x + brightness - 0.5
    gray = x.mean(-1, keepdims=True)
    x = gray + 2 * saturation * (x - gray)
    mean = x.mean()
    return mean + (0.5 + contrast) * (x - mean)


def translation(x: Array, key: Key) -> Array:
    """The image shifted by up to SHIFT of its sides, padded with zeros."""
    max_shift = [round(SHIFT * n) for n in x.shape[:2]]
    starts = [jax.random.randint(k, (), 0, 2 * n + 1) for k, n in zip(jax.random.split(key), max_shift, strict=True)]
    padded = jnp.pad(x, [*((n, n) for n in max_shift), (0, 0)])
    return jax.lax.dynamic_slice(padded, (*starts, 0), x.shape)


def cutout(x: Array, key: Key) -> Array:
    """The image with a rectangle of HOLE of its sides set to zero, centred anywhere in the image."""

    def outside_hole(key: Key, side: int) -> Array:  # [side]
        hole = round(HOLE * side)
        start = jax.random.randint(key, (), 0, side + 1 - hole % 2) - hole // 2
        positions = jnp.arange(side)
        return (positions < start) | (positions >= start + hole)

    rows, columns = (outside_hole(k, n) for k, n in zip(jax.random.split(key), x.shape[:2], strict=True))
    return jnp.where((rows[:, None] | columns[None])[..., None], x, 0)


AUGMENTATIONS: dict[str, Callable[[Array, Key], Array]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
}


def augment(x: Array, keys: Key, names: Sequence[str]) -> Array:
    """Images or latents [B, H, W, C] after the named augmentations in order, each example with its own key [B]."""

    def augment_one(x: Array, key: Key) -> Array:
        for i, name in enumerate(names):
            x = AUGMENTATIONS[name](x, jax.random.fold_in(key, i))
        return x

    return jax.vmap(augment_one)(x, keys)
