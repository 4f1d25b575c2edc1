"""Encoding and decoding large images in overlapping tiles, one at a time, so that memory is bounded by one tile.

The result differs slightly from that of the whole image, since group norms and the attention in the middle block only
see one tile. Overlapping tiles are blended linearly.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.models.model import Model, decode_unscaled, encode_unscaled, scaled, unscaled
from jaxdiff.typing import Array, Params

TILE, OVERLAP = 64, 16  # latents: 512 pixels and 128 with Stable Diffusion's factor of 8


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """The starts of the fewest tiles that cover `size` positions and overlap by at least `overlap`, evenly spaced.

    >>> tile_starts(128, 64, 16), tile_starts(40, 64, 16)
    ([0, 32, 64], [0])
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise ValueError(f"tile {tile} must be at least 1, and overlap {overlap} from 0 to tile - 1.")
    room = max(size - tile, 0)
    gaps = -(-room // (tile - overlap))  # rounded up
    return [room * i // max(gaps, 1) for i in range(gaps + 1)]


def fades(starts: list[int], tile: int) -> np.ndarray:
    """The weight of each position of each tile, float32 [tiles, tile]: a tile fades linearly into the next.

    The weights of the tiles that cover a position sum to one.

    >>> fades([0, 2], 4).tolist()
    [[1.0, 1.0, 1.0, 0.5], [0.0, 0.5, 1.0, 1.0]]
    """
    weights = np.zeros((len(starts), starts[-1] + tile))
    end = 0
    for i, start in enumerate(starts):
        ramp = np.arange(end - start) / max(end - start, 1)
        weights[:i, start:end] *= 1 - ramp
        weights[i, start : start + tile] = [*ramp, *np.ones(tile - len(ramp))]
        end = start + tile
    return np.stack([w[i : i + tile] for w, i in zip(weights, starts, strict=True)]).astype(np.float32)


def tiled(
    function: Callable[[Array], Array],
    x: Array,
    starts: tuple[list[int], list[int]],
    tile: int,
    to_output: Callable[[int], int],
) -> Array:
    """Apply `function` to the tiles of x [B, H, W, C] one by one, and blend the results.

    Args:
        function: one tile [1, tile, tile, C] -> its output [1, H', W', C'].
        starts: rows and columns at which tiles start.
        tile: side of a tile; the sides of x if they are smaller.
        to_output: a row or column of x -> the corresponding one of the result.
    """
    tile_shape = (1, min(tile, x.shape[1]), min(tile, x.shape[2]), x.shape[3])
    out_tile = jax.eval_shape(function, jax.ShapeDtypeStruct(tile_shape, x.dtype))
    out_starts = [[to_output(start) for start in axis_starts] for axis_starts in starts]
    weights = [
        jnp.asarray(fades(axis_starts, side)) for axis_starts, side in zip(out_starts, out_tile.shape[1:3], strict=True)
    ]

    def add(out: jax.Array, index: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        i, row, column = index
        corner, corner_out = ((i, jnp.asarray(y)[row], jnp.asarray(x)[column], 0) for y, x in (starts, out_starts))
        result = function(jax.lax.dynamic_slice(x, corner, tile_shape))
        weight = weights[0][row, :, None, None] * weights[1][column, None, :, None]
        current = jax.lax.dynamic_slice(out, corner_out, out_tile.shape)
        return jax.lax.dynamic_update_slice(out, current + weight[None] * result, corner_out), None

    out = jnp.zeros((x.shape[0], *map(to_output, x.shape[1:3]), out_tile.shape[3]), out_tile.dtype)
    indices = jnp.indices((x.shape[0], *map(len, starts))).reshape(3, -1)
    return jax.lax.scan(add, out, tuple(indices))[0]


def decode_tiled(
    model: Model, params: Params, latents: Array, tile: int | None = TILE, overlap: int = OVERLAP
) -> Array:
    """`decode` a tile at a time, so that memory is bounded by one tile and the image.

    Args:
        latents: [B, h, w, C], scaled.
        tile: side of a tile in latents, static; None decodes whole images, one after another.
        overlap: latents that two neighbours share at least, 0 to tile - 1; more make seams softer.

    Returns:
        [B, H, W, 3] float32 in [0, 1]; equal to `decode` if one tile covers all, and otherwise close to it.

    Raises:
        ValueError: `tile` or `overlap` is out of range.
    """
    tile, overlap = (max(latents.shape[1:3]), 0) if tile is None else (tile, overlap)
    starts = tile_starts(latents.shape[1], tile, overlap), tile_starts(latents.shape[2], tile, overlap)
    z = unscaled(model, params, latents)
    return tiled(lambda z: decode_unscaled(model, params, z), z, starts, tile, lambda i: i * model.vae.config.factor)


def encode_tiled(model: Model, params: Params, images: Array, tile: int | None = TILE, overlap: int = OVERLAP) -> Array:
    """`encode` (the mean) a tile at a time.

    Args:
        images: [B, H, W, 3] in [0, 1]; H and W multiples of the VAE's factor.
        tile, overlap: as for `decode_tiled`, in latents.

    Returns:
        [B, h, w, C] float32, scaled as the UNet expects them.
    """
    factor = model.vae.config.factor
    h, w = images.shape[1] // factor, images.shape[2] // factor
    tile, overlap = (max(h, w), 0) if tile is None else (tile, overlap)
    latent_starts = tile_starts(h, tile, overlap), tile_starts(w, tile, overlap)
    starts = [factor * i for i in latent_starts[0]], [factor * i for i in latent_starts[1]]
    z = tiled(lambda x: encode_unscaled(model, params, x), images, starts, factor * tile, lambda i: i // factor)
    return scaled(model, params, z)
