"""Enlarge images by an upscaling network: any scale, large images in tiles, with transparency.

A tile is cut out with a margin, and only the middle of the network's output is kept. If the margin is as wide as the
receptive field (`RRDBConfig.reach`) the result equals that of the whole image; the effective receptive field of deep
networks is much smaller, so that MARGIN is enough.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxdiff import parallel
from jaxdiff.errors import ArgumentError
from jaxdiff.models.rrdb import RRDBNet
from jaxdiff.models.tiling import tile_starts
from jaxdiff.sampling.checks import as_integer, as_unit_range
from jaxdiff.typing import Array, Params

TILE = 192  # pixels of the small image along a side of a tile, without its margin
MARGIN = 32  # pixels around a tile, at most
MAX_SCALE = 16


def upscale(
    module: RRDBNet,
    params: Params,
    images: Array,
    *,
    scale: float | None = None,
    tile: int = TILE,
    before_tile: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Enlarge images by a network.

    Args:
        module, params: as `load_upscaler` returns them.
        images: one image [H, W, C] or a batch [B, H, W, C], uint8 or float in [0, 1]; RGB, or RGBA, whose opacity is
            enlarged separately.
        scale: factor by which each side grows, 1 to 16; None: the network's own. For another factor the network is
            applied as often as needed, and the result resized to it (Lanczos).
        tile: side of a tile in pixels of the small image, at least 16; smaller ones take less memory and more time.
        before_tile: called before each tile; what it raises passes on to the caller.

    Returns:
        uint8 [round(scale H), round(scale W), C], or a batch of them.

    Raises:
        ArgumentError (a ValueError): one sentence naming the argument and what it may be.
    """
    array = np.asarray(images)
    if array.ndim not in (3, 4) or array.shape[-1] not in (3, 4) or 0 in array.shape:
        raise ArgumentError("images", f"has shape {list(array.shape)}: give [H, W, 3] or [B, H, W, 3], or 4 channels.")
    scale = float(module.config.scale if scale is None else scale)
    tile = as_integer("tile", tile, 16)
    height, width = array.shape[-3:-1]
    check_upscale(module, height, width, scale)
    if array.dtype != np.uint8:
        array = np.round(255 * np.clip(as_unit_range("images", array), 0, 1)).astype(np.uint8)
    batch = array[None] if array.ndim == 3 else array
    enlarged = np.stack([_enlarge(module, params, image, scale, tile, before_tile) for image in batch])
    return enlarged[0] if array.ndim == 3 else enlarged


def largest_scale(module: RRDBNet, scale: float) -> float:
    """The largest factor by which a side grows on the way: that of the result, or of the image before it is resized.

    Raises:
        ArgumentError: the network cannot enlarge by this scale.
    """
    network_scale = module.config.scale
    if not 1 <= scale <= MAX_SCALE:  # also true of NaN
        raise ArgumentError("scale", f"{scale:g} must be from 1 to {MAX_SCALE}.")
    if network_scale == 1 and scale != 1:
        raise ArgumentError(
            "scale", f"{scale:g} is too large for this network, which restores images without enlarging them: give 1."
        )
    return max(network_scale ** passes(network_scale, scale), scale)


def check_upscale(module: RRDBNet, height: int, width: int, scale: float) -> None:
    """Raise ArgumentError if the network cannot enlarge by this scale, or if the result does not fit into memory."""
    side = largest_scale(module, scale)
    needed = 9.0 * height * width * side**2  # bytes: the network's image, the resized one, the file's
    if needed > 2**30 and needed > (available := parallel.host_memory()):
        result_size = f"{round(width * scale)} x {round(height * scale)} pixels"
        raise ArgumentError(
            "scale",
            f"{scale:g} makes {result_size} of {width} x {height}, which take {needed / 2**30:,.1f} GiB of memory, and "
            f"this machine has {available / 2**30:,.1f}: give a smaller one.",
        )


def passes(network_scale: int, scale: float) -> int:
    """How often a network of scale `network_scale` must be applied to enlarge by at least `scale`.

    >>> passes(4, 2), passes(4, 4), passes(4, 4.5), passes(2, 8)
    (1, 1, 2, 3)
    """
    count = 1
    while network_scale > 1 and network_scale**count < scale:
        count += 1
    return count


