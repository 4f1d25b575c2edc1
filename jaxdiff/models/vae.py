"""The variational autoencoder of latent diffusion (Rombach et al. 2022, section 3.1), as diffusers' AutoencoderKL."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxdiff.config import Flux2VAEConfig, VAEConfig
from jaxdiff.models.layers import ACTIVATIONS, Attention, Downsample, ResnetBlock, Upsample, conv, rematerialised
from jaxdiff.typing import Array

EPS = 1e-6  # of every norm here


class VAEBlock(nn.Module):
    """One level: resnets, then a change of resolution unless it is the last level."""

    config: VAEConfig
    features: int
    layers: int
    resample: type[Downsample] | type[Upsample] | None
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for j in range(self.layers):
            x = resnet(self.config, self.features, f"resnets_{j}", self.remat, self.dtype)(x)
        if self.resample is Downsample:
            x = Downsample(self.features, asymmetric=True, dtype=self.dtype, name="downsamplers_0")(x)
        elif self.resample is Upsample:
            x = Upsample(self.features, self.dtype, name="upsamplers_0")(x)
        return x


class VAEMidBlock(nn.Module):
    """The lowest level: resnet, attention of one head over all positions, resnet."""

    config: VAEConfig
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        x = resnet(self.config, c, "resnets_0", self.remat, self.dtype)(x)
        if self.config.mid_block_add_attention:
            x = x + VAEAttention(self.config.norm_num_groups, self.dtype, name="attentions_0")(x)
        return resnet(self.config, c, "resnets_1", self.remat, self.dtype)(x)


class VAEAttention(nn.Module):
    """Self-attention of one head over the positions of x [B, H, W, C], after a group norm."""

    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        tokens = nn.GroupNorm(self.groups, epsilon=EPS, dtype=self.dtype, name="group_norm")(x).reshape(b, h * w, c)
        attend = Attention(1, bias=True, dtype=self.dtype)
        nn.share_scope(self, attend)  # in the checkpoints the projections are siblings of the norm
        return attend(tokens).reshape(b, h, w, c)


def resnet(c: VAEConfig, features: int, name: str, remat: bool | str, dtype) -> ResnetBlock:
    cls = rematerialised(ResnetBlock, remat)
    return cls(features, c.norm_num_groups, EPS, c.act_fn, dtype=dtype, name=name)


class Encoder(nn.Module):
    """Images [B, H, W, 3] -> mean and log-variance side by side [B, h, w, 2 * latent_channels]."""

    config: VAEConfig
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, dtype = self.config, self.dtype
        x = conv(c.block_out_channels[0], dtype, "conv_in")(x.astype(dtype))
        for i, features in enumerate(c.block_out_channels):
            resample = Downsample if i < len(c.block_out_channels) - 1 else None
            x = VAEBlock(c, features, c.layers_per_block, resample, self.remat, dtype, name=f"down_blocks_{i}")(x)
        x = VAEMidBlock(c, self.remat, dtype, name="mid_block")(x)
        x = nn.GroupNorm(c.norm_num_groups, epsilon=EPS, dtype=dtype, name="conv_norm_out")(x)
        return conv(2 * c.latent_channels, dtype, "conv_out")(ACTIVATIONS[c.act_fn](x))


class Decoder(nn.Module):
    """Latents [B, h, w, latent_channels] -> images [B, H, W, 3]."""

    config: VAEConfig
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, dtype = self.config, self.dtype
        x = conv(c.block_out_channels[-1], dtype, "conv_in")(x.astype(dtype))
        x = VAEMidBlock(c, self.remat, dtype, name="mid_block")(x)
        for i, features in enumerate(reversed(c.block_out_channels)):
            resample = Upsample if i < len(c.block_out_channels) - 1 else None
            x = VAEBlock(c, features, c.layers_per_block + 1, resample, self.remat, dtype, name=f"up_blocks_{i}")(x)
        x = nn.GroupNorm(c.norm_num_groups, epsilon=EPS, dtype=dtype, name="conv_norm_out")(x)
        return conv(c.out_channels, dtype, "conv_out")(ACTIVATIONS[c.act_fn](x))


class PatchStatistics(nn.Module):
    """Mean and variance [4 C] of the latents' 2 x 2 patches, by channel, row and column: measured, not learned."""

    channels: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        size = (4 * self.channels,)
        return (
            self.param("running_mean", nn.initializers.zeros, size),
            self.param("running_var", nn.initializers.ones, size),
        )


class AutoencoderKL(nn.Module):
    """Encoder to a diagonal Gaussian and decoder. Images are in [-1, 1]; latents are not scaled here."""

    config: VAEConfig
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        self.encoder = Encoder(c, self.remat, self.dtype)
        self.decoder = Decoder(c, self.remat, self.dtype)
        if c.use_quant_conv:
            self.quant_conv = nn.Conv(2 * c.latent_channels, (1, 1), dtype=self.dtype)
        if c.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(c.latent_channels, (1, 1), dtype=self.dtype)
        if isinstance(c, Flux2VAEConfig):
            self.bn = PatchStatistics(c.latent_channels)

    def statistics(self, height: int, width: int) -> tuple[Array, Array]:
        """FLUX.2: mean and standard deviation [height, width, C] for latents of this (even) size."""
        c: Any = self.config

        def tiled(values: Array) -> Array:
            patch = values.astype(jnp.float32).reshape(c.latent_channels, 2, 2).transpose(1, 2, 0)
            return jnp.tile(patch, (height // 2, width // 2, 1))

        mean, variance = self.bn()
        return tiled(mean), tiled(jnp.sqrt(variance.astype(jnp.float32) + c.batch_norm_eps))

    def encode(self, images: Array) -> tuple[Array, Array]:
        """[B, H, W, 3] in [-1, 1] -> mean and log-variance in [-30, 20], float32 [B, h, w, latent_channels]."""
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, -1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Array) -> Array:
        """[B, h, w, latent_channels] -> [B, H, W, 3], about [-1, 1], float32."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents.astype(self.dtype))
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images: Array) -> Array:
        """Reconstruction through the mean: touches every parameter, for initialisation."""
        if isinstance(self.config, Flux2VAEConfig):
            self.statistics(2, 2)
        return self.decode(self.encode(images)[0])
