"""The denoising UNet of latent diffusion (Rombach et al. 2022), with the layout of diffusers' UNet2DConditionModel."""

import jax.numpy as jnp
from flax import linen as nn

from jaxdiff.config import ConfigError, UNetConfig
from jaxdiff.models.layers import (
    ACTIVATIONS,
    Downsample,
    ResnetBlock,
    TimestepEmbedding,
    Transformer2D,
    Upsample,
    conv,
    rematerialised,
    timestep_embedding,
)
from jaxdiff.typing import Array

Residuals = tuple[list[Array], Array]  # for each skip connection in their order, and for the middle: [B, h, w, c]

BLOCKS = {  # block type -> whether it attends to the text
    "DownBlock2D": False,
    "UpBlock2D": False,
    "UNetMidBlock2D": False,
    "CrossAttnDownBlock2D": True,
    "CrossAttnUpBlock2D": True,
    "UNetMidBlock2DCrossAttn": True,
}


def attends(block_type: str) -> bool:
    """Whether a type of block attends to the text; raises ConfigError for an unknown type."""
    if block_type not in BLOCKS:
        raise ConfigError(f"unet/config.json names the block {block_type!r}; known are {', '.join(BLOCKS)}.")
    return BLOCKS[block_type]


def per_level(value, levels: int) -> tuple:
    """One value per level of a setting that is given once or per level."""
    return tuple(value) if isinstance(value, tuple) else (value,) * levels


def score_bias(attention_mask: Array | None) -> Array | None:
    """The bias [B, L] of attention scores that weights each key by its mask in [0, 1]: log(mask); 0 hides a key.

    Values between 0 and 1 occur when prompts of different lengths are blended.
    """
    return None if attention_mask is None else jnp.log(attention_mask.astype(jnp.float32))


class UNetBlock(nn.Module):
    """One level of the encoder, or if `up` of the decoder: resnets, each followed by a transformer if `attend`.

    In the encoder, `skips` collects every output; in the decoder, each resnet first takes the last skip off the list.
    """

    config: UNetConfig
    level: int  # index into the per-level settings of the config
    layers: int
    attend: bool
    up: bool = False
    resample: bool = True  # whether a down- or up-sampling layer ends the level
    remat: bool | str = False  # recompute activations in the backward pass
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, temb: Array, context: Array, bias: Array | None, skips: list[Array]) -> Array:
        c = self.config
        features = c.block_out_channels[self.level]
        for j in range(self.layers):
            if self.up:
                x = jnp.concatenate([x, skips.pop()], -1)
            x = resnet(c, features, f"resnets_{j}", self.remat, self.dtype)(x, temb)
            if self.attend:
                x = transformer(c, self.level, f"attentions_{j}", self.remat, self.dtype)(x, context, bias)
            if not self.up:
                skips.append(x)
        if self.resample and self.up:
            x = Upsample(features, self.dtype, name="upsamplers_0")(x, skips[-1].shape[1], skips[-1].shape[2])
        elif self.resample:
            x = Downsample(features, padding=c.downsample_padding, dtype=self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x


class UNetMidBlock(nn.Module):
    """The middle block: resnet, transformer, resnet; only the first resnet if it does not attend to the text."""

    config: UNetConfig
    attend: bool
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, temb: Array, context: Array, bias: Array | None) -> Array:
        c = self.config
        x = resnet(c, x.shape[-1], "resnets_0", self.remat, self.dtype)(x, temb)
        if not self.attend:
            return x
        last = len(c.block_out_channels) - 1
        x = transformer(c, last, "attentions_0", self.remat, self.dtype, middle=True)(x, context, bias)
        return resnet(c, x.shape[-1], "resnets_1", self.remat, self.dtype)(x, temb)


def resnet(c: UNetConfig, features: int, name: str, remat: bool | str, dtype) -> ResnetBlock:
    cls = rematerialised(ResnetBlock, remat)
    return cls(features, c.norm_num_groups, c.norm_eps, c.act_fn, zero_init=True, dtype=dtype, name=name)


def transformer(
    c: UNetConfig, level: int, name: str, remat: bool | str, dtype, *, middle: bool = False
) -> Transformer2D:
    """The transformer of a level, or of the middle block, for which diffusers ignores `only_cross_attention`."""
    levels = len(c.block_out_channels)
    cls = rematerialised(Transformer2D, remat)
    return cls(
        per_level(c.heads, levels)[level],
        per_level(c.transformer_layers_per_block, levels)[level],
        c.norm_num_groups,
        c.use_linear_projection,
        per_level(c.only_cross_attention, levels)[level] and not middle,
        dtype=dtype,
        name=name,
    )


