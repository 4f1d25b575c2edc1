"""From arguments to the inputs of the program, for `generate` and the commands alike. Pure functions, no files.

`resolve_settings` decides what all images of a call share. It needs only the model's configuration, so a command
finds mistakes before it reads weights. `resolve_images` then makes the inputs of each image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.diffusion.base import Scheduler
from jaxdiff.diffusion.schedulers import get_scheduler
from jaxdiff.diffusion.schedules import dynamic_shift, empirical_shift
from jaxdiff.diffusion.times import default_scheduler, is_distilled, time_grid
from jaxdiff.errors import ArgumentError, say_once
from jaxdiff.models.dit import PATCH
from jaxdiff.models.model import Model
from jaxdiff.sampling.checks import (
    as_batch,
    as_controls,
    as_images,
    as_integer,
    as_interval,
    as_mask,
    as_noise,
    as_noise_level,
    as_numbers,
    as_prompts,
    check_clip_skip,
    check_gan,
    check_gan_size,
    check_memory,
    check_task,
)
from jaxdiff.sampling.inputs import CallInputs, ImageInputs
from jaxdiff.sampling.noise import image_keys
from jaxdiff.sampling.texts import Texts, encoder_inputs
from jaxdiff.typing import Array, Key

MAX_STEPS = 10_000
CUSTOM_GRID = "euler"  # the time grid of a user's own `Scheduler`: sigma / alpha falls to 0, without substeps


class Settings(NamedTuple):
    """What all images of a call share."""

    scheduler: str | Scheduler
    steps: int
    guidance_scale: float | Sequence[float]
    strength: float | None  # None: no image, or an upscaling model
    height: int  # pixels
    width: int
    latents: tuple[int, int, int]  # (h, w, C)
    lowres_latents: tuple[int, int, int] | None  # of the first stage of `hires`
    hires_upscale: str
    clip_skip: int
    tile: int | None
    call: CallInputs


class Request(NamedTuple):
    """All inputs of B images except their noise."""

    settings: Settings
    prompts: list[str]
    images: ImageInputs
    variation: tuple[Key, np.ndarray] | None  # keys [B] of a second noise, and the weight [B] of it


def resolve_settings(
    model: Model,
    *,
    steps: int | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    clip_skip: int = 0,
    scheduler: str | Scheduler | None = None,
    spacing: str | None = None,
    height: int | None = None,
    width: int | None = None,
    noise: Array | None = None,
    image: Array | None = None,
    strength: float | None = None,
    mask: Array | None = None,
    hires: float | None = None,
    hires_strength: float = 0.6,
    hires_upscale: str = "pixel",
    tile: int | None = None,
    frames: int = 0,
) -> Settings:
    """What all images of a call share; see `generate` for the arguments. Only the shapes of images are read.

    Raises:
        ArgumentError: an argument is wrong by itself, with others, or for this model.
        ValueError: the model's scheduler_config.json holds something that is not supported.
    """
    check_gan(
        model, steps=steps, scheduler=scheduler, guidance_scale=guidance_scale, spacing=spacing, image=image, mask=mask,
        strength=strength, hires=hires, guidance_interval=guidance_interval, frames=frames or None,
    )  # fmt: skip
    check_task(model, image, mask, hires, hires_upscale)
    latents = latent_shape(model, *resolve_size(model, height, width, noise, image))
    check_gan_size(model, latents)
    factor = model.vae.config.factor
    check_memory(model, latents[0] * factor, latents[1] * factor, tile)
    default_steps = 1 if model.is_gan else model.options.steps
    steps = as_integer("steps", default_steps if steps is None else steps, 1)
    if steps > MAX_STEPS:
        raise ArgumentError("steps", f"{steps} is too many: give at most {MAX_STEPS}.")
    scheduler = default_scheduler(model.scheduler) if scheduler is None else scheduler
    grid = CUSTOM_GRID if isinstance(scheduler, Scheduler) else scheduler
    get_scheduler(grid, model.scheduler)
    strength = resolve_strength(model, image, mask, strength)
    start = resolve_start(model, steps, grid, spacing, mask is not None, strength, hires, hires_strength)
    spacing = "ays_sdxl" if spacing == "ays" and model.family.startswith("sdxl") else spacing
    spacing, mu = flow_grid(model, steps, spacing, latents)
    times, noise_scale = time_grid(model.scheduler, steps, grid, spacing, strength=start.part, mu=mu)
    frames, last = as_integer("frames", frames, 0, steps), len(times.t) - 2
    interval = as_interval(guidance_interval)
    return Settings(
        scheduler=scheduler,
        steps=steps,
        guidance_scale=model.options.guidance_scale if guidance_scale is None else guidance_scale,
        strength=strength,
        height=latents[0] * factor,
        width=latents[1] * factor,
        latents=latents,
        lowres_latents=None if hires is None else lowres_shape(latents, hires, model.multiple // factor),
        hires_upscale=hires_upscale,
        clip_skip=check_clip_skip(model, clip_skip),
        tile=None if tile is None else min(as_integer("tile", tile, 1), max(latents[:2])),
        call=CallInputs(
            times,
            np.asarray(noise_scale),
            start.first,
            start.lowres,
            interval,
            preview_steps(start.first, last, frames),
            None if hires is None else preview_steps(start.lowres, last, frames),
        ),
    )


def resolve_images(
    model: Model,
    settings: Settings,
    prompts: str | Sequence[str],
    negative_prompts: Texts = None,
    *,
    prompts_2: Texts = None,
    negative_prompts_2: Texts = None,
    blend_prompts: Texts = None,
    blend_negative_prompts: Texts = None,
    blend: float | Sequence[float] = 0.5,
    seed: int | Sequence[int] = 0,
    variation_seed: int | Sequence[int] | None = None,
    variation_strength: float | Sequence[float] = 0.1,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_rescale: float | Sequence[float] = 0.0,
    pag_scale: float | Sequence[float] | None = None,
    emphasis: bool = True,
    noise: Array | None = None,
    image: Array | None = None,
    mask: Array | None = None,
    noise_level: int | Sequence[int] | None = None,
    control_images: Array | Sequence[Array] = (),
    controlnet_scale: float | Sequence[float] = 1.0,
) -> Request:
    """The inputs of each of B images; see `generate` for the arguments. Raises ArgumentError."""
    prompts = as_prompts(prompts)
    count, size = len(prompts), (settings.height, settings.width)
    negatives = {"negative_prompts": negative_prompts, "blend_negative_prompts": blend_negative_prompts}
    used = {name: texts for name, texts in negatives.items() if any(as_batch(name, texts, count))}
    check_gan(model, guidance_rescale=guidance_rescale if np.any(guidance_rescale) else None, **used)
    scales, rescale, pag = resolve_scales(model, settings, count, guidance_scale, guidance_rescale, pag_scale)
    guided = is_guided(model, scales)
    if used and not guided:
        reason = "which this model does without" if model.one_pass else "and guidance_scale turns it off"
        say_once(f"Negative prompts are not used: they are for guidance, {reason}.")
    has_blend = blend_prompts is not None
    (tokens, negative, blend_tokens, blend_negative), picks = encoder_inputs(
        model,
        {
            "prompts": (prompts, prompts_2),
            "negative_prompts": (negative_prompts, negative_prompts_2) if guided else None,
            "blend_prompts": (blend_prompts, prompts_2) if has_blend else None,
            "blend_negative_prompts": None
            if blend_negative_prompts is None or not guided
            else (blend_negative_prompts, negative_prompts_2),
        },
        count,
        emphasis,
        len(settings.call.times.t) - 1,
        1 if settings.lowres_latents is None else 2,
    )
    assert tokens is not None
    variation = None
    if variation_seed is not None:
        amount = as_numbers("variation_strength", variation_strength, count, 0.0, 1.0)
        variation = image_keys(variation_seed, count, "variation_seed"), amount
    hints, weights = as_controls(model, control_images, controlnet_scale, count, size)
    image_size = settings.latents[:2] if model.family == "upscaler" else size
    images = ImageInputs(
        tokens=tokens,
        negative=negative,
        guidance_scale=scales,
        guidance_rescale=rescale if rescale.any() else None,
        pag_scale=pag if pag.any() else None,
        noise=None if noise is None else as_noise(noise, count, settings.latents),
        keys=image_keys(seed, count),
        image=None if image is None else as_images("image", image, count, image_size),
        mask=None if mask is None else as_mask(mask, count, size),
        noise_level=as_noise_level(model, noise_level, count),
        control_images=hints,
        controlnet_scale=weights,
        blend=as_numbers("blend", blend, count, 0.0, 1.0),
        blend_tokens=blend_tokens,
        blend_negative=blend_negative,
        picks=picks,
    )
    return Request(settings, prompts, images, variation)


def resolve_scales(
    model: Model,
    settings: Settings,
    count: int,
    guidance_scale: float | Sequence[float] | None,
    guidance_rescale: float | Sequence[float],
    pag_scale: float | Sequence[float] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales of guidance, of its rescaling, and of perturbed-attention guidance, each float32 [B]."""
    scales = as_numbers("guidance_scale", settings.guidance_scale if guidance_scale is None else guidance_scale, count)
    rescale = as_numbers("guidance_rescale", guidance_rescale, count, 0.0, 1.0)
    pag = as_numbers("pag_scale", model.options.pag_scale if pag_scale is None else pag_scale, count, 0.0)
    if pag.any() and (model.unet is None or model.is_gan):
        raise ArgumentError("pag_scale", "is for models with a UNet that draws step by step: leave it out.")
    return scales, rescale, pag


