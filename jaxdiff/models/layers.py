"""Layers shared by the UNet and the autoencoder. Submodules are named as in the PyTorch checkpoints."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdiff.config import ConfigError
from jaxdiff.models.attention import attention
from jaxdiff.models.convolution import convolve
from jaxdiff.typing import Array

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


# What a layer keeps for the backward pass: nothing ("full"), the results of matrix products and convolutions ("dots"),
# or only of products without batch dimensions, which excludes attention's ("dots_no_batch").
REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(cls: Any, remat: bool | str) -> Any:
    """The class of a layer that recomputes its activations in the backward pass (gradient checkpointing).

    Args:
        remat: a name of `REMAT_POLICIES`; True is "full" (Chen et al. 2016); False or "" keeps all activations.

    Raises:
        ConfigError: an unknown policy.
    """
    if not remat:
        return cls
    name = "full" if remat is True else remat
    if name not in REMAT_POLICIES:
        raise ConfigError(f"remat {name!r} is unknown; known are {', '.join(REMAT_POLICIES)}.")
    return nn.remat(cls, policy=REMAT_POLICIES[name])


def sinusoid_frequencies(half: int, freq_shift: float = 0) -> Array:
    """Frequencies of the timestep embedding, in radians a step: [half] float32, from 1 down to about 1 / 10000."""
    return jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))


def timestep_embedding(t: Array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Array:
    """Sinusoids of t at `dim / 2` frequencies from 1 down to 1/10000 (Vaswani et al. 2017, section 3.5).

    Args:
        t: times [B], in units of training steps; may be fractional.
        dim: even width of the embedding.
        flip_sin_to_cos: cosines first.
        freq_shift: subtracted from the number of frequencies in the exponent's denominator.

    Returns:
        [B, dim] float32.
    """
    half = dim // 2
    angles = jnp.asarray(t, jnp.float32)[:, None] * sinusoid_frequencies(half, freq_shift)[None]
    pair = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(pair, -1)


def conv(features: int, dtype, name: str, *, size: int = 3, strides: int = 1, padding: int = 1, zero: bool = False):
    """A square convolution with symmetric padding; `zero` starts its kernel at zero, so it adds nothing at first."""
    init = nn.initializers.zeros if zero else nn.linear.default_kernel_init
    pads = [(padding, padding)] * 2
    shape = (size, size)
    return nn.Conv(
        features, shape, strides, pads, dtype=dtype, kernel_init=init, conv_general_dilated=convolve, name=name
    )


class TimestepEmbedding(nn.Module):
    """Two dense layers on sinusoids; `cond` [B, D], the guidance of distilled models, is added to them first."""

    features: int
    dtype: jnp.dtype = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array, cond: Array | None = None) -> Array:
        if cond is not None:
            x = x + nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")(cond)
        x = nn.Dense(self.features, use_bias=self.bias, dtype=self.dtype, name="linear_1")(x)
        return nn.Dense(self.features, use_bias=self.bias, dtype=self.dtype, name="linear_2")(jax.nn.silu(x))


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions with a skip (He et al. 2016), shifted by the time embedding between them."""

    features: int
    groups: int = 32
    eps: float = 1e-5
    act: str = "silu"
    zero_init: bool = False  # start as the identity, as the UNet of Ho et al. 2020 does
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        """x [B, H, W, C], temb [B, D] or None -> [B, H, W, features]."""
        act = ACTIVATIONS[self.act]

        def norm(name):
            return nn.GroupNorm(self.groups, epsilon=self.eps, dtype=self.dtype, name=name)

        h = conv(self.features, self.dtype, "conv1")(act(norm("norm1")(x)))
        if temb is not None:
            h = h + nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(act(temb))[:, None, None]
        h = conv(self.features, self.dtype, "conv2", zero=self.zero_init)(act(norm("norm2")(h)))
        if x.shape[-1] != self.features:
            x = conv(self.features, self.dtype, "conv_shortcut", size=1, padding=0)(x)
        return x + h


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2; `asymmetric` pads right and bottom only, as the autoencoder does."""

    features: int
    asymmetric: bool = False
    padding: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.asymmetric:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return conv(self.features, self.dtype, "conv", strides=2, padding=0 if self.asymmetric else self.padding)(x)


class Upsample(nn.Module):
    """Each pixel doubled along both sides, then a 3x3 convolution."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, height: int | None = None, width: int | None = None) -> Array:
        """x [B, H, W, C] -> [B, 2H, 2W, features], cropped to `height` and `width`: those of the skip may be odd."""
        x = x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
        return conv(self.features, self.dtype, "conv")(x)


class Attention(nn.Module):
    """Multi-head attention of x [B, N, D] to a context [B, M, D'], or to itself."""

    heads: int
    bias: bool = False  # of the query, key and value projections
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, context: Array | None = None, score_bias: Array | None = None, *, identity: bool = False
    ) -> Array:
        """`score_bias` [B, M] float32 is added to the scores of the M keys.

        With `identity`, each position attends to itself alone, see `perturbed_attention`.
        """
        context = x if context is None else context
        width = x.shape[-1]

        def projected(name: str, source: Array) -> Array:
            return nn.Dense(width, use_bias=self.bias, dtype=self.dtype, name=name)(source)

        if identity:
            h = projected("to_v", x)
        else:
            q, k, v = projected("to_q", x), projected("to_k", context), projected("to_v", context)
            h = attention(q, k, v, self.heads, bias=score_bias)
        return nn.Dense(width, dtype=self.dtype, name="to_out_0")(h)


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020): value * gelu(gate), with a hidden width of 4 D."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        value, gate = jnp.split(nn.Dense(8 * width, dtype=self.dtype, name="net_0_proj")(x), 2, -1)
        return nn.Dense(width, dtype=self.dtype, name="net_2")(value * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after a layer norm and added to its input."""

    heads: int
    only_cross_attention: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array, bias: Array | None = None) -> Array:
        def norm(name):
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        first = (context, bias) if self.only_cross_attention else ()
        x = x + Attention(self.heads, dtype=self.dtype, name="attn1")(norm("norm1")(x), *first)
        x = x + Attention(self.heads, dtype=self.dtype, name="attn2")(norm("norm2")(x), context, bias)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class Transformer2D(nn.Module):
    """The positions of an image as tokens through `layers` transformer blocks (Rombach et al. 2022, appendix E.2.1)."""

    heads: int
    layers: int = 1
    groups: int = 32
    linear: bool = False  # dense projections instead of 1x1 convolutions
    only_cross_attention: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array, bias: Array | None = None) -> Array:
        """x [B, H, W, C], context [B, L, D], bias [B, L] of the scores of its tokens or None -> [B, H, W, C]."""
        b, h, w, c = x.shape
        zeros = nn.initializers.zeros

        def proj(name, **kwargs):
            if self.linear:
                return nn.Dense(c, dtype=self.dtype, name=name, **kwargs)
            return nn.Conv(c, (1, 1), dtype=self.dtype, name=name, **kwargs)

        tokens = proj("proj_in")(nn.GroupNorm(self.groups, epsilon=1e-6, dtype=self.dtype, name="norm")(x))
        tokens = tokens.reshape(b, h * w, c)
        for i in range(self.layers):
            block = TransformerBlock(
                self.heads, self.only_cross_attention, dtype=self.dtype, name=f"transformer_blocks_{i}"
            )
            tokens = block(tokens, context, bias)
        return x + proj("proj_out", kernel_init=zeros)(tokens.reshape(b, h, w, c))
