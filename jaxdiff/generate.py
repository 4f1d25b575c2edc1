"""From prompts to pictures: `generate` puts the pure pieces under one compiled program a device."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import parallel
from jaxdiff import prompts as text
from jaxdiff.arguments import (
    as_batch,
    as_controls,
    as_images,
    as_interval,
    as_mask,
    as_noise,
    as_numbers,
    check_task,
    first_step,
    latent_shape,
    most_noise,
    settle_size,
    small_shape,
)
from jaxdiff.denoiser import denoiser
from jaxdiff.diffusion.prediction import add_noise, expand
from jaxdiff.diffusion.sampling import sample, step_keys
from jaxdiff.diffusion.schedulers import get_scheduler, moment
from jaxdiff.diffusion.times import default_scheduler, time_grid
from jaxdiff.models.model import Model, encode_text
from jaxdiff.models.tiny_vae import preview
from jaxdiff.tasks import Inputs, Shared, codec, enlarged, extra_channels, resized, slerp, starting_point
from jaxdiff.typing import Array, Key, Params

HIRES = 2**30  # folded into the keys of a second stage; steps take small numbers


def tokenize(model: Model, prompts: Sequence[str | None]) -> text.Tokens | Array:
    """Prompts to what `encode_text` reads: token ids int32 [B, K L], or `Tokens` where there is more to say. Host side.

    K chunks of L tokens are as many as the longest prompt needs; see jaxdiff/prompts.py for emphasis and limits.
    """
    tokens = text.tokens(model, list(prompts))
    return tokens.ids if all(field is None for field in tokens[1:]) else tokens


def encoder_inputs(
    model: Model, groups: list[tuple[list[str | None], list[str | None]] | None], emphasis: bool
) -> list[text.Tokens | None]:
    """Tokens of each group of prompts, such as the negative ones, in as many chunks as any prompt of any group needs.

    A group is B prompts and what SDXL's second encoder reads instead, None where it is the same. A group that is None
    stays None.
    """
    given = [group for group in groups if group is not None]
    first, second = ([p for group in given for p in group[i]] for i in (0, 1))
    if model.tokenizer_2 is None and any(p is not None for p in second):
        raise ValueError("prompts_2 are for the second text encoder of SDXL, which this model has not.")
    every = text.tokens(model, first, second, emphasis=emphasis)
    parts = iter(range(0, len(first), len(first) // len(given)))

    def part(i: int) -> text.Tokens:
        return jax.tree.map(lambda a: a[i : i + len(first) // len(given)], every)

    return [None if group is None else part(next(parts)) for group in groups]


@functools.lru_cache(maxsize=64)
def sampler(
    model: Model,
    scheduler: str,
    clip_skip: int,
    upscale: str,
    tile: int | None,
    devices: tuple[jax.Device, ...],
) -> parallel.Mapped:
    """The compiled program that draws: (params, Shared, Inputs) -> pictures in [0, 1], and frames where asked for.

    It is compiled anew for other shapes, types, or fields that are None; all values are traced.
    """

    def draw(params: Params, shared: Shared, each: Inputs):
        def encoded(tokens):
            return encode_text(model, params, tokens, clip_skip=clip_skip)

        cond, uncond = encoded(each.tokens), None if each.negative is None else encoded(each.negative)
        if (blend := each.blend) is not None:
            cond = jax.tree.map(lambda a, b: a + expand(blend, a) * (b - a), cond, encoded(each.blend_tokens))
        method, vae = get_scheduler(scheduler, model.scheduler), codec(model, params, tile)

        def denoise(control_images):
            return denoiser(
                model,
                params,
                cond,
                uncond,
                each.guidance_scale,
                guidance_rescale=each.guidance_rescale,
                guidance_interval=shared.guidance_interval,
                extra_channels=extra_channels(model, vae, each),
                class_labels=each.noise_level,
                control_images=control_images,
                controlnet_scale=each.controlnet_scale,
            )

        if each.small_noise is None:
            x, start, method = starting_point(model, vae, shared, each, method)
            keys = each.keys
        else:
            small = each.small_noise
            controls = resized(each.control_images, *(side * model.vae.config.factor for side in small.shape[1:3]))
            low = sample(denoise(controls), shared.noise_scale * small, shared.times, method, each.keys)
            start, keys = shared.start, step_keys(each.keys, HIRES)
            original = enlarged(model, vae, low, each.noise.shape, upscale)
            x = add_noise(original, each.noise, moment(shared.times, start))
        final = denoise(each.control_images)
        if shared.moments is None:
            return vae.decode(sample(final, x, shared.times, method, keys, start=start))
        x0, steps = sample(final, x, shared.times, method, keys, start=start, trajectory=True)
        chosen = steps[shared.moments]  # [F, B, h, w, C]
        flat = chosen.reshape(-1, *x0.shape[1:])
        frames = vae.decode(flat) if model.tiny_vae is None else preview(model.tiny_vae, params["tiny_vae"], flat)
        return vae.decode(x0), jnp.moveaxis(frames.reshape(*chosen.shape[:2], *frames.shape[1:]), 0, 1)

    return parallel.pmap(draw, devices, shared=2)


def picture_keys(seed: int | Sequence[int], count: int) -> Key:
    """One key a picture: picture i of a call with seed s has key(s + i); a sequence of seeds is taken as it is."""
    seeds = np.asarray(seed)
    if seeds.dtype.kind not in "iu" or seeds.shape not in ((), (count,)):
        raise ValueError(f"seed {seed} must be a whole number below 2**64, or one for each of {count} prompts.")
    seeds = seeds.astype(np.int64) + (np.arange(count) if seeds.ndim == 0 else 0)
    return jax.vmap(jax.random.key)(jnp.asarray(seeds % 2**32, jnp.uint32))


@functools.partial(jax.jit, static_argnums=1)
def initial_noise(keys: Key, shape: tuple[int, ...]) -> Array:
    """Unit Gaussian latents [B, *shape] float32, each drawn from its own key only."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


