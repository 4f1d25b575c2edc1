"""From prompts to pictures: `generate` puts the pure pieces under one compiled program a device."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import parallel
from jaxdiff import prompts as text
from jaxdiff.diffusion.sampling import sample, step_keys
from jaxdiff.diffusion.schedulers import get_scheduler
from jaxdiff.diffusion.times import default_scheduler, time_grid
from jaxdiff.models.model import Model
from jaxdiff.models.tiny_vae import preview
from jaxdiff.sampling.denoiser import denoiser
from jaxdiff.sampling.inputs import (
    Inputs,
    Shared,
    codec,
    conditions,
    enlarged,
    extra_channels,
    shrunk,
    slerp,
    starting_point,
)
from jaxdiff.sampling.resolve import (
    Start,
    as_batch,
    as_controls,
    as_devices,
    as_images,
    as_interval,
    as_mask,
    as_noise,
    as_noise_level,
    as_numbers,
    as_prompts,
    as_whole,
    check_task,
    latent_shape,
    settle_size,
    small_shape,
    start_of,
)
from jaxdiff.typing import Array, Key, Params

HIRES = 2**30  # folded into the keys of a second stage; steps take small numbers


Texts = str | Sequence[str | None] | None


def tokenize(
    model: Model,
    prompts: str | Sequence[str | None],
    prompts_2: Texts = None,
    *,
    emphasis: bool = True,
    chunks: int | None = None,
) -> text.Tokens | Array:
    """Prompts to what `encode_text` reads: token ids int32 [B, K L], or `Tokens` where there is more to say. Host side.

    Prompts and negative prompts of one picture need the same number of chunks: give `chunks` for both where one of them
    may be long.

    Args:
        prompts: one prompt or B of them; see jaxdiff/prompts.py for emphasis and limits.
        prompts_2: what the second text encoder of SDXL reads instead, for all or one a prompt; None: the same.
        emphasis: whether brackets and BREAK in prompts mean something.
        chunks: K, of L tokens each; None takes as many as the longest prompt needs.

    Raises:
        ValueError: one sentence naming the argument and what it may be.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    second = as_batch("prompts_2", prompts_2, len(prompts))
    tokens = text.tokens(model, prompts, second, emphasis=emphasis, chunks=chunks)
    return tokens.ids if all(field is None for field in tokens[1:]) else tokens


def encoder_inputs(
    model: Model, given: dict[str, tuple[Texts, Texts] | None], count: int, emphasis: bool
) -> list[text.Tokens | None]:
    """Tokens of each group of prompts, such as the negative ones, in as many chunks as any prompt of any group needs.

    A group, by its name, is what the first text encoder reads and what SDXL's second one reads instead, None where it
    is the same. A group that is None stays None.
    """
    groups = {
        name: None if pair is None else (as_batch(name, pair[0], count), as_batch(f"{name}_2", pair[1], count))
        for name, pair in given.items()
    }
    first, second = ([p for pair in groups.values() if pair for p in pair[i]] for i in (0, 1))
    every = text.tokens(model, first, second, emphasis=emphasis)
    every = text.weighed(every) if emphasis else every
    starts = iter(range(0, len(first), count))

    def part(i: int) -> text.Tokens:
        return jax.tree.map(lambda a: a[i : i + count], every)

    return [None if pair is None else part(next(starts)) for pair in groups.values()]


class Drawn(NamedTuple):
    """What the compiled program returns of B pictures."""

    pictures: Array  # uint8 [B, H, W, 3]
    finite: Array  # bool [B]: whether every pixel came out as a number
    frames: Array | None  # uint8 [B, F, H, W, 3], where asked for


@functools.lru_cache(maxsize=64)
def sampler(
    model: Model,
    scheduler: str,
    clip_skip: int,
    upscale: str,
    tile: int | None,
    devices: tuple[jax.Device, ...],
) -> parallel.Mapped:
    """The compiled program that draws: (params, Shared, Inputs) -> Drawn.

    It is compiled anew for other shapes, types, or fields that are None; all values are traced.
    """

    def draw(params: Params, shared: Shared, each: Inputs) -> Drawn:
        cond, uncond = conditions(model, params, each, clip_skip)
        method, vae = get_scheduler(scheduler, model.scheduler), codec(model, params, tile)

        def stage(each: Inputs, keys: Key, start: Array | None, drawn: Array | None = None) -> Callable[..., Any]:
            """`sample` of these inputs, from noise or from the latents `drawn` before."""
            denoise = denoiser(
                model,
                params,
                cond,
                uncond,
                each.guidance_scale,
                guidance_rescale=each.guidance_rescale,
                guidance_interval=shared.guidance_interval,
                extra_channels=extra_channels(model, vae, each),
                class_labels=each.noise_level,
                control_images=each.control_images,
                controlnet_scale=each.controlnet_scale,
            )
            x, steps = starting_point(model, vae, shared, each, start, drawn, method)
            return functools.partial(sample, denoise, x, shared.times, steps, keys, start=start)

        keys, drawn = each.keys, None
        if each.small_noise is not None:
            small = stage(shrunk(model, each), keys, shared.small_start)()
            drawn, keys = enlarged(model, vae, small, each.noise.shape, upscale), step_keys(keys, HIRES)
        if shared.shown is None:
            x0, frames = stage(each, keys, shared.start, drawn)(), None
        else:
            x0, steps = stage(each, keys, shared.start, drawn)(trajectory=True)
            frames = as_bytes(frames_of(model, params, vae.decode, steps[shared.shown]))
        pictures = vae.decode(x0)
        return Drawn(as_bytes(pictures), jnp.isfinite(pictures).all((1, 2, 3)), frames)

    return parallel.pmap(draw, devices, shared=2)


