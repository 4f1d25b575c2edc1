"""Implementations for CPUs: convolutions as matrix products, and attention in chunks.

Only `convolve` and `attention` call them.
"""

import jax
import jax.numpy as jnp

from jaxdiff.typing import Array

CHUNK_POSITIONS = 8192  # of the output at a time, so that Winograd's products of a large image fit into memory
CHUNK_QUERIES = 512


def pad_border(x: jax.Array) -> jax.Array:
    """A border of one zero: [B, H, W, C] -> [B, H + 2, W + 2, C]."""
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def im2col_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 3x3 convolution as one matrix product over each position's nine neighbours.

    x [B, H, W, C], kernel [3, 3, C, features] -> [B, H / stride, W / stride, features].
    """
    _, h, w, c = x.shape
    x = pad_border(x)
    neighbours = [x[:, i : i + h : stride, j : j + w : stride] for i in range(3) for j in range(3)]
    patches = jnp.concatenate(neighbours, -1)
    return (patches.reshape(-1, 9 * c) @ kernel.reshape(9 * c, -1)).reshape(*patches.shape[:3], -1)


def winograd(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """F(2x2, 3x3) of Lavin and Gray 2015, section 4.1: 16 products instead of 36 for each 2x2 of the output.

    x [B, H, W, C] with even H and W, kernel [3, 3, C, features], stride 1 -> [B, H, W, features].
    """
    b, h, w, _ = x.shape
    kernels = [kernel_transform(row, 0) for row in kernel_transform(kernel, 0)]
    x = pad_border(x)
    pairs = h // 2
    max_pairs = max(1, CHUNK_POSITIONS // (2 * b * w))
    rows = 2 * max(n for n in range(1, pairs + 1) if pairs % n == 0 and n <= max_pairs)

    def tiles_from(start):
        return winograd_tiles(jax.lax.dynamic_slice_in_dim(x, start, rows + 2, 1), kernels)

    if rows == h:
        return winograd_tiles(x, kernels)
    return jnp.moveaxis(jax.lax.map(tiles_from, jnp.arange(0, h, rows)), 0, 1).reshape(b, h, w, -1)


def winograd_tiles(x: jax.Array, kernels: list[list[jax.Array]]) -> jax.Array:
    """x [B, H + 2, W + 2, C] with its border, kernels 4 x 4 of [C, features] -> [B, H, W, features]."""
    b, h, w, c = x.shape[0], x.shape[1] - 2, x.shape[2] - 2, x.shape[3]
    across = []
    for row, row_kernels in zip(input_transform(x, 1), kernels, strict=True):
        products = [part.reshape(-1, c) @ k for part, k in zip(input_transform(row, 2), row_kernels, strict=True)]
        across.append(output_transform([m.reshape(b, h // 2, w // 2, -1) for m in products], 3))
    return output_transform(across, 2).reshape(b, h, w, -1)


def input_transform(x: jax.Array, axis: int) -> list[jax.Array]:
    """Lavin and Gray's matrix B^T along one axis, on four neighbours with stride 2."""
    span = x.shape[axis] - 3
    a, b, c, d = (jax.lax.slice_in_dim(x, i, i + span, 2, axis) for i in range(4))
    return [a - c, b + c, c - b, b - d]


def kernel_transform(kernel: jax.Array, axis: int) -> list[jax.Array]:
    """Lavin and Gray's matrix G along one axis of length 3."""
    a, b, c = jnp.moveaxis(kernel, axis, 0)
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def output_transform(m: list[jax.Array], axis: int) -> jax.Array:
    """Lavin and Gray's matrix A^T: four products to two neighbours, along a new axis."""
    return jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], axis)


def chunked_attention(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    """softmax(q kᵀ / sqrt(d) + bias) v, with the scores of CHUNK_QUERIES queries of one head in memory at a time.

    q [B, N, H, d], k and v [B, M, H, d], bias [B, M] float32 or None -> [B, N, H, d].

    Two-dimensional products run at a CPU's matrix speed, and the scores stay in its cache; the peak is
    CHUNK_QUERIES * M floats instead of B * H * N * M. Checkpointed, so that the gradient is bounded in the same way.
    """
    b, n, h, d = q.shape
    q = jnp.pad(q * jnp.asarray(d**-0.5, q.dtype), ((0, 0), (0, -n % CHUNK_QUERIES), (0, 0), (0, 0)))
    rows = q.transpose(0, 2, 1, 3).reshape(b * h, -1, CHUNK_QUERIES, d)
    keys, values = (x.transpose(0, 2, 1, 3).reshape(b * h, -1, d) for x in (k, v))
    biases = None if bias is None else bias.repeat(h, 0)

    @jax.checkpoint
    def attend_chunk(chunk, key, value, bias):
        scores = jnp.matmul(chunk, key.T, preferred_element_type=jnp.float32)
        scores = scores if bias is None else scores + bias
        # Unnormalised weights, divided after the product: d columns to divide instead of M.
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        out = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(value.dtype)

    def attend_head(head):
        chunks, *shared = head
        return jax.lax.map(lambda chunk: attend_chunk(chunk, *shared), chunks)

    out = jax.lax.map(attend_head, (rows, keys, values, biases))  # [B*H, N/CHUNK_QUERIES, CHUNK_QUERIES, d]
    return out.reshape(b, h, -1, d)[:, :, :n].transpose(0, 2, 1, 3)