def _enlarge(
    module: RRDBNet, params: Params, image: np.ndarray, scale: float, tile: int, before_tile: Callable[[], None]
) -> np.ndarray:
    """One image uint8 [H, W, 3 or 4]."""
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])

    def enlarge(image: np.ndarray) -> np.ndarray:
        for _ in range(passes(module.config.scale, scale)):
            image = in_tiles(module, params, image, tile, before_tile)
        if image.shape[:2] == (height, width):
            return image
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))

    if image.shape[2] == 3:
        return enlarge(image)
    alpha = image[..., 3]
    if alpha.min() == alpha.max():
        opacity = np.full((height, width), alpha.flat[0], np.uint8)
    else:
        opacity = np.round(enlarge(np.repeat(alpha[..., None], 3, 2)).mean(2)).astype(np.uint8)
    return np.dstack([enlarge(fill_transparent(image)), opacity])


def fill_transparent(image: np.ndarray) -> np.ndarray:
    """The colours uint8 [H, W, 3] of an image uint8 [H, W, 4]; fully transparent pixels get the nearest visible colour.

    Their own colour, often black, would darken the edges.
    """
    from scipy.ndimage import distance_transform_edt

    transparent = image[..., 3] == 0
    if not transparent.any() or transparent.all():
        return np.ascontiguousarray(image[..., :3])
    y, x = distance_transform_edt(transparent, return_distances=False, return_indices=True)
    return image[y, x, :3]


@functools.partial(jax.jit, static_argnums=0)
def network(module: RRDBNet, params: Params, images: Array) -> jax.Array:
    """Images uint8 [B, H, W, 3] -> uint8 [B, scale H, scale W, 3]."""
    x: Any = module.apply({"params": params}, jnp.asarray(images, jnp.float32) / 255.0)
    return jnp.round(255 * jnp.clip(x, 0.0, 1.0)).astype(jnp.uint8)


def windows(size: int, tile: int, margin: int, multiple: int) -> list[tuple[int, int, int, int]]:
    """Where to cut along a side: (start and end of a window, start and end of what is kept of it), in pixels.

    All windows have one length, so that one program serves them all, and start at a multiple of `multiple`.

    >>> windows(100, 40, 10, 1)
    [(0, 60, 0, 40), (20, 80, 40, 60), (40, 100, 60, 100)]
    """
    length = tile + 2 * margin
    if size <= length:
        return [(0, size, 0, size)]
    starts = [start - start % multiple for start in tile_starts(size, length, 2 * margin + multiple)]
    boundaries = [(start + length + after) // 2 for start, after in itertools.pairwise(starts)]
    cuts = [0, *boundaries, size]
    return [(start, start + length, cuts[i], cuts[i + 1]) for i, start in enumerate(starts)]


def in_tiles(
    module: RRDBNet,
    params: Params,
    image: np.ndarray,
    tile: int = TILE,
    before_tile: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """An image uint8 [H, W, 3] through the network once, a window at a time: uint8 [scale H, scale W, 3]."""
    c, (height, width) = module.config, image.shape[:2]
    scale, multiple = c.scale, c.unshuffle
    padded = np.pad(image, ((0, -height % multiple), (0, -width % multiple), (0, 0)), "symmetric")
    side, margin = -(-tile // multiple) * multiple, -(-min(MARGIN, c.reach) // multiple) * multiple
    rows, columns = (windows(n, side, margin, multiple) for n in padded.shape[:2])
    output = np.empty((padded.shape[0] * scale, padded.shape[1] * scale, 3), np.uint8)
    for top, bottom, first, last in rows:
        for left, right, begin, end in columns:
            before_tile()
            tile_output: Any = np.asarray(network(module, params, padded[None, top:bottom, left:right]))[0]
            crop = tile_output[
                (first - top) * scale : (last - top) * scale, (begin - left) * scale : (end - left) * scale
            ]
            output[first * scale : last * scale, begin * scale : end * scale] = crop
    return output[: height * scale, : width * scale]
