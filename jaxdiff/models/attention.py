"""Scaled dot-product attention (Vaswani et al. 2017, equation 1), with an implementation for each platform.

On an accelerator, long sequences go to a fused kernel (fused_attention.py) if there is one for their dtype and width.
Else the memory of the scores, B * H * N * M float32 numbers, is bounded: on a CPU by computing a chunk of queries of
one head at a time (cpu.py), elsewhere and under a mesh to SCORES bytes a device. Gradients have the same bounds.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jaxdiff.models.cpu import chunked_attention
from jaxdiff.models.fused_attention import FUSED_FROM, cudnn_attention, cudnn_takes, tpu_attention, tpu_takes
from jaxdiff.typing import Array

# With this many queries or more, the scores of one head exceed a CPU's cache and are computed in chunks.
CHUNK_FROM = 1024
SCORES = 2**30  # bytes of scores a device; above, queries are processed in chunks
_UNFUSED = contextvars.ContextVar("unfused", default=False)


@contextlib.contextmanager
def forward_differentiable() -> Iterator[None]:
    """A context in which attention uses no fused kernel: `jax.jvp` needs a forward-mode derivative, which they lack."""
    token = _UNFUSED.set(True)
    try:
        yield
    finally:
        _UNFUSED.reset(token)


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
        bias: added to the scores of each key, [B, M] float32; -inf hides a key.

    Returns:
        [B, N, heads * d] in the dtype of q.
    """
    shape = q.shape
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    fused = functools.partial(_float16 if q.dtype == jnp.float16 else _fused, causal=causal)
    bounded = functools.partial(_bounded, fused=fused)
    if causal:  # texts are short
        return fused(q, k, v, bias).reshape(shape)
    platforms: dict[str, Callable[..., Array]] = {}
    # Under a mesh, a loop over heads would gather all heads and examples on each device.
    if shape[1] >= CHUNK_FROM and not jax.sharding.get_abstract_mesh().auto_axes:
        platforms["cpu"] = chunked_attention
    if bias is None and min(shape[1], k.shape[1]) >= FUSED_FROM and not _UNFUSED.get():
        if cudnn_takes(q):
            platforms["cuda"] = cudnn_attention
        if tpu_takes(q):
            platforms["tpu"] = tpu_attention
    if not platforms:
        return bounded(q, k, v, bias).reshape(shape)
    return jax.lax.platform_dependent(q, k, v, bias, default=bounded, **platforms).reshape(shape)


def _bounded(
    q: Array, k: Array, v: Array, bias: Array | None, fused: Callable[..., Array], budget: int = SCORES
) -> Array:
    """`fused` applied to [B, N, H, d], in chunks of queries whose scores take at most `budget` bytes a device.

    The chunks are equal and hold all heads and examples, so that a mesh divides each as it divides the whole. They are
    checkpointed: the backward pass recomputes a chunk's scores.
    """
    b, n, h, d = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in mesh.auto_axes)
    chunks = math.ceil(4 * b * h * n * k.shape[1] / (devices * budget))
    if chunks <= 1:
        return fused(q, k, v, bias)
    size = math.ceil(n / 2 ** math.ceil(math.log2(chunks)))  # images' sides are divided by powers of 2
    rows = jnp.pad(q, ((0, 0), (0, -n % size), (0, 0), (0, 0))).reshape(b, -1, size, h, d)
    attend_chunk = jax.checkpoint(lambda chunk: fused(chunk, k, v, bias), prevent_cse=False)  # not needed in a loop
    out = jax.lax.map(attend_chunk, rows.swapaxes(0, 1))  # [chunks, B, size, H, d]
    return out.swapaxes(0, 1).reshape(b, -1, h, d)[:, :n]


def _fused(q: Array, k: Array, v: Array, bias: Array | None, causal: bool) -> Array:
    """Attention of [B, N, H, d] with all scores at once."""
    bias = None if bias is None else bias[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, bias, is_causal=causal)


def _float16(q: Array, k: Array, v: Array, bias: Array | None, causal: bool) -> Array:
    """`_fused` for float16: only on GPUs does XLA accumulate float16 products in float32; elsewhere inputs are cast."""
    fused = functools.partial(_fused, causal=causal)

    def in_float32(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return fused(q, k, v, bias).astype(jnp.float16)

    return jax.lax.platform_dependent(q, k, v, bias, cuda=fused, rocm=fused, default=in_float32)
