"""Custom guidance: projected guidance keeps contrast natural at scales where classifier-free guidance oversaturates.

    python examples/custom_guidance.py [OUTPUT.png]

The guidance direction has a component parallel to the prediction, which raises contrast and saturation, and an
orthogonal one, which strengthens the subject; a quarter of the parallel one is kept (Sadat et al. 2025, "Eliminating
Oversaturation and Artifacts of High Guidance Scales in Diffusion Models", algorithm 1 without momentum and radius).
Predictions are taken relative to the background, their median over the image, because this autoencoder's latents of
white are not 0.

Cost: 34 s on two CPU cores, compilation included; peak memory 1.0 GB.
Expect: at scale 10 the contrast is 0.277 with classifier-free guidance, with heavy outlines and a stained background,
and 0.228 projected, where it is 0.240 at scale 2. Neither is as clean as scale 2 with this model.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from jaxdiff.io.images import strip, write_png

PROMPTS = ("a castle", "a dog", "a rocket, 3d render", "a teddy bear")


def projected(cond, uncond, scale, along=0.0):
    """Predictions [B, h, w, C] of the clean latents -> the guided one; `along` = 1 is classifier-free guidance."""

    def dot(a, b):
        return jnp.sum(a * b, axis=(1, 2, 3), keepdims=True)

    step, image = cond - uncond, cond - jnp.median(cond, axis=(1, 2), keepdims=True)
    parallel = dot(step, image) / dot(image, image) * image
    return cond + (scale - 1) * (step - (1 - along) * parallel)


def contrast(images):
    """Standard deviation over all pixels and channels of images [B, H, W, 3]."""
    return float(np.std(images))


def main(output="custom_guidance.png", prompts=PROMPTS, scale=10.0, steps=20, seed=0):
    """Write rows of classifier-free guidance at 2, at `scale`, and of the projected; returns them [3, B, H, W, 3]."""
    model, params = jaxdiff.load("icons")
    tokens, empty = (jaxdiff.tokenize(model, texts) for texts in (list(prompts), [""] * len(prompts)))
    times, noise_scale = jaxdiff.time_grid(model.scheduler, steps, "dpmpp_2m")
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    noise = noise_scale * jaxdiff.initial_noise(keys, (16, 16, model.unet.config.in_channels))

    @jax.jit
    def draw(params, scale, along):
        denoise_cond, denoise_uncond = (
            jaxdiff.denoiser(model, params, jaxdiff.encode_text(model, params, ids)) for ids in (tokens, empty)
        )

        def denoise(x, time):
            return projected(denoise_cond(x, time), denoise_uncond(x, time), scale, along)

        x0 = jaxdiff.sample(denoise, noise, times, jaxdiff.get_scheduler("dpmpp_2m"), keys)
        return jaxdiff.decode(model, params, x0)

    rows = np.stack([draw(params, *options) for options in ((2.0, 1.0), (scale, 1.0), (scale, 0.25))])
    names = ("classifier-free at 2", f"classifier-free at {scale:g}", f"projected at {scale:g}")
    for name, row in zip(names, rows, strict=True):
        print(f"{name}: contrast {contrast(row):.3f}, {np.mean((row - rows[0]) ** 2):.4f} from the first row")
    write_png(output, np.concatenate([strip(row) for row in rows]))
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:2])