def frames_of(model: Model, params: Params, decode: Callable[[Array], Array], steps: Array) -> Array:
    """Predictions of latents [F, B, h, w, C] as pictures [B, F, H, W, 3], by the tiny autoencoder if there is one."""
    flat = steps.reshape(-1, *steps.shape[2:])
    frames = decode(flat) if model.tiny_vae is None else preview(model.tiny_vae, params["tiny_vae"], flat)
    return jnp.moveaxis(frames.reshape(*steps.shape[:2], *frames.shape[1:]), 0, 1)


def as_bytes(pictures: Array) -> Array:
    """Pictures in [0, 1] as uint8."""
    return jnp.round(255 * pictures).astype(jnp.uint8)


def check_finite(finite: Array, prompts: list[str], model: Model) -> None:
    """Raise FloatingPointError for pictures of which some pixel is no number."""
    bad = np.flatnonzero(~np.asarray(finite))
    if bad.size:
        half = model.unet.dtype == jnp.float16
        mend = (
            "float16 overflows in this model, so load it with dtype bfloat16 or float32"
            if half
            else "lower guidance_scale and the scales of LoRAs and ControlNets, or fetch damaged weights again"
        )
        raise FloatingPointError(
            f"{bad.size} of {len(prompts)} pictures, the first {prompts[bad[0]]!r:.60}, came out as not-a-number "
            f"(NaN): {mend}."
        )


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


def noises(
    keys: Key,
    shape: tuple[int, int, int],
    hires: float | None,
    given: Array | None,
    variation_seed: int | Sequence[int] | None,
    variation_strength: float | Sequence[float],
) -> tuple[Array, Array | None]:
    """The unit Gaussian latents [B, *shape] that pictures start from, and those of a small picture drawn first."""
    count, small = len(keys), None if hires is None else small_shape(shape, hires)
    noise = initial_noise(keys, shape) if given is None else as_noise(given, count, shape)
    small_noise = None if small is None else initial_noise(keys, small)
    if variation_seed is None:
        return noise, small_noise
    other = picture_keys(variation_seed, count)
    amount = as_numbers("variation_strength", variation_strength, count, 0.0, 1.0)
    noise = slerp(noise, initial_noise(other, shape), amount)
    return noise, None if small is None else slerp(small_noise, initial_noise(other, small), amount)


def schedule(
    model: Model,
    scheduler: str,
    spacing: str | None,
    steps: int,
    start: Start,
    guidance_interval: tuple[float, float] | None,
    frames: int,
) -> Shared:
    """The time grid, where on it pictures start (see `start_of`), and the steps whose predictions are shown."""
    spacing = "ays_sdxl" if spacing == "ays" and model.family.startswith("sdxl") else spacing
    times, noise_scale = time_grid(model.scheduler, steps, scheduler, spacing, strength=start.part)
    spread = np.linspace(0 if start.first is None else start.first, len(times.t) - 2, frames)
    shown = np.unique(spread.round().astype(np.int32)) if frames else None
    return Shared(times, np.asarray(noise_scale), start.first, start.small, as_interval(guidance_interval), shown)


