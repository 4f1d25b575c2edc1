"""Tiles of the autoencoder: against diffusers' own tiling, against the whole, and in memory."""

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import VAEConfig
from jaxdiff.models.model import decode, encode
from jaxdiff.models.tiling import decode_tiled, encode_tiled, tile_starts, tiled
from jaxdiff.models.vae import AutoencoderKL
from tests.support import networks
from tests.support.comparison import TOLERANCE, drawn, error

FACTOR = 4  # of the small autoencoder
SD15 = {  # of Stable Diffusion 1.5's autoencoder
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}


def quiet(name: str, tensor: np.ndarray) -> np.ndarray:
    """The decoder's last layer a tenth as strong, so that images stay within [-1, 1] and nothing is clipped."""
    return 0.1 * tensor if name.startswith("decoder.conv_out") else tensor


@pytest.fixture(scope="module")
def small(tiny):
    """(model, params) with a random autoencoder of factor 4."""
    vae = AutoencoderKL(VAEConfig.from_dict(networks.VAES["sd1"]))
    params = drawn(vae, (jnp.zeros((1, 8, 8, 3)),))["params"]
    params["decoder"]["conv_out"] = jax.tree.map(lambda x: 0.1 * x, params["decoder"]["conv_out"])
    return dataclasses.replace(tiny[0], vae=vae), {"vae": params}


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).standard_normal((2, 14, 20, 4)).astype(np.float32) / 4


@pytest.fixture(scope="module")
def whole(small, latents):
    """The images of the latents in one piece."""
    return jax.jit(lambda z: decode(*small, z))(latents)


