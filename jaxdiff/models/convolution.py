"""Convolutions; on a CPU the wide 3x3 ones as matrix products, which run there at more than XLA's convolution does."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Measured on CPUs with the shapes of SD 1.5: products of gathered neighbours are up to three times as fast as XLA's
# convolution at so few positions and so many channels; at more positions Winograd's products are, up to twice.
FEW_POSITIONS, GATHERED_CHANNELS = 1024, 512
WINOGRAD_NARROW, WINOGRAD_WIDE = 128, 256  # channels of the kernel's narrower and wider side, at least
CHUNK_POSITIONS = 8192  # of the output at a time, so that Winograd's products of a large picture fit into memory


def convolve(x: jax.Array, kernel: jax.Array, strides, padding, **kwargs) -> jax.Array:
    """`lax.conv_general_dilated` in NHWC; on a CPU in the fastest of three forms, equal up to rounding.

    The forms hold for 3x3 kernels with padding 1. Winograd's form adds and subtracts neighbours before it multiplies,
    which only float32 affords.
    """

    def general(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)

    b, h, w, c = x.shape
    usual = kernel.shape[:2] == (3, 3) and strides[0] == strides[1] and tuple(map(tuple, padding)) == ((1, 1), (1, 1))
    divided = jax.sharding.get_abstract_mesh().auto_axes  # then the reshaped kernel would be brought together first
    if not usual or divided:
        return general(x, kernel)
    form: Callable | None = None
    if b * h * w <= FEW_POSITIONS:
        if c >= GATHERED_CHANNELS:
            form = gathered
    elif strides[0] == 1 and h % 2 == w % 2 == 0 and x.dtype == jnp.float32:
        narrow, wide = sorted(kernel.shape[2:])
        form = winograd if narrow >= WINOGRAD_NARROW and wide >= WINOGRAD_WIDE else None
    if form is None:
        return general(x, kernel)
    # The gradient gathers anew rather than keep the gathered, which is four or nine times as large as x.
    on_cpu = jax.checkpoint(lambda x, kernel: form(x, kernel, strides[0]))
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=general)


def padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def gathered(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """One product of each position's nine neighbours side by side."""
    _, h, w, c = x.shape
    x = padded(x)
    neighbours = [x[:, i : i + h : stride, j : j + w : stride] for i in range(3) for j in range(3)]
    sides = jnp.concatenate(neighbours, -1)
    return (sides.reshape(-1, 9 * c) @ kernel.reshape(9 * c, -1)).reshape(*sides.shape[:3], -1)


def winograd(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """F(2x2, 3x3) of Lavin and Gray 2015, section 4.1: 16 products where 36 would be, for each 2x2 of the output."""
    b, h, w, _ = x.shape
    kernels = [of_kernel(row, 0) for row in of_kernel(kernel, 0)]
    x = padded(x)
    pairs = h // 2
    fit = max(1, CHUNK_POSITIONS // (2 * b * w))
    rows = 2 * max(n for n in range(1, pairs + 1) if pairs % n == 0 and n <= fit)

    def some(start):
        return tiles(jax.lax.dynamic_slice_in_dim(x, start, rows + 2, 1), kernels)

    if rows == h:
        return tiles(x, kernels)
    return jnp.moveaxis(jax.lax.map(some, jnp.arange(0, h, rows)), 0, 1).reshape(b, h, w, -1)


def tiles(x: jax.Array, kernels: list[list[jax.Array]]) -> jax.Array:
    """[B, H + 2, W + 2, C] with its border -> [B, H, W, features]; kernels 4 x 4 of [C, features]."""
    b, h, w, c = x.shape[0], x.shape[1] - 2, x.shape[2] - 2, x.shape[3]
    across = []
    for row, row_kernels in zip(of_input(x, 1), kernels, strict=True):
        products = [part.reshape(-1, c) @ k for part, k in zip(of_input(row, 2), row_kernels, strict=True)]
        across.append(to_output([m.reshape(b, h // 2, w // 2, -1) for m in products], 3))
    return to_output(across, 2).reshape(b, h, w, -1)


def of_input(x: jax.Array, axis: int) -> list[jax.Array]:
    """Their matrix B^T along one axis, for every second start of four."""
    span = x.shape[axis] - 3
    a, b, c, d = (jax.lax.slice_in_dim(x, i, i + span, 2, axis) for i in range(4))
    return [a - c, b + c, c - b, b - d]


def of_kernel(kernel: jax.Array, axis: int) -> list[jax.Array]:
    """Their matrix G along one axis of length 3."""
    a, b, c = jnp.moveaxis(kernel, axis, 0)
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def to_output(m: list[jax.Array], axis: int) -> jax.Array:
    """Their matrix A^T: four products to two neighbours, along a new axis."""
    return jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], axis)
