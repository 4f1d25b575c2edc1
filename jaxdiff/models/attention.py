"""Scaled dot-product attention (Vaswani et al. 2017, equation 1) in a form that suits each platform.

Many tokens on an accelerator go to a fused kernel (fused_attention.py), where there is one for their type and width.
Else the memory of the scores, B * H * N * M float32 numbers, is bounded: on a CPU by taking some queries of one head at
a time (cpu.py), elsewhere and on the devices of a mesh to SCORES bytes a device. Gradients keep to the same bounds.
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

# From this many queries on, the scores of one head no longer fit the cache of a CPU and are made a chunk at a time.
CHUNK_FROM = 1024
SCORES = 2**30  # bytes; where all take more, queries go in chunks
_UNFUSED = contextvars.ContextVar("unfused", default=False)


@contextlib.contextmanager
def forward_differentiable() -> Iterator[None]:
    """Within it no attention takes a fused kernel; those have no forward-mode derivative, which `jax.jvp` needs."""
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
        bias: of the scores of each key, [B, M] float32; -inf hides a key.

    Returns:
        [B, N, heads * d] in the type of q.
    """
    shape = q.shape
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    fused = functools.partial(_float16 if q.dtype == jnp.float16 else _fused, causal=causal)
    bounded = functools.partial(_bounded, fused=fused)
    if causal:  # texts are short
        return fused(q, k, v, bias).reshape(shape)
    platforms: dict[str, Callable[..., Array]] = {}
    # One head after the other would bring all heads and examples together on each device, were they divided by a mesh.
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
    size = math.ceil(n / 2 ** math.ceil(math.log2(chunks)))  # images' sides are divided by powers of 2
    rows = jnp.pad(q, ((0, 0), (0, -n % size), (0, 0), (0, 0))).reshape(b, -1, size, h, d)
    one_chunk = jax.checkpoint(lambda chunk: fused(chunk, k, v, bias), prevent_cse=False)  # no need of it in a loop
    out = jax.lax.map(one_chunk, rows.swapaxes(0, 1))  # [chunks, B, size, H, d]
    return out.swapaxes(0, 1).reshape(b, -1, h, d)[:, :n]


def _fused(q: Array, k: Array, v: Array, bias: Array | None, causal: bool) -> Array:
    """The same function of [B, N, H, d], all scores at once."""
    bias = None if bias is None else bias[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, bias, is_causal=causal)


def _float16(q: Array, k: Array, v: Array, bias: Array | None, causal: bool) -> Array:
    """The same in float16: XLA sums products of float16 in float32 on GPUs only."""
    fused = functools.partial(_fused, causal=causal)

    def widened(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return fused(q, k, v, bias).astype(jnp.float16)

    return jax.lax.platform_dependent(q, k, v, bias, cuda=fused, rocm=fused, default=widened)