@pytest.fixture(scope="module")
def theirs():
    """PyTorch's autoencoder with the same weights."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tests.support import oracle

    vae = oracle.vae("sd1")
    with torch.no_grad():
        for name, p in vae.named_parameters():
            p.copy_(torch.from_numpy(quiet(name, p.numpy())))
    return vae


def tiled_by_theirs(theirs, latents, tile: int, overlap: int):
    """(images in [0, 1], latents of them) as diffusers tiles."""
    import torch

    from tests.support.oracle import nchw, nhwc

    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = tile, tile * FACTOR
    theirs.tile_overlap_factor = overlap / tile
    scale = theirs.config.scaling_factor
    with torch.no_grad():
        images = theirs.decode(nchw(latents) / scale).sample
        means = theirs.encode(images).latent_dist.mean * scale
    assert images.abs().max() < 1
    return nhwc(images) / 2 + 0.5, nhwc(means)


def both(model, params, latents, tile, overlap):
    decoded = decode_tiled(model, params, latents, tile, overlap)
    return decoded, lambda images: encode_tiled(model, params, images, tile, overlap)


@pytest.mark.slow
def test_abutting_tiles_equal_pytorchs(small, latents, theirs):
    """Without overlap both cut the same tiles: 2 by 3 of 8, cut to 16 by 24 latents."""
    z = np.pad(latents, ((0, 0), (0, 2), (0, 4), (0, 0)))
    images, means = tiled_by_theirs(theirs, z, 8, 0)
    ours = jax.jit(lambda z: decode_tiled(*small, z, 8, 0))(z)
    assert error(ours, images) < TOLERANCE
    assert error(jax.jit(lambda x: encode_tiled(*small, x, 8, 0))(images), means) < TOLERANCE


def test_overlapping_tiles_equal_pytorchs(small, latents, theirs):
    """14 by 20 latents in tiles of 8 that share 2: ours start at 0, 6 (and 12).

    diffusers cuts one more row and column of tiles, of the last 2 latents alone, so the comparison ends where they
    begin; and where four tiles meet it blends in an order of its own, so those squares are left out.
    """
    images, means = tiled_by_theirs(theirs, latents, 8, 2)
    compared = np.ones((14, 20), bool)
    compared[12:], compared[:, 18:] = False, False
    compared[6:8, 6:8], compared[6:8, 12:14] = False, False
    ours = jax.jit(lambda z: decode_tiled(*small, z, 8, 2))(latents)
    pixels = np.kron(compared, np.ones((FACTOR, FACTOR), bool))
    assert error(ours[:, pixels], images[:, pixels]) < TOLERANCE
    encoded = jax.jit(lambda x: encode_tiled(*small, x, 8, 2))(images)
    assert error(encoded[:, compared], means[:, compared]) < TOLERANCE


@pytest.mark.slow
def test_one_tile_is_the_whole(small, latents, whole):
    """A larger one than the latents, and None, which takes the images of a batch one by one."""
    for tile in (64, None):
        ours = jax.jit(lambda z, tile=tile: decode_tiled(*small, z, tile))(latents)
        assert error(ours, whole) < TOLERANCE
    encoded = jax.jit(lambda x: encode_tiled(*small, x, None))(whole)
    assert error(encoded, jax.jit(lambda x: encode(*small, x))(whole)) < TOLERANCE


@pytest.mark.slow
def test_more_overlap_comes_nearer_to_the_whole(small, latents, whole):
    errors = [error(jax.jit(lambda z, o=o: decode_tiled(*small, z, 12, o))(latents), whole) for o in (0, 6)]
    assert errors[1] < errors[0] < 0.1


@pytest.mark.slow
def test_gradient_flows_through_tiles(small, latents):
    """Each latent has its part in the image."""
    gradient = jax.jit(jax.grad(lambda z: decode_tiled(*small, z, 8, 2).sum()))(latents[:1])
    assert gradient.shape == latents[:1].shape
    assert np.all(np.abs(gradient).sum(-1) > 0)


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "starts"),
    [
        (8, 8, 2, [0]),
        (3, 8, 2, [0]),
        (9, 8, 2, [0, 1]),
        (20, 8, 2, [0, 6, 12]),
        (21, 8, 2, [0, 4, 8, 13]),
        (24, 8, 0, [0, 8, 16]),
    ],
)
def test_tiles_cover_all_and_overlap_enough(size, tile, overlap, starts):
    assert tile_starts(size, tile, overlap) == starts
    assert starts[-1] + tile >= size
    assert all(b - a <= tile - overlap for a, b in pairwise(starts))


def test_the_seam_of_equal_tiles_does_not_show():
    """Weights sum to one: tiles cut from one image give it back, however much they overlap."""
    x = np.random.default_rng(0).standard_normal((2, 15, 23, 3)).astype(np.float32)
    for rows, columns in (([0, 5], [0, 5, 13]), ([0, 2, 4, 5], [0, 3, 6, 13])):
        same = tiled(lambda tile: tile, x, (rows, columns), 10, lambda i: i)
        np.testing.assert_allclose(same, x, rtol=1e-6)


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (8, 8), (8, -1)])
def test_tiles_out_of_range_are_named(small, latents, tile, overlap):
    with pytest.raises(ValueError, match=f"tile {tile} must be at least 1, and overlap {overlap} from 0 to tile - 1"):
        decode_tiled(*small, latents, tile, overlap)


@pytest.mark.slow
def test_memory_of_a_large_image_is_that_of_a_tile(tiny):
    """Stable Diffusion 1.5's decoder, 2048 by 2048 pixels: compiled and its buffers counted, not run."""
    model = dataclasses.replace(tiny[0], vae=AutoencoderKL(VAEConfig.from_dict(SD15)))
    shapes = jax.eval_shape(lambda: model.vae.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"])

    def megabytes(function, side: int) -> float:
        z = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
        compiled = jax.jit(lambda params, z: function(model, {"vae": params}, z)).lower(shapes, z).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    tile, whole, parts = megabytes(decode, 64), megabytes(decode, 256), megabytes(decode_tiled, 256)
    print(f"temporary memory: 512 x 512 {tile:.0f} MiB, 2048 x 2048 whole {whole:.0f} MiB, in tiles {parts:.0f} MiB")
    image = 4 * 3 * 2048**2 / 2**20
    assert parts < tile + 6 * image  # tiles, and what joins them
    assert parts < whole / 8
    assert parts - megabytes(decode_tiled, 128) < 1  # the image itself is no temporary
