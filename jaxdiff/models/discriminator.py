"""Discriminators of images or latents: one scores patches, one whole images together with their text."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdiff.models.layers import conv
from jaxdiff.typing import Array

NORMAL = nn.initializers.normal(0.02)  # of a patch discriminator's kernels
SLOPE = 0.2  # of every leaky ReLU here
EPS = 1e-5


def leaky(x: Array) -> Array:
    return jax.nn.leaky_relu(x, SLOPE)


class BatchNorm(nn.Module):
    """Batch normalisation by the statistics of x itself (Ioffe & Szegedy 2015, algorithm 1), of the whole batch."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", lambda key, shape: 1.0 + NORMAL(key, shape), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, variance = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
        return ((wide - mean) * jax.lax.rsqrt(variance + EPS) * scale + bias).astype(self.dtype)


class PatchDiscriminator(nn.Module):
    """Scores of overlapping patches (Isola et al. 2017, appendix 6.1.2), as taming-transformers' NLayerDiscriminator.

    Layers are numbered as in its list `main`, which includes activations.
    """

    features: int = 64  # of the first layer
    layers: int = 3  # of stride 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Images [B, H, W, C] in [-1, 1] -> [B, h, w, 1] float32; a patch is 70 pixels wide with 3 layers."""

        def conv4(place: int, features: int, strides: int, bias: bool) -> nn.Conv:
            return nn.Conv(
                features, (4, 4), strides, 1, use_bias=bias, dtype=self.dtype, kernel_init=NORMAL, name=f"main_{place}"
            )

        x = leaky(conv4(0, self.features, 2, True)(x.astype(self.dtype)))
        place = 2
        for i in range(1, self.layers + 1):
            strides = 2 if i < self.layers else 1
            x = conv4(place, self.features * min(2**i, 8), strides, False)(x)
            x = leaky(BatchNorm(self.dtype, name=f"main_{place + 1}")(x))
            place += 3
        scores = conv4(place, 1, 1, True)(x)
        return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


class ResidualBlock(nn.Module):
    """x plus two 3x3 convolutions without norms, the second of which starts at zero (Zhang et al. 2019, section 3)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = conv(x.shape[-1], self.dtype, "conv1")(leaky(x))
        return x + conv(x.shape[-1], self.dtype, "conv2", zero=True)(leaky(h))


class ProjectionDiscriminator(nn.Module):
    """Residual blocks without norms (Huang et al. 2024, section 3.3) and a score conditioned on the text.

    The score is psi(phi(x)) + <V y, phi(x)> / sqrt(D) for features phi of the image and a vector y of the text (Miyato
    & Koyama 2018, equation 3).
    """

    features: tuple[int, ...] = (64, 128, 256)  # of each level, half the size of the one before
    blocks: int = 1  # of each level
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, cond: Array | None = None) -> Array:
        """x [B, H, W, C], cond [B, D] of the text or None -> [B] float32; H and W multiples of 2 ** (levels - 1)."""
        x = conv(self.features[0], self.dtype, "conv_in")(x.astype(self.dtype))
        for i, width in enumerate(self.features):
            if i:
                x = conv(width, self.dtype, f"downsamplers_{i}", size=1, padding=0)(nn.avg_pool(x, (2, 2), (2, 2)))
            for j in range(self.blocks):
                x = ResidualBlock(self.dtype, name=f"blocks_{i * self.blocks + j}")(x)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        h = leaky(x).astype(wide).mean((1, 2))  # [B, features[-1]]
        score = nn.Dense(1, dtype=wide, name="linear")(h)[:, 0]
        if cond is None:
            return score
        text = nn.Dense(h.shape[-1], use_bias=False, dtype=wide, name="text_proj")(cond)
        return score + (text * h).sum(-1) / h.shape[-1] ** 0.5
