"""ControlNet (Zhang et al. 2023): a copy of the UNet's encoder that conditions it on an image; layout of diffusers."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdiff.config import ConfigError, ControlNetConfig, UNetConfig
from jaxdiff.models.layers import conv
from jaxdiff.models.unet import Residuals, UNet2DConditionModel, UNetEncoder, per_level, score_bias
from jaxdiff.typing import Array, Key, Params


class ControlNetConditioningEmbedding(nn.Module):
    """The control image to features of the latents' size: the network E of Zhang et al. 2023, section 3.2."""

    features: int
    widths: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, control_image: Array) -> Array:
        """[B, H, W, 3] -> [B, h, w, features]; h = H / 2 ** (len(widths) - 1)."""
        x = jax.nn.silu(conv(self.widths[0], self.dtype, "conv_in")(control_image))
        for i, (narrow, wide) in enumerate(pairwise(self.widths)):
            x = jax.nn.silu(conv(narrow, self.dtype, f"blocks_{2 * i}")(x))
            x = jax.nn.silu(conv(wide, self.dtype, f"blocks_{2 * i + 1}", strides=2)(x))
        return conv(self.features, self.dtype, "conv_out", zero=True)(x)


class ControlNet(UNetEncoder):
    """Control image to residuals of the UNet; zero before training, since each output ends in a zero convolution."""

    config: ControlNetConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        embeddings: Array,
        control_image: Array,
        pooled: Array | None = None,
        time_ids: Array | None = None,
        attention_mask: Array | None = None,
    ) -> Residuals:
        """The UNet's residuals.

        Args:
            x: noised latents [B, h, w, in_channels].
            t: timestep, scalar or [B].
            embeddings: text [B, L, cross_attention_dim], the UNet's.
            control_image: [B, H, W, 3] in [0, 1], `config.factor` times as high and wide as the latents.
            pooled, time_ids, attention_mask: as for the UNet.

        Returns:
            The `residuals` argument of `UNet2DConditionModel`, in the compute dtype.

        Raises:
            ValueError: the control image's size does not fit the latents'.
            ConfigError: the config has global_pool_conditions.
        """
        c, dtype = self.config, self.dtype
        if c.global_pool_conditions:
            raise ConfigError("a ControlNet with global_pool_conditions is not supported: use one without it.")
        sizes = tuple(c.factor * n for n in x.shape[1:3])
        if control_image.shape[1:] != (*sizes, c.conditioning_channels):
            raise ValueError(
                f"control_image has shape {list(control_image.shape[1:])}, these latents need "
                f"{[*sizes, c.conditioning_channels]}: resize it first."
            )
        if c.controlnet_conditioning_channel_order == "bgr":
            control_image = control_image[..., ::-1]
        temb = self.embed(jnp.broadcast_to(t, x.shape[:1]), pooled, time_ids, None, None)
        width = c.block_out_channels[0]
        x = conv(width, dtype, "conv_in")(x.astype(dtype))
        encoder = ControlNetConditioningEmbedding(
            width, c.conditioning_embedding_out_channels, dtype, name="controlnet_cond_embedding"
        )
        context, bias = embeddings.astype(dtype), score_bias(attention_mask)
        mid, skips = self.down(x + encoder(control_image.astype(dtype)), temb, context, bias)

        def zero(x: Array, name: str) -> Array:
            return conv(x.shape[-1], dtype, name, size=1, padding=0, zero=True)(x)

        down = [zero(skip, f"controlnet_down_blocks_{i}") for i, skip in enumerate(skips)]
        return down, zero(mid, "controlnet_mid_block")


def combine(residuals: Sequence[Residuals], scales: Sequence[Array | float]) -> Residuals:
    """The sum of the residuals of several ControlNets, each multiplied by its scale, scalar or [B]."""
    scaled = [
        jax.tree.map(lambda r, s=scale: r * jnp.reshape(s, (-1, 1, 1, 1)).astype(r.dtype), residual)
        for residual, scale in zip(residuals, scales, strict=True)
    ]
    return jax.tree.map(lambda *parts: sum(parts), *scaled)


def check_fits(controlnet: ControlNetConfig, unet: UNetConfig) -> None:
    """Raise ConfigError if the ControlNet was trained for another family of UNets."""
    names = ("block_out_channels", "layers_per_block", "cross_attention_dim", "projection_class_embeddings_input_dim")
    levels = len(unet.block_out_channels)
    for name in names:
        theirs, ours = getattr(controlnet, name), getattr(unet, name)
        if per_level(theirs, levels) != per_level(ours, levels):
            raise ConfigError(
                f"the ControlNet's {name} is {theirs}, this UNet's is {ours}: take a ControlNet of the model's family."
            )


def example_inputs(c: ControlNetConfig) -> tuple[Array, ...]:
    """The smallest inputs of a ControlNet, zeros; the parameters' shapes do not depend on their size."""
    side = 2 ** (len(c.block_out_channels) - 1)
    control_image = (1, side * c.factor, side * c.factor, c.conditioning_channels)
    shapes: list[tuple[int, ...]] = [(1, side, side, c.in_channels), (1,), (1, 2, c.cross_attention_dim), control_image]
    if c.addition_embed_type == "text_time":
        ids = 6 * (c.addition_time_embed_dim or 0)
        shapes += [(1, (c.projection_class_embeddings_input_dim or 0) - ids), (1, 6)]
    return tuple(jnp.zeros(shape) for shape in shapes)


def from_unet(unet: UNet2DConditionModel, params: Params, key: Key, factor: int = 8) -> tuple[ControlNet, Params]:
    """A new ControlNet: a copy of the UNet's encoder, with fresh parameters for the layers that the UNet lacks.

    Args:
        params: of the UNet.
        key: for the fresh parameters.
        factor: pixels per latent along one side, a power of 2: the autoencoder's.
    """
    default_widths = ControlNetConfig().conditioning_embedding_out_channels
    widths = tuple(default_widths[min(i, len(default_widths) - 1)] for i in range(factor.bit_length()))
    values = {**dataclasses.asdict(unet.config), "conditioning_embedding_out_channels": widths}
    config = ControlNetConfig.from_dict(values)
    controlnet = ControlNet(config, unet.remat, unet.dtype)
    fresh = jax.jit(controlnet.init)(key, *example_inputs(config))["params"]  # jit: computes no activation
    return controlnet, {name: params.get(name, value) for name, value in fresh.items()}
