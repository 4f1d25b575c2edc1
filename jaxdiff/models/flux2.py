"""FLUX.2's transformer (Black Forest Labs 2025), as in diffusers' `Flux2Transformer2DModel`."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdiff.config import Flux2Config
from jaxdiff.models.attention import split_heads
from jaxdiff.models.dit import (
    JointAttention,
    Modulation,
    Rope,
    VectorEmbedding,
    attend,
    fold,
    grid_positions,
    modulate,
    rope,
    swiglu,
    unfold,
)
from jaxdiff.models.layers import rematerialised
from jaxdiff.typing import Array


class SwiGLU(nn.Module):
    """A feed-forward gated by SiLU, without biases."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = swiglu(nn.Dense(2 * self.hidden, use_bias=False, dtype=self.dtype, name="linear_in")(x))
        return nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="linear_out")(h)


class DoubleBlock(nn.Module):
    """Text and image with separate parameters and joint attention; the modulation is shared by all blocks."""

    config: Flux2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, text: Array, image_mod: Sequence[Array], text_mod: Sequence[Array], angles: Rope
    ) -> tuple[Array, Array]:
        """x [B, N, D], text [B, L, D], six vectors [B, 1, D] each -> x and text."""
        c, dtype = self.config, self.dtype
        attn = JointAttention(c.num_attention_heads, c.width, bias=False, dtype=dtype, name="attn")
        attended, text_attended = attn(modulate(x, *image_mod[:2]), modulate(text, *text_mod[:2]), angles)
        assert text_attended is not None
        x, text = x + image_mod[2] * attended, text + text_mod[2] * text_attended
        ff, ff_context = (SwiGLU(c.hidden, dtype, name=name) for name in ("ff", "ff_context"))
        x = x + image_mod[5] * ff(modulate(x, *image_mod[3:5]))
        return x, text + text_mod[5] * ff_context(modulate(text, *text_mod[3:5]))


class FusedAttention(nn.Module):
    """Parallel attention and feed-forward, with one dense layer in and one out."""

    config: Flux2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, angles: Rope) -> Array:
        c, dtype = self.config, self.dtype
        h = nn.Dense(3 * c.width + 2 * c.hidden, use_bias=False, dtype=dtype, name="to_qkv_mlp_proj")(x)
        q, k, v = (split_heads(z, c.num_attention_heads) for z in jnp.split(h[..., : 3 * c.width], 3, -1))
        q, k = (nn.RMSNorm(1e-6, dtype, name=name)(z) for name, z in (("norm_q", q), ("norm_k", k)))
        both = jnp.concatenate([attend(q, k, v, angles), swiglu(h[..., 3 * c.width :])], -1)
        return nn.Dense(c.width, use_bias=False, dtype=dtype, name="to_out")(both)


class SingleBlock(nn.Module):
    """Text and image as one sequence [B, L + N, D]."""

    config: Flux2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, vectors: Sequence[Array], angles: Rope) -> Array:
        shift, scale, gate = vectors
        return x + gate * FusedAttention(self.config, self.dtype, name="attn")(modulate(x, shift, scale), angles)


class Flux2Transformer2DModel(nn.Module):
    """Latents and a prompt to the flow's velocity."""

    config: Flux2Config
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, t: Array, text: Array, pooled: None = None, mask: None = None, guidance: Array | None = None
    ) -> Array:
        """x [B, h, w, C], t [B], text [B, L, D], guidance [B] where it is embedded.

        Padding in the text is attended to: there is no mask.
        """
        c, dtype = self.config, self.dtype
        _, h, w, _ = x.shape
        # Four axes: (0, 0, 0, n) for text, (0, row, column, 0) for images.
        image_positions = np.pad(grid_positions(h, w), ((0, 0), (1, 1)))
        text_positions = np.pad(np.arange(text.shape[1])[:, None], ((0, 0), (3, 0)))
        positions = np.concatenate([text_positions, image_positions])
        angles = rope(positions, c.axes_dims_rope, c.rope_theta, max(h, w, len(text_positions)))

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=dtype, name=name)

        embedding = VectorEmbedding(
            c.width, c.guidance_embeds, False, c.timestep_guidance_channels, dtype, name="time_guidance_embed"
        )
        vector = embedding(t, None, guidance)
        kinds = {"double_stream_modulation_img": 6, "double_stream_modulation_txt": 6, "single_stream_modulation": 3}
        image_mod, text_mod, single_mod = (
            Modulation(parts, c.width, False, dtype, name=name)(vector) for name, parts in kinds.items()
        )
        tokens = dense(c.width, "context_embedder")(text)
        image_tokens = dense(c.width, "x_embedder")(fold(x, channels_first=True))
        double, single = (rematerialised(block, self.remat) for block in (DoubleBlock, SingleBlock))
        for i in range(c.num_layers):
            block = double(c, dtype, name=f"transformer_blocks_{i}")
            image_tokens, tokens = block(image_tokens, tokens, image_mod, text_mod, angles)
        both = jnp.concatenate([tokens, image_tokens], 1)
        for i in range(c.num_single_layers):
            both = single(c, dtype, name=f"single_transformer_blocks_{i}")(both, single_mod, angles)
        scale, shift = Modulation(2, c.width, False, dtype, name="norm_out")(vector)
        out = dense(c.out_channels or c.in_channels, "proj_out")(modulate(both[:, tokens.shape[1] :], shift, scale))
        return unfold(out, h, w, channels_first=True)
