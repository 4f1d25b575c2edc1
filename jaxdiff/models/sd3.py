"""Stable Diffusion 3's transformer (Esser et al. 2024, section 4), as in diffusers' `SD3Transformer2DModel`."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdiff.config import SD3Config
from jaxdiff.models.dit import MLP, PATCH, ZEROS, JointAttention, Modulation, VectorEmbedding, modulate, unfold
from jaxdiff.models.layers import rematerialised
from jaxdiff.typing import Array, Key


def position_table(base: int, key: Key, size: int, width: int) -> Array:
    """Sines and cosines of column and row, each with a quarter of the features: [1, size * size, width].

    Args:
        base: patches along a side of the images trained on, the unit of positions.
        size: patches along a side of the table.
        width: features, a multiple of 4.
    """
    frequencies = 10_000.0 ** (-jnp.arange(width // 4) / (width // 4))
    angles = (jnp.arange(size) * base / size)[:, None] * frequencies
    sinusoids = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)  # [size, width / 2]
    rows, columns = (jnp.broadcast_to(x, (size, size, width // 2)) for x in (sinusoids[:, None], sinusoids[None]))
    return jnp.concatenate([columns, rows], -1).reshape(1, size**2, width)


class PatchEmbedding(nn.Module):
    """Latents [B, h, w, C] to tokens [B, N, D], plus the centre of a table of position embeddings."""

    config: SD3Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, table_size = self.config, self.config.pos_embed_max_size
        h, w = (side // PATCH for side in x.shape[1:3])
        if max(h, w) > table_size:
            raise ValueError(
                f"latents of {x.shape[1]} x {x.shape[2]} are larger than {PATCH * table_size}, the maximum of this "
                "model."
            )
        table = self.param("pos_embed", functools.partial(position_table, c.sample_size // PATCH), table_size, c.width)
        table = jax.lax.stop_gradient(table).reshape(table_size, table_size, -1)  # not trained
        top, left = (table_size - h) // 2, (table_size - w) // 2
        patch = (PATCH, PATCH)
        tokens = nn.Conv(c.width, patch, patch, "VALID", dtype=self.dtype, name="proj")(x).reshape(len(x), h * w, -1)
        return tokens + table[top : top + h, left : left + w].reshape(1, h * w, -1).astype(self.dtype)


class JointBlock(nn.Module):
    """Text and image with separate parameters and joint attention."""

    config: SD3Config
    dual: bool  # whether the image has a second attention, over itself alone
    last: bool  # whether this is the last block, which leaves the text unchanged
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, text: Array, vector: Array) -> tuple[Array, Array]:
        """x [B, N, D], text [B, L, D], vector [B, D] -> x and text."""
        c, dtype, normed = self.config, self.dtype, self.config.qk_norm == "rms_norm"
        shift, scale, gate, *others = Modulation(9 if self.dual else 6, c.width, dtype=dtype, name="norm1")(vector)
        mlp_mod, dual_mod = others[:3], others[3:]
        text_mod = Modulation(2 if self.last else 6, c.width, dtype=dtype, name="norm1_context")(vector)
        text_in = modulate(text, *(text_mod[::-1] if self.last else text_mod[:2]))  # the last one's scale comes first
        attn = JointAttention(
            c.num_attention_heads, c.width, normed, text_output=not self.last, dtype=dtype, name="attn"
        )
        attended, text_attended = attn(modulate(x, shift, scale), text_in)
        x_in, x = x, x + gate * attended  # both attentions start from the same input
        if self.dual:
            self_attn = JointAttention(c.num_attention_heads, c.width, normed, dtype=dtype, name="attn2")
            x = x + dual_mod[2] * self_attn(modulate(x_in, *dual_mod[:2]))[0]
        x = x + mlp_mod[2] * MLP(dtype, name="ff")(modulate(x, *mlp_mod[:2]))
        if text_attended is None:  # the last block
            return x, text
        text = text + text_mod[2] * text_attended
        return x, text + text_mod[5] * MLP(dtype, name="ff_context")(modulate(text, *text_mod[3:5]))


class SD3Transformer2DModel(nn.Module):
    """Latents and a prompt to the flow's velocity."""

    config: SD3Config
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, t: Array, text: Array, pooled: Array, mask: None = None, guidance: None = None
    ) -> Array:
        """x [B, h, w, C], t [B], text [B, L, D] of all encoders, pooled [B, P] of both CLIPs."""
        c, dtype = self.config, self.dtype
        tokens = PatchEmbedding(c, dtype, name="pos_embed")(x)
        vector = VectorEmbedding(c.width, dtype=dtype, name="time_text_embed")(t, pooled)
        text = nn.Dense(c.caption_projection_dim, dtype=dtype, name="context_embedder")(text)
        block = rematerialised(JointBlock, self.remat)
        for i in range(c.num_layers):
            dual, last = i in c.dual_attention_layers, i == c.num_layers - 1
            tokens, text = block(c, dual, last, dtype, name=f"transformer_blocks_{i}")(tokens, text, vector)
        scale, shift = Modulation(2, c.width, dtype=dtype, name="norm_out")(vector)
        project = nn.Dense(PATCH**2 * c.out_channels, dtype=dtype, name="proj_out", kernel_init=ZEROS)
        out = project(modulate(tokens, shift, scale))
        return unfold(out, *x.shape[1:3], channels_first=False)
