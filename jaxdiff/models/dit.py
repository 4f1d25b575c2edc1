"""Shared by the transformer families: patches, rotary positions, modulation, and attention over text and image.

Modules are named as in diffusers, so that `jaxdiff.io.torch_names` maps their parameters. A transformer of any family
takes latents x [B, h, w, C] and times t [B] in training steps, 0 to 1000, and returns the flow's velocity [B, h, w, C].
Folding into patches happens inside.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdiff.models.attention import attention, split_heads
from jaxdiff.models.layers import TimestepEmbedding, timestep_embedding
from jaxdiff.typing import Array

ZEROS = nn.initializers.zeros
PATCH = 2  # latents to a patch along one side


# --- patches


def fold(x: Array, *, channels_first: bool) -> Array:
    """Latents [B, h, w, C] -> patches [B, h/2 * w/2, 4 C], each by (channel, row, column) or (row, column, channel).

    Raises:
        ValueError: h or w is odd.
    """
    b, h, w, c = x.shape
    if h % PATCH or w % PATCH:
        raise ValueError(f"latents of {h} x {w} cannot be folded into patches of {PATCH} x {PATCH}.")
    x = x.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)
    x = x.transpose((0, 1, 3, 5, 2, 4) if channels_first else (0, 1, 3, 2, 4, 5))
    return x.reshape(b, h // PATCH * (w // PATCH), PATCH**2 * c)


def unfold(x: Array, h: int, w: int, *, channels_first: bool) -> Array:
    """The reverse of `fold`: patches [B, h/2 * w/2, 4 C] -> latents [B, h, w, C]."""
    b, c = len(x), x.shape[-1] // PATCH**2
    rows = (b, h // PATCH, w // PATCH)
    if channels_first:
        x = x.reshape(*rows, c, PATCH, PATCH).transpose(0, 1, 4, 2, 5, 3)
    else:
        x = x.reshape(*rows, PATCH, PATCH, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h, w, c)


# --- rotary positions (Su et al. 2021, equation 34)


class Rope(NamedTuple):
    """Cosine and sine of each position's angles: [N, d/2], or [B, N, d/2] where they differ by example."""

    cos: Array
    sin: Array


def rope(positions: Any, widths: Sequence[int], theta: float, length: int) -> Rope:
    """The angles of positions along several axes, side by side.

    Args:
        positions: whole numbers [..., A] from 0 to `length` - 1, NumPy or traced.
        widths: of each axis, in features; their sum is a head's width d.
        theta: base of the frequencies theta ** (-2 i / width).
    """
    cos, sin = [], []
    for axis, width in enumerate(widths):
        angles = np.outer(np.arange(length), theta ** (-np.arange(0, width, 2) / width))  # in float64
        cos.append(jnp.asarray(np.cos(angles), jnp.float32)[positions[..., axis]])
        sin.append(jnp.asarray(np.sin(angles), jnp.float32)[positions[..., axis]])
    return Rope(jnp.concatenate(cos, -1), jnp.concatenate(sin, -1))


def rotate(x: Array, angles: Rope) -> Array:
    """Heads [B, N, H, d] rotated by the angles of their positions, in pairs of adjacent features."""
    cos, sin = angles.cos[..., None, :], angles.sin[..., None, :]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape).astype(x.dtype)


