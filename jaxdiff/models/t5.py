"""T5's encoder, version 1.1 (Raffel et al. 2020; Shazeer 2020), as in transformers' `T5EncoderModel`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdiff.config import T5Config
from jaxdiff.models.attention import split_heads
from jaxdiff.models.layers import rematerialised
from jaxdiff.typing import Array


def relative_buckets(length: int, buckets: int, longest: int) -> np.ndarray:
    """The bucket of each (query, key) pair, int [N, N]: half are for keys after the query; far ones are wider."""
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half = buckets // 2
    exact, steps = half // 2, np.abs(distance)
    # As in PyTorch: in float32, truncated.
    far_bucket = np.log(np.maximum(steps, 1).astype(np.float32) / exact) / math.log(longest / exact) * (half - exact)
    far_bucket = np.minimum(exact + far_bucket.astype(int), half - 1)
    return half * (distance > 0) + np.where(steps < exact, steps, far_bucket)


class T5Attention(nn.Module):
    """Attention without the 1 / sqrt(d) scale; `score_bias` [1, H, N, N] encodes relative positions."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, score_bias: Array | None) -> tuple[Array, Array]:
        """x [B, N, D] -> [B, N, D] and `score_bias`, which the first layer (given None) makes for all."""
        c, dtype = self.config, self.dtype

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=dtype, name=name)

        q, k, v = (split_heads(dense(c.num_heads * c.d_kv, name)(x), c.num_heads) for name in "qkv")
        if score_bias is None:
            table = nn.Embed(c.relative_attention_num_buckets, c.num_heads, name="relative_attention_bias")
            buckets = relative_buckets(x.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance)
            score_bias = table(buckets).transpose(2, 0, 1)[None]
        out = jax.nn.dot_product_attention(q, k, v, score_bias.astype(dtype), scale=1.0)
        return dense(c.d_model, "o")(out.reshape(*x.shape[:2], -1)), score_bias


class T5FeedForward(nn.Module):
    """gelu(x W0) * (x W1), then W2 (GEGLU)."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        gate = jax.nn.gelu(dense(self.config.d_ff, "wi_0")(x), approximate=True)
        return dense(self.config.d_model, "wo")(gate * dense(self.config.d_ff, "wi_1")(x))


class T5Layer(nn.Module):
    """Attention and feed-forward, each after an RMS norm and added to its input."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, score_bias: Array | None) -> tuple[Array, Array]:
        c, dtype = self.config, self.dtype

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(c.layer_norm_epsilon, dtype, name=name)

        attention = T5Attention(c, dtype, name="layer_0_SelfAttention")
        h, score_bias = attention(norm("layer_0_layer_norm")(x), score_bias)
        x = x + h
        return x + T5FeedForward(c, dtype, name="layer_1_DenseReluDense")(norm("layer_1_layer_norm")(x)), score_bias


class T5EncoderModel(nn.Module):
    """Token ids [B, N] to hidden states [B, N, D]; padding is attended to, as in the transformer families."""

    config: T5Config
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        c, dtype = self.config, self.dtype
        x = nn.Embed(c.vocab_size, c.d_model, dtype=dtype, name="shared")(tokens)
        layer, score_bias = rematerialised(T5Layer, self.remat), None
        for i in range(c.num_layers):
            x, score_bias = layer(c, dtype, name=f"encoder_block_{i}")(x, score_bias)
        return nn.RMSNorm(c.layer_norm_epsilon, dtype, name="encoder_final_layer_norm")(x)
