"""Convolutions. On a CPU, wide 3x3 kernels run as matrix products, which are faster than XLA's convolution."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.models.cpu import im2col_conv, winograd

# Measured on CPUs with the shapes of SD 1.5: with few positions and many channels, products of gathered neighbours are
# up to three times as fast as XLA's convolution; with more positions Winograd's form is up to twice as fast, but takes
# longer to compile, which does not pay off at few positions.
FEW_POSITIONS, IM2COL_CHANNELS = 1024, 512
WINOGRAD_CHANNELS = 64  # of the kernel's narrower side, at least


def convolve(x: jax.Array, kernel: jax.Array, strides, padding, **kwargs) -> jax.Array:
    """`lax.conv_general_dilated` in NHWC; on a CPU in float32 by the fastest of three forms, equal up to rounding.

    On CPUs, XLA's 16-bit convolutions are slower than float32 ones, and Winograd's form, which adds before it
    multiplies, needs float32. The two other forms are for 3x3 kernels with padding 1.
    """

    def general(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)

    b, h, w, c = x.shape
    is_3x3 = kernel.shape[:2] == (3, 3) and strides[0] == strides[1] and tuple(map(tuple, padding)) == ((1, 1), (1, 1))
    mesh = jax.sharding.get_abstract_mesh()
    form: Callable | None = None
    # A kernel sharded over "tensor" (the other axes shard examples) would be gathered before it is reshaped.
    if not is_3x3 or ("tensor" in mesh.auto_axes and mesh.shape["tensor"] > 1):
        pass
    elif b * h * w <= FEW_POSITIONS:
        form = im2col_conv if c >= IM2COL_CHANNELS else None
    elif strides[0] == 1 and h % 2 == w % 2 == 0:
        form = winograd if min(kernel.shape[2:]) >= WINOGRAD_CHANNELS else None
    is_half = x.dtype in (jnp.bfloat16, jnp.float16)
    if form is None and not is_half:
        return general(x, kernel)
    # The gradient recomputes the gathered neighbours, which are four or nine times as large as x, to save memory.
    fastest = general if form is None else jax.checkpoint(lambda x, kernel: form(x, kernel, strides[0]))

    def on_cpu(x, kernel):
        if not is_half:
            return fastest(x, kernel)
        return fastest(x.astype(jnp.float32), kernel.astype(jnp.float32)).astype(x.dtype)

    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=general)