def grid_positions(h: int, w: int) -> np.ndarray:
    """Row and column of each patch of latents h x w: [N, 2]."""
    return np.stack(np.meshgrid(np.arange(h // PATCH), np.arange(w // PATCH), indexing="ij"), -1).reshape(-1, 2)


# --- modulation (Peebles & Xie 2023, adaLN-Zero)


def layer_norm(x: Array) -> Array:
    """Each token with mean 0 and variance 1; statistics in float32."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Normed tokens [B, N, D] scaled and shifted by vectors [B, 1, D]."""
    return layer_norm(x) * (1 + scale) + shift


class Modulation(nn.Module):
    """`parts` vectors [B, 1, D] from the conditioning vector [B, D']; zero at first: a new block is the identity."""

    parts: int
    width: int
    bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, vector: Array) -> Sequence[Array]:
        dense = nn.Dense(
            self.parts * self.width, use_bias=self.bias, dtype=self.dtype, name="linear", kernel_init=ZEROS
        )
        return jnp.split(dense(jax.nn.silu(vector))[:, None], self.parts, -1)


class VectorEmbedding(nn.Module):
    """The conditioning vector [B, D]: embeddings of the time, of guidance and of the pooled text, added."""

    width: int
    guidance: bool = False
    bias: bool = True
    frequencies: int = 256
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t: Array, pooled: Array | None = None, guidance: Array | None = None) -> Array:
        def embedding(name: str) -> TimestepEmbedding:
            return TimestepEmbedding(self.width, self.dtype, self.bias, name=name)

        vector = embedding("timestep_embedder")(timestep_embedding(t, self.frequencies))
        if self.guidance:
            assert guidance is not None
            vector = vector + embedding("guidance_embedder")(timestep_embedding(1000 * guidance, self.frequencies))
        return vector if pooled is None else vector + embedding("text_embedder")(pooled)


# --- attention and feed-forward


class JointAttention(nn.Module):
    """Self-attention of image tokens, or joint attention of text and image (Esser et al. 2024, figure 2)."""

    heads: int
    width: int  # of all heads
    qk_norm: bool = True  # RMS norms of queries and keys, by head
    bias: bool = True
    project: bool = True  # whether the image's output is projected
    text_output: bool = True  # whether there is an output for the text
    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, text: Array | None = None, angles: Rope | None = None, score_bias: Array | None = None
    ) -> tuple[Array, Array | None]:
        """x [B, N, D], text [B, L, D] or None; `angles` and `score_bias` [B, L + N] hold the text first.

        Returns:
            [B, N, D] for the image, and [B, L, D] for the text or None.
        """

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=self.bias, dtype=self.dtype, name=name)

        def projected(source: Array, names: Sequence[str], norms: Sequence[str]) -> list[Array]:
            q, k, v = (split_heads(dense(self.width, name)(source), self.heads) for name in names)
            if self.qk_norm:
                q, k = (nn.RMSNorm(self.eps, self.dtype, name=n)(z) for n, z in zip(norms, (q, k), strict=True))
            return [q, k, v]

        q, k, v = projected(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if text is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            both = zip(projected(text, names, ("norm_added_q", "norm_added_k")), (q, k, v), strict=True)
            q, k, v = (jnp.concatenate(pair, 1) for pair in both)
        out = attend(q, k, v, angles, score_bias)
        text_out, out = (None, out) if text is None else (out[:, : text.shape[1]], out[:, text.shape[1] :])
        out = dense(x.shape[-1], "to_out_0")(out) if self.project else out
        return out, dense(x.shape[-1], "to_add_out")(text_out) if text_out is not None and self.text_output else None


def attend(q: Array, k: Array, v: Array, angles: Rope | None = None, score_bias: Array | None = None) -> Array:
    """Attention of heads [B, N, H, d] with rotary positions: [B, N, H d]."""
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    heads = q.shape[2]
    q, k, v = (z.reshape(*z.shape[:2], -1) for z in (q, k, v))
    return attention(q, k, v, heads, bias=score_bias)


class MLP(nn.Module):
    """Two dense layers with four times the width between them and the tanh approximation of GELU."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = nn.Dense(4 * x.shape[-1], dtype=self.dtype, name="net_0_proj")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(jax.nn.gelu(hidden, approximate=True))


def swiglu(x: Array) -> Array:
    """SiLU of the first half of the features times the second half (Shazeer 2020)."""
    gate, value = jnp.split(x, 2, -1)
    return jax.nn.silu(gate) * value
