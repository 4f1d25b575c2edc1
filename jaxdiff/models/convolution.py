"""Convolutions; on a CPU the wide 3x3 ones as matrix products, which are faster there than XLA's convolution."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.models.cpu import gathered, winograd

# Measured on CPUs with the shapes of SD 1.5: products of gathered neighbours are up to three times as fast as XLA's
# convolution at so few positions and so many channels; at more positions Winograd's products are, up to twice. They
# take longer to compile, which at few positions is not won back.
FEW_POSITIONS, GATHERED_CHANNELS = 1024, 512
WINOGRAD_CHANNELS = 64  # of the kernel's narrower side, at least


def convolve(x: jax.Array, kernel: jax.Array, strides, padding, **kwargs) -> jax.Array:
    """`lax.conv_general_dilated` in NHWC; on a CPU in float32 and in the fastest of three forms, equal up to rounding.

    XLA's convolutions of 16 bits are slower there than those of float32, and Winograd's form, which adds and subtracts
    neighbours before it multiplies, is for float32 alone. The forms hold for 3x3 kernels with padding 1.
    """

    def general(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)

    b, h, w, c = x.shape
    usual = kernel.shape[:2] == (3, 3) and strides[0] == strides[1] and tuple(map(tuple, padding)) == ((1, 1), (1, 1))
    mesh = jax.sharding.get_abstract_mesh()
    form: Callable | None = None
    # A kernel divided over "tensor" (the others divide examples) would be brought together before it is reshaped.
    if not usual or ("tensor" in mesh.auto_axes and mesh.shape["tensor"] > 1):
        pass
    elif b * h * w <= FEW_POSITIONS:
        form = gathered if c >= GATHERED_CHANNELS else None
    elif strides[0] == 1 and h % 2 == w % 2 == 0:
        form = winograd if min(kernel.shape[2:]) >= WINOGRAD_CHANNELS else None
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    if form is None and not half:
        return general(x, kernel)
    # The gradient gathers anew rather than keep the gathered, which is four or nine times as large as x.
    best = general if form is None else jax.checkpoint(lambda x, kernel: form(x, kernel, strides[0]))

    def on_cpu(x, kernel):
        return best(x.astype(jnp.float32), kernel.astype(jnp.float32)).astype(x.dtype) if half else best(x, kernel)

    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=general)
