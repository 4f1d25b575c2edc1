"""Scaled dot-product attention (Vaswani et al. 2017, equation 1) in a form that suits each platform.

What is in memory of the scores, B * H * N * M float32 numbers, is bounded everywhere: on a CPU to CHUNK queries of one
head, elsewhere and on the devices of a mesh to SCORES bytes a device. Gradients keep to the same bounds.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.typing import Array

# From this many queries on, the scores of one head no longer fit the cache of a CPU and are made a chunk at a time.
CHUNK_FROM = 1024
CHUNK = 512
SCORES = 2**30  # bytes; where all take more, queries go in chunks


def split_heads(x: Array, heads: int) -> Array:
    """[B, N, heads * d] -> [B, N, heads, d]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def attention(q: Array, k: Array, v: Array, heads: int, *, causal: bool = False, bias: Array | None = None) -> Array:
    """softmax(q kᵀ / sqrt(d) + bias) v for `heads` heads; softmax in float32.

    Args:
        q: queries [B, N, heads * d].
        k, v: keys and values [B, M, heads * d].
        heads: number of heads, a divisor of the width.
        causal: whether query i sees keys 0..i only (then N = M).
        bias: of the scores of each key, [B, M] float32; -inf hides a key.

    Returns:
        [B, N, heads * d] in the type of q.
    """
    shape = q.shape
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    fused = functools.partial(_float16 if q.dtype == jnp.float16 else _fused, causal=causal)
    bounded = functools.partial(_bounded, fused=fused)
    if causal:  # texts are short
        out = fused(q, k, v, bias)
    # One head after the other would bring all heads and examples together on each device, were they divided by a mesh.
    elif shape[1] < CHUNK_FROM or jax.sharding.get_abstract_mesh().auto_axes:
        out = bounded(q, k, v, bias)
    else:
        out = jax.lax.platform_dependent(q, k, v, bias, cpu=_chunked, default=bounded)
    return out.reshape(shape)


def _bounded(
    q: Array, k: Array, v: Array, bias: Array | None, fused: Callable[..., Array], budget: int = SCORES
) -> Array:
    """The same function of [B, N, H, d] by `fused`, of all queries or of as many as have scores of `budget` bytes.

    The chunks are equal, of all heads and examples, so that a mesh divides each as it divides the whole. They are
    checkpointed: the backward pass computes a chunk's scores again.
    """
    b, n, h, d = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in mesh.auto_axes)
    chunks = math.ceil(4 * b * h * n * k.shape[1] / (devices * budget))
    if chunks <= 1:
        return fused(q, k, v, bias)
    size = math.ceil(n / 2 ** math.ceil(math.log2(chunks)))  # pictures' sides are divided by powers of 2
    rows = jnp.pad(q, ((0, 0), (0, -n % size), (0, 0), (0, 0))).reshape(b, -1, size, h, d)
    one_chunk = jax.checkpoint(lambda chunk: fused(chunk, k, v, bias), prevent_cse=False)  # no need of it in a loop
    out = jax.lax.map(one_chunk, rows.swapaxes(0, 1))  # [chunks, B, size, H, d]
    return out.swapaxes(0, 1).reshape(b, -1, h, d)[:, :n]


def _fused(q: Array, k: Array, v: Array, bias: Array | None, causal: bool) -> Array:
    """The same function of [B, N, H, d], all scores at once."""
    bias = None if bias is None else bias[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, bias, is_causal=causal)


def _float16(q: Array, k: Array, v: Array, bias: Array | None, causal: bool) -> Array:
    """The same of float16: XLA has its products with sums in float32 on GPUs alone."""
    fused = functools.partial(_fused, causal=causal)

    def widened(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return fused(q, k, v, bias).astype(jnp.float16)

    return jax.lax.platform_dependent(q, k, v, bias, cuda=fused, rocm=fused, default=widened)


def _chunked(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    """The same function of [B, N, H, d] with scores of one head and CHUNK queries in memory at a time.

    Two-dimensional products run at a CPU's matrix speed, and the scores stay in its cache; the peak is
    CHUNK * M floats instead of B * H * N * M. Checkpointed, so that the gradient is bounded in the same way.
    """
    b, n, h, d = q.shape
    q = jnp.pad(q * jnp.asarray(d**-0.5, q.dtype), ((0, 0), (0, -n % CHUNK), (0, 0), (0, 0)))
    rows = q.transpose(0, 2, 1, 3).reshape(b * h, -1, CHUNK, d)
    keys, values = (x.transpose(0, 2, 1, 3).reshape(b * h, -1, d) for x in (k, v))
    biases = None if bias is None else bias.repeat(h, 0)

    @jax.checkpoint
    def one_chunk(chunk, key, value, bias):
        scores = jnp.matmul(chunk, key.T, preferred_element_type=jnp.float32)
        scores = scores if bias is None else scores + bias
        # Unnormalised weights, divided after the product: d columns to divide instead of M.
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        out = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(value.dtype)

    def one_head(head):
        chunks, *shared = head
        return jax.lax.map(lambda chunk: one_chunk(chunk, *shared), chunks)

    out = jax.lax.map(one_head, (rows, keys, values, biases))  # [B*H, N/CHUNK, CHUNK, d]
    return out.reshape(b, h, -1, d)[:, :, :n].transpose(0, 2, 1, 3)
