"""Z-Image's transformer (Z-Image Team 2025), as in diffusers' `ZImageTransformer2DModel`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdiff.config import ZImageConfig
from jaxdiff.models.dit import JointAttention, Rope, fold, grid_positions, layer_norm, rope, unfold
from jaxdiff.models.layers import rematerialised, timestep_embedding
from jaxdiff.typing import Array

MULTIPLE = 32  # texts and images are padded to a multiple of this with a learned token
VECTOR = 256  # width of the conditioning vector, at most


class SwiGLU(nn.Module):
    """A feed-forward gated by SiLU, without biases."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        hidden = int(width / 3 * 8)
        return dense(width, "w2")(jax.nn.silu(dense(hidden, "w1")(x)) * dense(hidden, "w3")(x))


class Block(nn.Module):
    """Attention and feed-forward, each between two RMS norms; scaled and gated by the vector where there is one."""

    config: ZImageConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, angles: Rope, score_bias: Array | None, vector: Array | None = None) -> Array:
        """x [B, N, D], score_bias [B, N] of the keys, vector [B, 256] -> [B, N, D]."""
        c, dtype = self.config, self.dtype

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(c.norm_eps, dtype, name=name)

        scale, gate, mlp_scale, mlp_gate = (jnp.asarray(value, dtype) for value in (0, 1, 0, 1))
        if vector is not None:
            parts = nn.Dense(4 * c.dim, dtype=dtype, name="adaLN_modulation_0")(vector)[:, None]
            scale, gate, mlp_scale, mlp_gate = jnp.split(parts, 4, -1)
            gate, mlp_gate = jnp.tanh(gate), jnp.tanh(mlp_gate)
        attn = JointAttention(c.n_heads, c.dim, c.qk_norm, False, eps=1e-5, dtype=dtype, name="attention")
        attended, _ = attn(norm("attention_norm1")(x) * (1 + scale), None, angles, score_bias)
        x = x + gate * norm("attention_norm2")(attended)
        hidden = SwiGLU(dtype, name="feed_forward")(norm("ffn_norm1")(x) * (1 + mlp_scale))
        return x + mlp_gate * norm("ffn_norm2")(hidden)


class TimeEmbedding(nn.Module):
    """Times [B] to the conditioning vector [B, D]."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t: Array) -> Array:
        h = nn.Dense(1024, dtype=self.dtype, name="mlp_0")(timestep_embedding(t, 256))
        return nn.Dense(self.features, dtype=self.dtype, name="mlp_2")(jax.nn.silu(h))


class FinalLayer(nn.Module):
    """Tokens [B, N, D] to patches [B, N, 4 C]."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, vector: Array) -> Array:
        scale = nn.Dense(x.shape[-1], dtype=self.dtype, name="adaLN_modulation_1")(jax.nn.silu(vector))[:, None]
        return nn.Dense(self.features, dtype=self.dtype, name="linear")(layer_norm(x) * (1 + scale))


class ZImageTransformer2DModel(nn.Module):
    """Latents and a prompt to the flow's velocity."""

    config: ZImageConfig
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, t: Array, text: Array, pooled: None = None, mask: Array | None = None, guidance: None = None
    ) -> Array:
        """x [B, h, w, C], t [B], text [B, L, D], mask [B, L]: 1 for the prompt's tokens, which precede padding.

        Prompts and images are padded to a multiple of 32 with learned tokens, which are attended to; padding beyond
        that is masked.
        """
        c, dtype = self.config, self.dtype
        b, h, w, _ = x.shape
        block = rematerialised(Block, self.remat)
        # The network's time runs from noise to image.
        vector = TimeEmbedding(min(c.dim, VECTOR), dtype, name="t_embedder")((1000 - t) * (c.t_scale / 1000))

        real = jnp.ones(text.shape[:2], bool) if mask is None else mask > 0
        text, real = (jnp.pad(z, ((0, 0), (0, -text.shape[1] % MULTIPLE), (0, 0))[: z.ndim]) for z in (text, real))
        padded_length = -(-real.sum(1, keepdims=True) // MULTIPLE) * MULTIPLE  # [B, 1], of each prompt
        order = jnp.arange(text.shape[1])[None]
        is_visible = order < padded_length  # [B, L]
        text_positions = jnp.pad((order + 1)[..., None], ((0, 0), (0, 0), (0, 2)))
        text_angles = rope(text_positions, c.axes_dims, c.rope_theta, c.axes_lens[0])

        count = h * w // 4
        padding = -count % MULTIPLE
        grid = np.pad(grid_positions(h, w), ((0, padding), (0, 0)))
        axis0 = jnp.where(jnp.arange(count + padding)[None] < count, padded_length + 1, 0)
        positions = jnp.concatenate([axis0[..., None], jnp.broadcast_to(grid, (b, *grid.shape))], -1)
        angles = rope(positions, c.axes_dims, c.rope_theta, max(c.axes_lens))

        def pad_token(name: str) -> Array:
            return self.param(name, nn.initializers.zeros, (1, c.dim)).astype(dtype)

        tokens = nn.Dense(c.dim, dtype=dtype, name="x_embedder_2_1")(fold(x, channels_first=False))
        pad_tokens = jnp.broadcast_to(pad_token("x_pad_token")[None], (b, padding, c.dim))
        tokens = jnp.concatenate([tokens, pad_tokens], 1)
        for i in range(c.n_refiner_layers):
            tokens = block(c, dtype, name=f"noise_refiner_{i}")(tokens, angles, None, vector)

        text = nn.RMSNorm(c.norm_eps, dtype, name="cap_embedder_0")(text)
        text = nn.Dense(c.dim, dtype=dtype, name="cap_embedder_1")(text)
        text = jnp.where(real[..., None], text, pad_token("cap_pad_token"))
        score_bias = jnp.where(is_visible, 0.0, -jnp.inf)
        for i in range(c.n_refiner_layers):
            text = block(c, dtype, name=f"context_refiner_{i}")(text, text_angles, score_bias)

        both = jnp.concatenate([tokens, text], 1)
        cos, sin = (
            jnp.concatenate([a, jnp.broadcast_to(z, (b, *z.shape[1:]))], 1)
            for a, z in zip(angles, text_angles, strict=True)
        )
        score_bias = jnp.pad(score_bias, ((0, 0), (tokens.shape[1], 0)))
        for i in range(c.n_layers):
            both = block(c, dtype, name=f"layers_{i}")(both, Rope(cos, sin), score_bias, vector)
        out = FinalLayer(4 * c.in_channels, dtype, name="final_layer_2_1")(both[:, :count], vector)
        return -unfold(out, h, w, channels_first=False)