def generate(
    model: Model,
    params: Params,
    prompts: str | Sequence[str],
    negative_prompts: str | Sequence[str | None] | None = None,
    *,
    prompts_2: str | Sequence[str | None] | None = None,
    negative_prompts_2: str | Sequence[str | None] | None = None,
    blend_prompts: str | Sequence[str] | None = None,
    blend_negative_prompts: str | Sequence[str | None] | None = None,
    blend: float | Sequence[float] = 0.5,
    seed: int | Sequence[int] = 0,
    variation_seed: int | Sequence[int] | None = None,
    variation_strength: float | Sequence[float] = 0.1,
    steps: int = 25,
    guidance_scale: float | Sequence[float] | None = None,
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
    noise_level: int | Sequence[int] | None = None,
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
        prompts: B prompts; brackets give emphasis, and long ones go in chunks (jaxdiff/prompts.py). Each attends to its
            own chunks only, whatever the length of the others.
        negative_prompts: what to steer away from: none, one for all, or one a prompt.
        prompts_2, negative_prompts_2: what the second text encoder of SDXL reads instead, at both ends of a blend;
            None: the same.
        blend_prompts, blend_negative_prompts, blend: prompts whose embeddings are interpolated with those of `prompts`
            and `negative_prompts`; `blend` is the fraction from 0 to 1, one value or one per picture: many values make
            a film from one prompt to another.
        seed: picture i is drawn from key(seed + i), alone or in a batch, on one device or many (the batch a device
            draws changes the order of sums, so that a pixel may differ by one grey level); or a seed a picture.
        variation_seed, variation_strength: noise drawn from another seed (counted up like `seed`), and how far, 0 to 1,
            the noise is turned towards it: a little gives variations of a picture, many values a film between two.
        steps: length of the time grid.
        guidance_scale: weight of the prompt, for all or one a picture; 1 or less turns guidance off. None takes what
            the model recommends, else 7.5. Distilled models (LCM) are told of it, and need no second half of the batch.
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
            0.6, and 1 with a mask. At 1 what a mask covers is drawn from noise alone. An LCM (without `mask` and
            `hires`) takes all its steps, over that part of the ones that it was distilled of.
        mask: [H, W] or [B, H, W] (bool, uint8, or float in [0, 1]): white is redrawn, and black kept but for what the
            autoencoder changes. Any model inpaints; those with 9 channels were taught to.
        noise_level: of an upscaling model: noise on the small picture, in steps, up to the model's max_noise_level;
            None is 20, or as much as there is.
        control_images: for each of the model's ControlNets the picture [H, W, 3] or pictures [B, H, W, 3] to follow.
        controlnet_scale: weight of the ControlNets, for all or one for each.
        hires: draw so many times smaller first, enlarge, and redraw the part `hires_strength` of the steps at full
            size: large pictures of models that were taught small ones. Enlarged is the picture, or as
            `hires_upscale` says "latent", what the autoencoder makes of it, which is cheaper and blurrier. An image,
            mask and control images are resized for the small picture; `strength` is of its steps.
        tile: encode and decode in overlapping tiles of this many latents (jaxdiff/models/tiling.py), for pictures that
            the autoencoder has no memory for.
        frames: how many predictions of the finished picture along the way are returned as well, at most `steps`; where
            fewer steps are taken, one for each.
        devices: what to draw on, the batch divided over them; None takes those that `params` were put on, as by
            `replicate`, else all that this process has.

    Returns:
        uint8 [B, H, W, 3]; with `frames` = F > 0 also uint8 [B, F, H, W, 3], from first (rough) to last.

    Raises:
        ValueError: one sentence naming the argument and what it may be.
        FloatingPointError: a picture came out as not-a-number, as float16 may overflow.
    """
    prompts = as_prompts(prompts)
    check_task(model, image, mask, hires, hires_upscale)
    count, factor, upscaling = len(prompts), model.vae.config.factor, model.family == "upscaler"
    shape = latent_shape(model, *settle_size(model, height, width, noise, image))
    size = shape[0] * factor, shape[1] * factor
    scheduler = default_scheduler(model.scheduler) if scheduler is None else scheduler
    steps = as_whole("steps", steps, 1)
    start = start_of(model, steps, scheduler, spacing, image, mask, strength, hires, hires_strength)
    shared = schedule(model, scheduler, spacing, steps, start, guidance_interval, as_whole("frames", frames, 0, steps))
    guidance_scale = model.options.guidance_scale if guidance_scale is None else guidance_scale
    scales = as_numbers("guidance_scale", guidance_scale, count)
    rescale = as_numbers("guidance_rescale", guidance_rescale, count, 0.0, 1.0)
    guided = bool((scales > 1).any()) and model.unet.config.time_cond_proj_dim is None
    tokens, negative, blend_tokens, blend_negative = encoder_inputs(
        model,
        {
            "prompts": (prompts, prompts_2),
            "negative_prompts": (negative_prompts, negative_prompts_2) if guided else None,
            "blend_prompts": None if blend_prompts is None else (blend_prompts, prompts_2),
            "blend_negative_prompts": None
            if blend_negative_prompts is None or not guided
            else (blend_negative_prompts, negative_prompts_2),
        },
        count,
        emphasis,
    )
    assert tokens is not None
    keys = picture_keys(seed, count)
    noise, small_noise = noises(keys, shape, hires, noise, variation_seed, variation_strength)
    hints, weights = as_controls(model, control_images, controlnet_scale, count, size)
    each = Inputs(
        tokens=tokens,
        negative=negative,
        guidance_scale=scales,
        guidance_rescale=rescale if rescale.any() else None,
        noise=noise,
        keys=keys,
        image=None if image is None else as_images("image", image, count, shape[:2] if upscaling else size),
        mask=None if mask is None else as_mask(mask, count, size),
        noise_level=as_noise_level(model, noise_level, count),
        control_images=hints,
        controlnet_scale=weights,
        blend=as_numbers("blend", blend, count, 0.0, 1.0),
        blend_tokens=blend_tokens,
        blend_negative=blend_negative,
        small_noise=small_noise,
    )
    tile = None if tile is None else as_whole("tile", tile, 1)
    program = sampler(
        model, scheduler, as_whole("clip_skip", clip_skip, 0), hires_upscale, tile, as_devices(devices, count, params)
    )
    drawn = jax.tree.map(np.asarray, program(params, shared, each))
    check_finite(drawn.finite, prompts, model)
    return drawn.pictures if drawn.frames is None else (drawn.pictures, drawn.frames)