class UNetEncoder(nn.Module):
    """The part shared by the UNet and a ControlNet: embeddings, encoder and middle block."""

    config: UNetConfig
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    def down(self, x: Array, temb: Array, context: Array, bias: Array | None) -> tuple[Array, list[Array]]:
        """The output [B, h, w, C] of conv_in -> the output of the middle block and the skip connections."""
        c, last = self.config, len(self.config.block_out_channels) - 1
        layers = per_level(c.layers_per_block, last + 1)
        skips = [x]
        for i, kind in enumerate(c.down_block_types):
            block = UNetBlock(
                c, i, layers[i], attends(kind), False, i < last, self.remat, self.dtype, name=f"down_blocks_{i}"
            )
            x = block(x, temb, context, bias, skips)
        if c.mid_block_type is not None:
            mid_block = UNetMidBlock(c, attends(c.mid_block_type), self.remat, self.dtype, name="mid_block")
            x = mid_block(x, temb, context, bias)
        return x, skips

    @nn.nowrap
    def sinusoids(self, t: Array, dim: int) -> Array:
        c = self.config
        return timestep_embedding(t, dim, flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift).astype(self.dtype)

    def embed(self, t, pooled, time_ids, class_labels, guidance) -> Array:
        """The embedding [B, 4 * block_out_channels[0]] of the timestep and of the other conditions in the config."""
        c, dtype = self.config, self.dtype
        width = 4 * c.block_out_channels[0]
        temb = TimestepEmbedding(width, dtype, name="time_embedding")(
            self.sinusoids(t, c.block_out_channels[0]), guidance
        )
        if c.class_embed_type is not None or c.num_class_embeds is not None:
            if class_labels is None:
                raise ValueError("this UNet has class embeddings: give class_labels [B].")
            temb = temb + self.embed_class(class_labels, width)
        if c.addition_embed_type == "text_time":
            if pooled is None or time_ids is None:
                raise ValueError("this UNet belongs to the SDXL family: give pooled [B, P] and time_ids [B, 6 or 5].")
            assert c.addition_time_embed_dim is not None
            ids = self.sinusoids(time_ids.reshape(-1), c.addition_time_embed_dim).reshape(time_ids.shape[0], -1)
            added = jnp.concatenate([pooled.astype(dtype), ids], -1)
            temb = temb + TimestepEmbedding(width, dtype, name="add_embedding")(added)
        elif c.addition_embed_type is not None:
            raise ConfigError(f"addition_embed_type {c.addition_embed_type!r} is unknown; known is 'text_time'.")
        return temb

    def embed_class(self, labels: Array, width: int) -> Array:
        kind, name = self.config.class_embed_type, "class_embedding"
        if kind is None:
            assert self.config.num_class_embeds is not None
            return nn.Embed(self.config.num_class_embeds, width, dtype=self.dtype, name=name)(labels)
        if kind == "identity":
            return labels.astype(self.dtype)
        if kind == "timestep":
            labels = self.sinusoids(labels, self.config.block_out_channels[0])
        elif kind == "simple_projection":
            return nn.Dense(width, dtype=self.dtype, name=name)(labels)
        elif kind != "projection":
            raise ConfigError(
                f"class_embed_type {kind!r} is unknown; known are null, 'timestep', 'identity', 'projection', "
                "'simple_projection'."
            )
        return TimestepEmbedding(width, self.dtype, name=name)(labels)


class UNet2DConditionModel(UNetEncoder):
    """Noised latents, timestep and text to the model output: noise, velocity or x0, by the prediction type."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        embeddings: Array,
        pooled: Array | None = None,
        time_ids: Array | None = None,
        attention_mask: Array | None = None,
        class_labels: Array | None = None,
        guidance: Array | None = None,
        residuals: Residuals | None = None,
    ) -> Array:
        """The model output.

        Args:
            x: noised latents [B, h, w, in_channels].
            t: timestep, scalar or [B]; may be fractional.
            embeddings: text [B, L, cross_attention_dim].
            pooled, time_ids: pooled text [B, P] and sizes and crops [B, 6], where `addition_embed_type` is "text_time".
            attention_mask: weight of each token of the text, [B, L] in [0, 1]; None: 1 for all.
            class_labels: [B], where the config has class embeddings (the x4 upscaler's noise level).
            guidance: guidance embedding [B, time_cond_proj_dim] of distilled models.
            residuals: of ControlNets, added to the skip connections and to the middle block's output.

        Returns:
            [B, h, w, out_channels] in the compute dtype.
        """
        c, dtype = self.config, self.dtype
        context, bias = embeddings.astype(dtype), score_bias(attention_mask)
        if c.center_input_sample:
            x = 2 * x - 1
        temb = self.embed(jnp.broadcast_to(t, x.shape[:1]), pooled, time_ids, class_labels, guidance)
        x = conv(c.block_out_channels[0], dtype, "conv_in")(x.astype(dtype))
        x, skips = self.down(x, temb, context, bias)
        if residuals is not None:
            down, mid = residuals
            skips = [skip + r.astype(dtype) for skip, r in zip(skips, down, strict=True)]
            x = x + mid.astype(dtype)
        levels = len(c.block_out_channels)
        layers = per_level(c.layers_per_block, levels)
        for i, kind in enumerate(c.up_block_types):
            level = levels - 1 - i
            block = UNetBlock(
                c, level, layers[level] + 1, attends(kind), True, level > 0, self.remat, dtype, name=f"up_blocks_{i}"
            )
            x = block(x, temb, context, bias, skips)
        x = nn.GroupNorm(c.norm_num_groups, epsilon=c.norm_eps, dtype=dtype, name="conv_norm_out")(x)
        return conv(c.out_channels, dtype, "conv_out", zero=True)(ACTIVATIONS[c.act_fn](x))
