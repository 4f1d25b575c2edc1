"""FLUX.1's transformer (Black Forest Labs 2024), as in diffusers' `FluxTransformer2DModel`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdiff.config import FluxConfig
from jaxdiff.models.dit import (
    MLP,
    JointAttention,
    Modulation,
    Rope,
    VectorEmbedding,
    fold,
    grid_positions,
    modulate,
    rope,
    unfold,
)
from jaxdiff.models.layers import rematerialised
from jaxdiff.typing import Array

THETA = 10_000


class DoubleBlock(nn.Module):
    """Text and image with separate parameters and joint attention."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, text: Array, vector: Array, angles: Rope) -> tuple[Array, Array]:
        """x [B, N, D], text [B, L, D], vector [B, D] -> x and text."""
        width, dtype = x.shape[-1], self.dtype
        shift, scale, gate, *mlp = Modulation(6, width, dtype=dtype, name="norm1")(vector)
        text_shift, text_scale, text_gate, *text_mlp = Modulation(6, width, dtype=dtype, name="norm1_context")(vector)
        attended, text_attended = JointAttention(self.heads, width, dtype=dtype, name="attn")(
            modulate(x, shift, scale), modulate(text, text_shift, text_scale), angles
        )
        assert text_attended is not None
        x, text = x + gate * attended, text + text_gate * text_attended
        x = x + mlp[2] * MLP(dtype, name="ff")(modulate(x, *mlp[:2]))
        return x, text + text_mlp[2] * MLP(dtype, name="ff_context")(modulate(text, *text_mlp[:2]))


class SingleBlock(nn.Module):
    """Text and image as one sequence, attention and feed-forward side by side (Dehghani et al. 2023)."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, vector: Array, angles: Rope) -> Array:
        """x [B, L + N, D], vector [B, D] -> [B, L + N, D]."""
        width, dtype = x.shape[-1], self.dtype
        shift, scale, gate = Modulation(3, width, dtype=dtype, name="norm")(vector)
        h = modulate(x, shift, scale)
        hidden = jax.nn.gelu(nn.Dense(4 * width, dtype=dtype, name="proj_mlp")(h), approximate=True)
        attended, _ = JointAttention(self.heads, width, project=False, dtype=dtype, name="attn")(h, None, angles)
        return x + gate * nn.Dense(width, dtype=dtype, name="proj_out")(jnp.concatenate([attended, hidden], -1))


class FluxTransformer2DModel(nn.Module):
    """Latents and a prompt to the flow's velocity."""

    config: FluxConfig
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, t: Array, text: Array, pooled: Array, mask: None = None, guidance: Array | None = None
    ) -> Array:
        """x [B, h, w, C], t [B], T5's states text [B, L, D], CLIP's pooled [B, P], guidance [B] where it is embedded.

        Padding in the text is attended to: there is no mask.
        """
        c, dtype = self.config, self.dtype
        _, h, w, _ = x.shape
        image = np.concatenate([np.zeros((h * w // 4, 1), int), grid_positions(h, w)], -1)
        positions = np.concatenate([np.zeros((text.shape[1], 3), int), image])  # of the text: all zero
        angles = rope(positions, c.axes_dims_rope, THETA, max(h, w))
        vector = VectorEmbedding(c.width, c.guidance_embeds, dtype=dtype, name="time_text_embed")(t, pooled, guidance)
        image_tokens = nn.Dense(c.width, dtype=dtype, name="x_embedder")(fold(x, channels_first=True))
        tokens = nn.Dense(c.width, dtype=dtype, name="context_embedder")(text)
        double, single = (rematerialised(block, self.remat) for block in (DoubleBlock, SingleBlock))
        for i in range(c.num_layers):
            block = double(c.num_attention_heads, dtype, name=f"transformer_blocks_{i}")
            image_tokens, tokens = block(image_tokens, tokens, vector, angles)
        both = jnp.concatenate([tokens, image_tokens], 1)
        for i in range(c.num_single_layers):
            both = single(c.num_attention_heads, dtype, name=f"single_transformer_blocks_{i}")(both, vector, angles)
        scale, shift = Modulation(2, c.width, dtype=dtype, name="norm_out")(vector)
        out = modulate(both[:, tokens.shape[1] :], shift, scale)
        out = nn.Dense(c.out_channels or c.in_channels, dtype=dtype, name="proj_out")(out)
        return unfold(out, h, w, channels_first=True)
