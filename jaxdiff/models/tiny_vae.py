"""The tiny distilled autoencoder (TAESD) for previews, with the layout of diffusers' AutoencoderTiny."""

import jax.numpy as jnp
from flax import linen as nn

from jaxdiff.config import TinyVAEConfig
from jaxdiff.models.layers import ACTIVATIONS
from jaxdiff.typing import Array

NO_VARIANCE = -1e4  # a log-variance whose exponential is 0

# Layers are numbered as in the checkpoints, which count activations and upsampling as layers.


def conv3x3(features: int, dtype, name: str, *, strides: int = 1, bias: bool = True) -> nn.Conv:
    return nn.Conv(features, (3, 3), strides, [(1, 1)] * 2, use_bias=bias, dtype=dtype, name=name)


class TinyBlock(nn.Module):
    """Three convolutions with a skip, then a ReLU."""

    act: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        act, width = ACTIVATIONS[self.act], x.shape[-1]
        h = act(conv3x3(width, self.dtype, "conv_0")(x))
        h = act(conv3x3(width, self.dtype, "conv_2")(h))
        return nn.relu(x + conv3x3(width, self.dtype, "conv_4")(h))


class TinyEncoder(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] -> latents [B, h, w, latent_channels]."""

    config: TinyVAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, n = self.config, 0
        x = (x.astype(self.dtype) + 1) / 2
        for i, (width, blocks) in enumerate(zip(c.encoder_block_out_channels, c.num_encoder_blocks, strict=True)):
            first = i == 0
            x = conv3x3(width, self.dtype, f"layers_{n}", strides=1 if first else 2, bias=first)(x)
            for j in range(blocks):
                x = TinyBlock(c.act_fn, self.dtype, name=f"layers_{n + 1 + j}")(x)
            n += 1 + blocks
        return conv3x3(c.latent_channels, self.dtype, f"layers_{n}")(x)


class TinyDecoder(nn.Module):
    """Latents [B, h, w, latent_channels], softly clipped to (-3, 3) -> images [B, H, W, 3], about [-1, 1]."""

    config: TinyVAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, n = self.config, 2
        x = 3 * jnp.tanh(x.astype(self.dtype) / 3)
        x = ACTIVATIONS[c.act_fn](conv3x3(c.decoder_block_out_channels[0], self.dtype, "layers_0")(x))
        levels = list(zip(c.decoder_block_out_channels, c.num_decoder_blocks, strict=True))
        for i, (width, blocks) in enumerate(levels):
            for j in range(blocks):
                x = TinyBlock(c.act_fn, self.dtype, name=f"layers_{n + j}")(x)
            n += blocks
            if i < len(levels) - 1:
                x = x.repeat(c.upsampling_scaling_factor, axis=1).repeat(c.upsampling_scaling_factor, axis=2)
                x = conv3x3(width, self.dtype, f"layers_{n + 1}", bias=False)(x)
                n += 2
        return 2 * conv3x3(c.out_channels, self.dtype, f"layers_{n}")(x) - 1


class AutoencoderTiny(nn.Module):
    """Encoder and decoder with the methods of `AutoencoderKL`, which it can replace in a model."""

    config: TinyVAEConfig
    remat: bool = False  # has no effect: the network is small
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.encoder = TinyEncoder(self.config, self.dtype)
        self.decoder = TinyDecoder(self.config, self.dtype)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """[B, H, W, 3] in [-1, 1] -> latents float32 [B, h, w, latent_channels] and a log-variance of -10000 (none)."""
        latents = self.encoder(images).astype(jnp.float32)
        return latents, jnp.full_like(latents, NO_VARIANCE)

    def decode(self, latents: Array) -> Array:
        """[B, h, w, latent_channels] -> [B, H, W, 3], about [-1, 1], float32."""
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images: Array) -> Array:
        """Reconstruction: touches every parameter, for initialisation."""
        return self.decode(self.encode(images)[0])
