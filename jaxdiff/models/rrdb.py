"""The upscaling network of ESRGAN and Real-ESRGAN: residual-in-residual dense blocks, then doublings.

(Wang et al. 2018, section 3.1; Wang et al. 2021, section 3.3, for the pixels that become channels first.) Modules are
named as in Real-ESRGAN's files.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdiff.config.upscaler import RRDBConfig
from jaxdiff.models.convolution import convolve
from jaxdiff.typing import Array

RESIDUAL = 0.2  # scale of each residual branch
SLOPE = 0.2  # of the leaky ReLUs
# He's initialisation, scaled down for deep residual networks (Wang et al. 2018, section 3.1).
FIRST_SCALE = 0.1


def conv3x3(features: int, dtype, name: str, scale: float = 1.0) -> nn.Conv:
    init = nn.initializers.variance_scaling(2.0 * scale**2, "fan_in", "normal")
    return nn.Conv(
        features, (3, 3), padding=[(1, 1)] * 2, dtype=dtype, kernel_init=init, conv_general_dilated=convolve, name=name
    )


def activate(x: Array) -> Array:
    return nn.leaky_relu(x, SLOPE)


def pixel_unshuffle(x: Array, side: int) -> Array:
    """Squares of pixels to channels: [B, H, W, C] -> [B, H / side, W / side, C side²], channel by channel."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // side, w // side, c * side**2)


def upsample(x: Array) -> Array:
    """Nearest-neighbour upsampling: [B, H, W, C] -> [B, 2 H, 2 W, C]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class ResidualDenseBlock(nn.Module):
    """Five densely connected convolutions: each sees the input and the outputs of all before it."""

    config: RRDBConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, features = self.config, x
        for i in range(1, 5):
            new = activate(conv3x3(c.num_grow_ch, self.dtype, f"conv{i}", FIRST_SCALE)(features))
            features = jnp.concatenate([features, new], -1)
        return x + RESIDUAL * conv3x3(c.num_feat, self.dtype, "conv5", FIRST_SCALE)(features)


class RRDB(nn.Module):
    """Three dense blocks with a skip around them."""

    config: RRDBConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x
        for i in range(1, 4):
            h = ResidualDenseBlock(self.config, self.dtype, name=f"rdb{i}")(h)
        return x + RESIDUAL * h


class RRDBNet(nn.Module):
    """Images [B, H, W, 3] in [0, 1] -> [B, scale H, scale W, 3] float32, about [0, 1]; `unshuffle` divides H and W."""

    config: RRDBConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        c = self.config
        x = pixel_unshuffle(jnp.asarray(images, self.dtype), c.unshuffle)
        first = h = conv3x3(c.num_feat, self.dtype, "conv_first")(x)
        for i in range(c.num_block):
            h = RRDB(c, self.dtype, name=f"body_{i}")(h)
        h = first + conv3x3(c.num_feat, self.dtype, "conv_body")(h)
        for i in range(1, c.upsamples + 1):
            h = activate(conv3x3(c.num_feat, self.dtype, f"conv_up{i}")(upsample(h)))
        h = activate(conv3x3(c.num_feat, self.dtype, "conv_hr")(h))
        return conv3x3(3, self.dtype, "conv_last")(h).astype(jnp.float32)


@functools.lru_cache(maxsize=8)
def param_shapes(module: RRDBNet) -> dict:
    """The tree of the network's parameters as shapes."""
    side = module.config.unshuffle
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), image)["params"]