def generate(
    model: Model,
    params: Params,
    prompts: str | Sequence[str],
    negative_prompts: str | Sequence[str | None] | None = None,
    *,
    prompts_2: str | Sequence[str | None] | None = None,
    negative_prompts_2: str | Sequence[str | None] | None = None,
    blend_prompts: str | Sequence[str] | None = None,
    blend: float | Sequence[float] = 0.5,
    seed: int | Sequence[int] = 0,
    variation_seed: int | Sequence[int] | None = None,
    variation_strength: float | Sequence[float] = 0.1,
    steps: int = 25,
    guidance_scale: float | Sequence[float] = 7.5,
    guidance_rescale: float | Sequence[float] = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    clip_skip: int = 0,
    emphasis: bool = True,
    scheduler: str | None = None,
    spacing: str | None = None,
    height: int | None = None,
    width: int | None = None,
    noise: Array | None = None,
    image: Array | None = None,
    strength: float | None = None,
    mask: Array | None = None,
    noise_level: int | Sequence[int] = 20,
    control_images: Array | Sequence[Array] = (),
    controlnet_scale: float | Sequence[float] = 1.0,
    hires: float | None = None,
    hires_strength: float = 0.6,
    hires_upscale: str = "pixel",
    tile: int | None = None,
    frames: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Draw one picture a prompt: from text alone, or from a picture redrawn, inpainted, enlarged or followed.

    Compiled once for each batch size, picture size, type, scheduler, number of steps, chunks of the longest prompt, and
    set of arguments given; prompts, seeds, noise, pictures, scales, interval, spacing, strength and noise level are
    traced.

    Args:
        prompts: B prompts; brackets give emphasis, and long ones go in chunks (jaxdiff/prompts.py).
        negative_prompts: what to steer away from: none, one for all, or one a prompt.
        prompts_2, negative_prompts_2: what the second text encoder of SDXL reads instead; None: the same.
        blend_prompts, blend: prompts towards which the text's encoding is moved, 0 to 1 of the way, for one or for each
            picture: with many values, a film from one prompt to another.
        seed: picture i is drawn from key(seed + i), alone or in a batch, on one device or many (the batch a device
            draws changes the order of sums, so that a pixel may differ by one grey level); or a seed a picture.
        variation_seed, variation_strength: noise drawn from another seed (counted up like `seed`), and how far, 0 to 1,
            the noise is turned towards it: a little gives variations of a picture, many values a film between two.
        steps: length of the time grid.
        guidance_scale: weight of the prompt, for all or one a picture; 1 or less turns guidance off. Distilled models
            (LCM) are told of it, and need no second half of the batch.
        guidance_rescale: in [0, 1], how much of the contrast that guidance adds is taken back (Lin et al. 2023).
        guidance_interval: (low, high) of sigma / alpha, the noise levels with guidance (Kynkäänniemi et al. 2024).
        clip_skip: how many of the text encoder's layers are left out at its end, beyond those always left out.
        emphasis: whether brackets and BREAK in prompts mean something.
        scheduler: a name of `SCHEDULERS`; None takes what the model's scheduler_config.json says.
        spacing: of the time grid, see `time_grid`; None takes what the config says. "ays" is SDXL's own table for it.
        height, width: pixels, multiples of the VAE's factor; None takes the model's own size.
        noise: unit Gaussian latents [B, h, w, C] to start from instead of those drawn from the seeds; with `hires`,
            those of the second stage.
        image: picture or pictures [B, H, W, 3] (uint8, or float in [0, 1]) to start from instead of pure noise; with
            an upscaling model, the small one [B, H / factor, W / factor, 3].
        strength: in (0, 1], the part of the steps that an `image` goes through (Meng et al. 2022, SDEdit); None is
            0.6, and 1 with a mask. At 1 what a mask covers is drawn from noise alone.
        mask: [H, W] or [B, H, W] (bool, uint8, or float in [0, 1]): white is redrawn, and black kept but for what the
            autoencoder changes. Any model inpaints; those with 9 channels were taught to.
        noise_level: of an upscaling model: noise on the small picture, in steps, up to the model's max_noise_level.
        control_images: for each of the model's ControlNets the picture [H, W, 3] or pictures [B, H, W, 3] to follow.
        controlnet_scale: weight of the ControlNets, for all or one for each.
        hires: draw so many times smaller first, enlarge, and redraw the part `hires_strength` of the steps at full
            size: large pictures of models that were taught small ones. Enlarged is the picture, or as
            `hires_upscale` says "latent", what the autoencoder makes of it, which is cheaper and blurrier.
        tile: encode and decode in overlapping tiles of this many latents (jaxdiff/models/tiling.py), for pictures that
            the autoencoder has no memory for.
        frames: how many predictions of the finished picture along the way are returned as well, at most one a step.
        devices: what to draw on, the batch divided over them; None takes all that this process has.

    Returns:
        uint8 [B, H, W, 3]; with `frames` = F > 0 also uint8 [B, F, H, W, 3], from first (rough) to last.

    Raises:
        ValueError: one sentence naming the argument and what it may be.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("prompts is empty: give at least one.")
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1.")
    check_task(model, image, mask, hires, hires_upscale)
    count, factor, upscaling = len(prompts), model.vae.config.factor, model.family == "upscaler"
    shape = latent_shape(model, *settle_size(model, height, width, noise, image))
    size = shape[0] * factor, shape[1] * factor
    scheduler = default_scheduler(model.scheduler) if scheduler is None else scheduler
    spacing = "ays_sdxl" if spacing == "ays" and model.family.startswith("sdxl") else spacing
    times, noise_scale = time_grid(model.scheduler, steps, scheduler, spacing)
    start = 0
    if image is not None and not upscaling:
        start = first_step(steps, strength if strength is not None else 0.6 if mask is None else 1.0)
    if hires is not None:
        start = first_step(steps, hires_strength, "hires_strength")
    moments = np.unique(np.linspace(start, len(times.t) - 2, frames).round().astype(np.int32)) if frames else None
    scales = as_numbers("guidance_scale", guidance_scale, count)
    rescale = as_numbers("guidance_rescale", guidance_rescale, count, 0.0, 1.0)
    guided = bool((scales > 1).any()) and model.unet.config.time_cond_proj_dim is None
    groups: list[tuple[list[str | None], list[str | None]] | None] = [
        (as_batch("prompts", prompts, count), as_batch("prompts_2", prompts_2, count)),
        (
            as_batch("negative_prompts", negative_prompts, count),
            as_batch("negative_prompts_2", negative_prompts_2, count),
        )
        if guided
        else None,
        None if blend_prompts is None else (as_batch("blend_prompts", blend_prompts, count), [None] * count),
    ]
    tokens, negative, blended = encoder_inputs(model, groups, emphasis)
    assert tokens is not None
    keys = picture_keys(seed, count)
    noise = initial_noise(keys, shape) if noise is None else as_noise(noise, count, shape)
    small = None if hires is None else small_shape(shape, hires)
    small_noise = None if small is None else initial_noise(keys, small)
    if variation_seed is not None:
        other, amount = (
            picture_keys(variation_seed, count),
            as_numbers("variation_strength", variation_strength, count, 0.0, 1.0),
        )
        noise = slerp(noise, initial_noise(other, shape), amount)
        small_noise = None if small is None else slerp(small_noise, initial_noise(other, small), amount)
    each = Inputs(
        tokens,
        negative,
        scales,
        rescale if rescale.any() else None,
        noise,
        keys,
        None if image is None else as_images("image", image, count, shape[:2] if upscaling else size),
        None if mask is None else as_mask(mask, count, size),
        as_numbers("noise_level", noise_level, count, 0, most_noise(model), np.int32) if upscaling else None,
        *as_controls(model, control_images, controlnet_scale, count, size),
        None if blended is None else as_numbers("blend", blend, count, 0.0, 1.0),
        blended,
        small_noise,
    )
    interval = as_interval(guidance_interval)
    shared = Shared(times, np.asarray(noise_scale), np.asarray(start, np.int32), interval, moments)
    devices = tuple(jax.local_devices() if devices is None else devices)
    drawn = sampler(model, scheduler, clip_skip, hires_upscale, tile, devices[:count])(params, shared, each)
    return jax.tree.map(lambda x: np.asarray(jnp.round(255 * x).astype(jnp.uint8)), drawn)
