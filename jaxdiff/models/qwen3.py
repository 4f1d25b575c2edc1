"""Qwen3's decoder as a text encoder (Qwen Team 2025), as in transformers' `Qwen3Model`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdiff.config import Qwen3Config
from jaxdiff.models.attention import split_heads
from jaxdiff.models.layers import rematerialised
from jaxdiff.typing import Array


def rotate_halves(x: Array, theta: float) -> Array:
    """Rotary embedding of heads [B, N, H, d] by position: feature i pairs with i + d/2 (Su et al. 2021)."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), theta ** (-np.arange(half) / half))
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[None, :, None] for f in (np.cos, np.sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Qwen3Layer(nn.Module):
    """Causal grouped-query attention, and a feed-forward gated by SiLU."""

    config: Qwen3Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, score_bias: Array) -> Array:
        """x [B, N, D]; score_bias [B, 1, 1, N] hides padding."""
        c, dtype = self.config, self.dtype

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=c.attention_bias and "attn" in name, dtype=dtype, name=name)

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(c.rms_norm_eps, dtype, name=name)

        h = norm("input_layernorm")(x)
        heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        q, k, v = (split_heads(dense(n * c.head_dim, f"self_attn_{name}_proj")(h), n) for name, n in heads.items())
        q, k = (rotate_halves(norm(f"self_attn_{name}_norm")(z), c.rope_theta) for name, z in (("q", q), ("k", k)))
        h = jax.nn.dot_product_attention(q, k, v, score_bias.astype(dtype), is_causal=True)
        x = x + dense(c.hidden_size, "self_attn_o_proj")(h.reshape(*x.shape[:2], -1))
        h = norm("post_attention_layernorm")(x)
        h = jax.nn.silu(dense(c.intermediate_size, "mlp_gate_proj")(h)) * dense(c.intermediate_size, "mlp_up_proj")(h)
        return x + dense(c.hidden_size, "mlp_down_proj")(h)


class Qwen3Model(nn.Module):
    """Token ids [B, N] to the hidden states of all layers."""

    config: Qwen3Config
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, mask: Array | None = None, layers: tuple[int, ...] = ()) -> tuple[Array, ...]:
        """tokens [B, N]; mask [B, N]: 0 for padding, which no token sees.

        Returns:
            [B, N, D] for each of `layers`, before the final norm: 0 is the embedding, i the output of block i. Later
            blocks are not computed. Without `layers`, one state: the last after the final norm.
        """
        c, dtype = self.config, self.dtype
        score_bias = jnp.zeros(tokens.shape) if mask is None else jnp.where(mask > 0, 0.0, jnp.finfo(jnp.float32).min)
        states = [nn.Embed(c.vocab_size, c.hidden_size, dtype=dtype, name="embed_tokens")(tokens)]
        layer = rematerialised(Qwen3Layer, self.remat)
        depth = c.num_hidden_layers if not layers or self.is_initializing() else max(layers)
        for i in range(depth):
            states.append(layer(c, dtype, name=f"layers_{i}")(states[-1], score_bias[:, None, None]))
        norm = nn.RMSNorm(c.rms_norm_eps, dtype, name="norm")
        if layers and not self.is_initializing():
            return tuple(states[i] for i in layers)
        return (norm(states[-1]),)
