"""One image at many guidance scales: `vmap` over the scale, one compiled program, one strip.

    python examples/vmap_guidance.py [OUTPUT.png]

Cost: 33 s on two CPU cores, compilation included; peak memory 0.8 GB.
Expect: the same owl seven times, from pale (scale 1, no guidance) to oversaturated with a stained background (12).
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from jaxdiff.io.images import strip, write_png

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 12.0)


def main(output="vmap_guidance.png", prompt="an owl", scales=SCALES, steps=20, seed=0):
    """Write the strip; returns its images [scales, H, W, 3] in [0, 1]."""
    model, params = jaxdiff.load("icons")
    tokens, empty = (jaxdiff.tokenize(model, [text]) for text in (prompt, ""))
    times, noise_scale = jaxdiff.time_grid(model.scheduler, steps, "dpmpp_2m")
    key = jax.random.key(seed)
    noise = jaxdiff.initial_noise(key[None], (16, 16, model.unet.config.in_channels))

    def draw(scale, params):
        cond, uncond = (jaxdiff.encode_text(model, params, ids) for ids in (tokens, empty))  # not mapped: done once
        denoise = jaxdiff.denoiser(model, params, cond, uncond, scale)
        x0 = jaxdiff.sample(denoise, noise_scale * noise, times, jaxdiff.get_scheduler("dpmpp_2m"), key)
        return jaxdiff.decode(model, params, x0)[0]

    images = np.asarray(jax.jit(jax.vmap(draw, in_axes=(0, None)))(jnp.asarray(scales), params))
    write_png(output, strip(images))
    return images


if __name__ == "__main__":
    main(*sys.argv[1:2])
