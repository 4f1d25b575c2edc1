"""Differentiable augmentation (Zhao et al. 2020), so that a discriminator does not learn few images by heart.

What is real and what is generated are augmented alike before they are scored, and the generator's gradient goes through
the augmentation.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxdiff.typing import Array, Key

SHIFT = 1 / 8  # of the side, at most, that an image is moved by
HOLE = 1 / 2  # side of the square that is cut out, as a share of the image's


def color(x: Array, key: Key) -> Array:
    """Brightness, saturation and contrast of an image [H, W, C] around 0."""
    brightness, saturation, contrast = jax.random.uniform(key, (3,), x.dtype)
    x = x + brightness - 0.5
    gray = x.mean(-1, keepdims=True)
    x = gray + 2 * saturation * (x - gray)
    mean = x.mean()
    return mean + (0.5 + contrast) * (x - mean)


def translation(x: Array, key: Key) -> Array:
    """The image moved by up to SHIFT of its sides; zeros come in."""
    most = [round(SHIFT * n) for n in x.shape[:2]]
    starts = [jax.random.randint(k, (), 0, 2 * n + 1) for k, n in zip(jax.random.split(key), most, strict=True)]
    padded = jnp.pad(x, [*((n, n) for n in most), (0, 0)])
    return jax.lax.dynamic_slice(padded, (*starts, 0), x.shape)


def cutout(x: Array, key: Key) -> Array:
    """A square of HOLE of the sides set to zero, its middle anywhere in the image."""

    def outside(key: Key, side: int) -> Array:  # [side]
        hole = round(HOLE * side)
        start = jax.random.randint(key, (), 0, side + 1 - hole % 2) - hole // 2
        places = jnp.arange(side)
        return (places < start) | (places >= start + hole)

    rows, columns = (outside(k, n) for k, n in zip(jax.random.split(key), x.shape[:2], strict=True))
    return jnp.where((rows[:, None] | columns[None])[..., None], x, 0)


AUGMENTATIONS: dict[str, Callable[[Array, Key], Array]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
}


def augmented(x: Array, keys: Key, names: Sequence[str]) -> Array:
    """Images or latents [B, H, W, C] through the augmentations of these names, each example by its own key [B]."""

    def one(x: Array, key: Key) -> Array:
        for i, name in enumerate(names):
            x = AUGMENTATIONS[name](x, jax.random.fold_in(key, i))
        return x

    return jax.vmap(one)(x, keys)