def is_guided(model: Model, scale: float | np.ndarray) -> bool:
    """Whether these guidance scales make use of a negative prompt, or of an empty one."""
    return bool(np.any(np.asarray(scale) > (0 if model.family == "z_image" else 1))) and not model.one_pass


def flow_grid(
    model: Model, steps: int, spacing: str | None, latents: tuple[int, int, int]
) -> tuple[str | None, float | None]:
    """The spacing of a transformer family's time grid, and the mu of its dynamic shift; (spacing, None) for a UNet.

    A given spacing is kept. Else all pipelines but SD 3's space the times evenly from 1 to 1/N, as "trailing" does.
    """
    if model.transformer is None:
        return spacing, None
    patches = latents[0] * latents[1] // PATCH**2
    is_flux2 = model.family == "flux2"
    mu = empirical_shift(patches, steps) if is_flux2 else dynamic_shift(model.scheduler, patches)
    config = model.scheduler
    levels = config.use_karras_sigmas or config.use_exponential_sigmas or config.use_beta_sigmas
    has_spacing = config.timestep_spacing or levels
    return spacing or (None if model.family == "sd3" or has_spacing else "trailing"), mu


def latent_shape(model: Model, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(h, w, C) of an image's latents.

    Raises:
        ArgumentError: height or width is not a multiple of the VAE's factor (times the patch), or is too large.
    """
    sample_size, max_side = model.sample_size, model.longest_side
    factor, multiple = model.vae.config.factor, model.multiple
    latent_sides = []
    for i, (name, pixels) in enumerate((("height", height), ("width", width))):
        if pixels is None:
            pixels = (sample_size if isinstance(sample_size, int) else sample_size[i]) * factor
        if not isinstance(pixels, int | np.integer) or pixels < multiple or pixels % multiple:
            patch = "" if multiple == factor else f" times {PATCH} latents to a patch"
            raise ArgumentError(name, f"{pixels} must be a positive multiple of {multiple}, the VAE's factor{patch}.")
        if max_side is not None and pixels > max_side:
            raise ArgumentError(
                name, f"{pixels} must be at most {max_side}: this model's transformer has no more positions."
            )
        latent_sides.append(int(pixels) // factor)
    return latent_sides[0], latent_sides[1], model.vae.config.latent_channels


def resolve_size(
    model: Model, height: int | None, width: int | None, noise: Array | None, image: Array | None
) -> tuple[int | None, int | None]:
    """Height and width in pixels, as given or as the noise or an upscaling model's image implies; None if open."""
    if noise is not None and np.ndim(noise) == 4:
        latent_size = np.shape(noise)[1:3]
    elif model.family == "upscaler" and image is not None and np.ndim(image) > 2:
        latent_size = np.shape(image)[-3:-1]
    else:
        return height, width
    factor = model.vae.config.factor
    return height or latent_size[0] * factor, width or latent_size[1] * factor


def resolve_strength(model: Model, image: Any, mask: Any, strength: float | None) -> float | None:
    """`strength` or its default; None without an image and for upscaling models."""
    if model.family == "upscaler" and strength is not None:
        raise ArgumentError(
            "strength", f"{strength} is for images that are redrawn; this model enlarges them: leave it out."
        )
    if image is None or model.family == "upscaler":
        return None
    return (0.6 if mask is None else 1.0) if strength is None else strength


def first_step(steps: int, strength: float, name: str = "strength", *, round_up: bool = False) -> int:
    """How many steps to skip at the beginning, so that the fraction `strength` of them is taken.

    Args:
        name: of the argument, for the error.
        round_up: whether to round the number of steps taken up, as diffusers' pipelines of the transformer families do.
    """
    wanted_steps = steps * strength if 0 < strength <= 1 else 0
    num_taken = steps - int(steps - wanted_steps) if round_up else int(wanted_steps)
    if not num_taken:
        raise ArgumentError(name, f"{strength} must be in (0, 1] and leave at least one of {steps} steps.")
    return steps - num_taken


class Start(NamedTuple):
    """Where on the time grid sampling starts."""

    first: np.ndarray | None  # int32, the first step taken; None: all steps are taken, from pure noise
    lowres: np.ndarray | None  # the same for the first stage of `hires`
    part: float = 1.0  # fraction of the distillation's steps that an LCM's grid covers


def resolve_start(
    model: Model,
    steps: int,
    scheduler: str,
    spacing: str | None,
    masked: bool,
    strength: float | None,
    hires: float | None,
    hires_strength: float,
) -> Start:
    """Where sampling starts: with an image, all models but LCMs skip the first steps, as diffusers' pipelines do.

    An LCM takes all its steps, over the last part of the distillation's, as diffusers'
    LatentConsistencyModelImg2ImgPipeline does.
    """
    first = lowres = None
    part, distilled = 1.0, model.unet is not None and model.one_pass
    single_stage = distilled and not masked and hires is None
    if strength is not None and single_stage and is_distilled(model.scheduler, scheduler, spacing):
        first_step(model.scheduler.original_inference_steps, strength)  # checks it
        first, part = 0, strength
    elif strength is not None:
        first = first_step(steps, strength, round_up=model.transformer is not None)
    if hires is not None:
        first, lowres = first_step(steps, hires_strength, "hires_strength"), first
    first_array, lowres_array = (None if n is None else np.asarray(n, np.int32) for n in (first, lowres))
    return Start(first_array, lowres_array, part)


def preview_steps(first: np.ndarray | None, last: int, frames: int) -> np.ndarray | None:
    """At most `frames` steps from `first` (None: 0) to `last`, evenly spaced, int32 [F]; None for no frames."""
    if not frames:
        return None
    return np.unique(np.linspace(0 if first is None else int(first), last, frames).round().astype(np.int32))


def lowres_shape(shape: tuple[int, int, int], hires: float, unit: int = 1) -> tuple[int, int, int]:
    """The latents' shape (h, w, C) of an image drawn about `hires` times smaller, h and w multiples of `unit`."""
    if not hires > 1 or min(shape[:2]) < unit * hires:
        raise ArgumentError("hires", f"{hires} must be above 1, and leave at least one of {list(shape[:2])} latents.")
    return unit * round(shape[0] / unit / hires), unit * round(shape[1] / unit / hires), shape[2]
