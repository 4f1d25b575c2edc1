"""Names for the types that cross the package's boundaries."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Mapping[str, Any]  # nested dict of arrays: {"text_encoder": …, "unet": …, "vae": …}
Key = jax.Array  # jax.random.key(…), scalar or [B]
Denoise = Callable[[Array, Any], Array]  # (x [B, ...], Time) -> denoised [B, ...]

# The PRNG of every key made here, so that images do not depend on JAX_DEFAULT_PRNG_IMPL.
PRNG = "threefry2x32"
SEEDS = 2**32  # seeds are below this
