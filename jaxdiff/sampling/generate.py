"""From prompts to images: `generate` puts the pure pieces under one compiled program a device."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import mapping, parallel
from jaxdiff.diffusion.base import Scheduler, filled_up
from jaxdiff.diffusion.sampling_loop import sample, step_keys
from jaxdiff.diffusion.schedulers import get_scheduler
from jaxdiff.diffusion.times import skip_prk_steps
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.model import Model, computing_in
from jaxdiff.sampling.checks import as_devices
from jaxdiff.sampling.denoiser import denoiser
from jaxdiff.sampling.inputs import (
    CallInputs,
    ImageInputs,
    as_bytes,
    by_step,
    codec,
    conditions,
    extra_channels,
    frames_of,
    lowres_inputs,
    preview_codec,
    slerp,
    starting_point,
    upscaled,
)
from jaxdiff.sampling.resolve import MAX_STEPS, Request, Settings, resolve_images, resolve_settings
from jaxdiff.typing import Array, Denoise, Key, Params

# A grid is filled up to one of these numbers of steps, so that few programs are compiled for all of them.
FILLED = (50, 250, 1000, MAX_STEPS)
HIRES = 2**30  # folded into the keys of a second stage; steps take small numbers


class Drawn(NamedTuple):
    """B images as they are drawn."""

    images: Array  # uint8 [B, H, W, 3]
    finite: Array  # bool [B]: whether every pixel came out as a number
    frames: Array | None  # uint8 [B, F, H, W, 3], where asked for
    small: Array | None = None  # uint8 [B, F', h, w, 3], frames of a smaller image that is drawn first
    enlarged: Array | None = None  # uint8 [B, H, W, 3], that image as it is enlarged


@functools.lru_cache(maxsize=64)
def sampler(
    model: Model,
    scheduler: str | Scheduler,
    clip_skip: int,
    upscale: str,
    tile: int | None,
    devices: tuple[jax.Device, ...] | jax.sharding.Mesh,
) -> mapping.Mapped:
    """The compiled program that draws: (params, CallInputs, ImageInputs) -> Drawn.

    On CPUs a model in bfloat16 computes in float32, which is faster there; its weights are widened once a call.

    It is compiled anew for other shapes, types, or fields that are None; all values are traced. Over a mesh that
    divides the parameters, each network is gathered where it is used, the UNet at each step.
    """
    model, widened = computed_in(model, devices)

    def draw(params: Params, call: CallInputs, inputs: ImageInputs) -> Drawn:
        params = widened(params)
        cond, uncond = conditions(model, params, inputs, clip_skip)
        method = scheduler if isinstance(scheduler, Scheduler) else get_scheduler(scheduler, model.scheduler)
        vae = codec(model, params, tile)

        def stage(
            inputs: ImageInputs, keys: Key, start: Array | None, lowres: Array | None = None
        ) -> Callable[..., Any]:
            """`sample` of these inputs, from noise or from the latents of a smaller image."""
            denoise_with = network(model, params, call, inputs, extra_channels(model, vae, inputs))
            x, steps = starting_point(model, vae, call, inputs, start, lowres, method)
            if inputs.picks is not None:
                picks = inputs.picks[:, 0 if lowres is None else 1]
                steps = by_step(steps, picks, start, (cond, uncond), denoise_with)
            return functools.partial(sample, denoise_with(cond, uncond), x, call.times, steps, keys, start=start)

        previews = preview_codec(model, params, vae)

        def followed(run: Callable[..., Any], steps: Array | None) -> tuple[Array, Array | None]:
            """What a stage draws, and frames of its predictions at these steps."""
            if steps is None:
                return run(), None
            x0, predictions = run(trajectory=True)
            return x0, as_bytes(frames_of(previews, predictions[steps]))

        keys, lowres, small, enlarged = inputs.keys, None, None, None
        if inputs.lowres_noise is not None:
            run = stage(lowres_inputs(model, inputs), keys, call.lowres_start)
            latents, small = followed(run, call.lowres_preview_steps)
            lowres, keys = upscaled(model, params, vae, latents, inputs.noise.shape, upscale), step_keys(keys, HIRES)
            enlarged = None if small is None else as_bytes(previews.decode(lowres))
        x0, frames = followed(stage(inputs, keys, call.start, lowres), call.preview_steps)
        images = vae.decode(x0)
        return Drawn(as_bytes(images), jnp.isfinite(images).all((1, 2, 3)), frames, small, enlarged)

    return mapping.pmap(draw, devices, shared=2)


def computed_in(
    model: Model, devices: Sequence[jax.Device] | jax.sharding.Mesh
) -> tuple[Model, Callable[[Params], Params]]:
    """The model as it computes on these devices, and what makes its parameters of those that are held."""
    if not mapping.on_cpus(devices) or model.denoising.dtype != jnp.bfloat16:
        return model, lambda params: params

    def widened(params: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, params)

    return computing_in(model, jnp.float32), widened


def network(
    model: Model, params: Params, call: CallInputs, inputs: ImageInputs, extra: Array | None
) -> Callable[[Conditioning, Conditioning | None], Denoise]:
    """The denoiser of these inputs, for conditions that are still to be given.

    Args:
        extra: see `extra_channels`.
    """
    given: dict[str, Any] = {
        "guidance_scale": inputs.guidance_scale,
        "guidance_rescale": inputs.guidance_rescale,
        "guidance_interval": call.guidance_interval,
        "extra_channels": extra,
        "class_labels": inputs.noise_level,
        "control_images": inputs.control_images,
        "controlnet_scale": inputs.controlnet_scale,
    }

    def denoise_with(cond: Conditioning, uncond: Conditioning | None) -> Denoise:
        def denoise(x: Array, time: Any) -> Array:
            here, x = mapping.anew(params, x)
            return denoiser(model, here, cond, uncond, **given)(x, time)

        return denoise

    return denoise_with


def check_finite(finite: Array, prompts: list[str], model: Model) -> None:
    """Raise FloatingPointError for images of which some pixel is no number."""
    bad = np.flatnonzero(~np.asarray(finite))
    if bad.size:
        half = model.denoising.dtype == jnp.float16
        mend = (
            "float16 overflows in this model, so load it with dtype bfloat16 or float32"
            if half
            else "lower guidance_scale and the scales of LoRAs and ControlNets, or fetch damaged weights again"
        )
        raise FloatingPointError(
            f"{bad.size} of {len(prompts)} images, the first {prompts[bad[0]]!r:.60}, came out as not-a-number "
            f"(NaN): {mend}."
        )


@functools.partial(jax.jit, static_argnums=1)
def initial_noise(keys: Key, shape: tuple[int, ...]) -> Array:
    """Unit Gaussian latents [B, *shape] float32, each drawn from its own key only."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape, jnp.float32))(keys)


def with_noise(request: Request) -> ImageInputs:
    """The request's inputs with the unit Gaussian latents that they start from, and those of a smaller image."""
    inputs, settings = request.images, request.settings

    def drawn(shape: tuple[int, ...], given: Array | None = None) -> Array:
        noise = initial_noise(inputs.keys, shape) if given is None else given
        if request.variation is None:
            return noise
        keys, amount = request.variation
        return slerp(noise, initial_noise(keys, shape), amount)

    lowres = None if settings.lowres_latents is None else drawn(settings.lowres_latents)
    return inputs._replace(noise=drawn(settings.latents, inputs.noise), lowres_noise=lowres)


def with_filled_grid(model: Model, request: Request) -> tuple[CallInputs, ImageInputs]:
    """What all images share, and what each is drawn from, for a program of any number of steps."""
    settings, inputs = request.settings, with_noise(request)
    most = filled_length(model, settings)
    if most is None:
        return settings.call, inputs
    if inputs.picks is not None:
        missing = ((0, 0), (0, 0), (0, most - inputs.picks.shape[2]))
        inputs = inputs._replace(picks=np.pad(inputs.picks, missing, "edge"))
    return settings.call._replace(times=filled_up(settings.call.times, most)), inputs


def filled_length(model: Model, settings: Settings) -> int | None:
    """Steps of the grid that a program is compiled for; None: of those asked for.

    A user's own scheduler may count the steps of a grid in its own way, and Runge-Kutta steps depend on their number.
    """
    counts = settings.scheduler == "pndm" and not skip_prk_steps(model.scheduler)
    if isinstance(settings.scheduler, Scheduler) or counts:
        return None
    return next(length for length in FILLED if length >= len(settings.call.times.t) - 1)


def draw(
    model: Model,
    params: Params,
    request: Request,
    devices: Sequence[jax.Device] | None = None,
    *,
    lookup: Callable[..., Callable] | None = None,
) -> Drawn:
    """The images of a request as numpy arrays, with the frames that it asks for. See `generate`.

    Args:
        lookup: finds the program compiled by an earlier process, see `jaxdiff.io.programs.lookup`, which is given what
            decides it, the program, and its arguments.
    """
    settings, count = request.settings, len(request.prompts)
    static = (
        model,
        settings.scheduler,
        settings.clip_skip,
        settings.hires_upscale,
        settings.tile,
        as_devices(devices, count, params),
    )
    find = None if lookup is None else functools.partial(lookup, static)
    drawn = parallel.fetch(sampler(*static)(params, *with_filled_grid(model, request), lookup=find))
    check_finite(drawn.finite, request.prompts, model)
    return drawn


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
    steps: int | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_rescale: float | Sequence[float] = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    clip_skip: int = 0,
    emphasis: bool = True,
    scheduler: str | Scheduler | None = None,
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
    """Draw one image a prompt: from text alone, or from an image redrawn, inpainted, enlarged or followed.

    Compiled once for each batch size, image size, type, scheduler, chunks of the longest prompt, texts that a prompt is
    edited to, and set of arguments given (for up to 50, 250 or more steps); prompts, seeds, noise, images, scales,
    interval, spacing, strength, noise level and the number of steps are traced.

    Args:
        prompts: B prompts; brackets give emphasis or edit, and long ones go in chunks (jaxdiff/text/). Each attends to
            its own chunks only, whatever the length of the others.
        negative_prompts: what to steer away from: none, one for all, or one a prompt.
        prompts_2, negative_prompts_2: what the second text encoder of SDXL reads instead, at both ends of a blend;
            None: the same.
        blend_prompts, blend_negative_prompts, blend: prompts whose embeddings are interpolated with those of `prompts`
            and `negative_prompts`; `blend` is the fraction from 0 to 1, one value or one per image: many values make
            an animation from one prompt to another.
        seed: image i is drawn from key(seed + i), alone or in a batch, on one device or many (the batch a device
            draws changes the order of sums, so that a pixel may differ by one grey level); or a seed an image.
        variation_seed, variation_strength: noise drawn from another seed (counted up like `seed`), and how far, 0 to 1,
            the noise is turned towards it: a little gives variations of an image, many values an animation between two.
        steps: length of the time grid; None takes what the model recommends, else 25.
        guidance_scale: weight of the prompt, for all or one an image; 1 or less turns guidance off. None takes what
            the model recommends, else 7.5. Distilled models (LCM) are told of it, and need no second half of the batch.
        guidance_rescale: in [0, 1], how much of the contrast that guidance adds is taken back (Lin et al. 2023).
        guidance_interval: (low, high) of sigma / alpha, the noise levels with guidance (Kynkäänniemi et al. 2024).
        clip_skip: how many of the text encoder's layers are left out at its end, beyond those always left out.
        emphasis: whether brackets, tags and BREAK in prompts mean something: emphasis, and editing by step, such as
            [cat:dog:0.5] and [cat|dog] (jaxdiff/text/schedule.py).
        scheduler: a name of `SCHEDULERS`, or a `Scheduler` of your own, which takes the time grid of "euler"; None
            takes what the model's scheduler_config.json says.
        spacing: of the time grid, see `time_grid`; None takes what the config says. "ays" is SDXL's own table for it.
        height, width: pixels, multiples of the VAE's factor; None takes the model's own size.
        noise: unit Gaussian latents [B, h, w, C] to start from instead of those drawn from the seeds; with `hires`,
            those of the second stage.
        image: image or images [B, H, W, 3] (uint8, or float in [0, 1]) to start from instead of pure noise; with
            an upscaling model, the small one [B, H / factor, W / factor, 3].
        strength: in (0, 1], the part of the steps that an `image` goes through (Meng et al. 2022, SDEdit); None is
            0.6, and 1 with a mask. At 1 what a mask covers is drawn from noise alone. An LCM (without `mask` and
            `hires`) takes all its steps, over that part of the ones that it was distilled of.
        mask: [H, W] or [B, H, W] (bool, uint8, or float in [0, 1]): white is redrawn, and black kept but for what the
            autoencoder changes. Any model inpaints; those with 9 channels were taught to.
        noise_level: of an upscaling model: noise on the small image, in steps, up to the model's max_noise_level;
            None is 20, or as much as there is.
        control_images: for each of the model's ControlNets the image [H, W, 3] or images [B, H, W, 3] to follow.
        controlnet_scale: weight of the ControlNets, for all or one for each.
        hires: draw this many times smaller first, enlarge, and redraw the part `hires_strength` of the steps at full
            size, for large images from models that were trained on small ones. An image, mask and control images are
            resized for the small image; `strength` is of its steps.
        hires_upscale: how the small image is enlarged: "pixel", its pixels (Lanczos); "latent", its latents, which is
            cheaper and blurrier; or "network", its pixels by the network of `with_upscaler`.
        tile: encode and decode in overlapping tiles of this many latents (jaxdiff/models/tiling.py), for images that
            the autoencoder has no memory for.
        frames: how many predictions of the finished image are returned as well, evenly over the steps, at most `steps`;
            where fewer steps are taken, one for each.
        devices: what to draw on, the batch divided over them; None takes those that `params` were put on, as by
            `replicate` and `shard`, else all that this process has. Where they are of several processes, each calls
            `generate` with the same arguments, and each has all the images.

    Returns:
        uint8 [B, H, W, 3]; with `frames` = F > 0 also uint8 [B, F, H, W, 3], from first (rough) to last.

    Raises:
        ArgumentError (a ValueError): one sentence naming the argument and what it may be.
        FloatingPointError: an image came out as not-a-number, as float16 may overflow.
    """
    settings = resolve_settings(
        model,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        clip_skip=clip_skip,
        scheduler=scheduler,
        spacing=spacing,
        height=height,
        width=width,
        noise=noise,
        image=image,
        strength=strength,
        mask=mask,
        hires=hires,
        hires_strength=hires_strength,
        hires_upscale=hires_upscale,
        tile=tile,
        frames=frames,
    )
    request = resolve_images(
        model,
        settings,
        prompts,
        negative_prompts,
        prompts_2=prompts_2,
        negative_prompts_2=negative_prompts_2,
        blend_prompts=blend_prompts,
        blend_negative_prompts=blend_negative_prompts,
        blend=blend,
        seed=seed,
        variation_seed=variation_seed,
        variation_strength=variation_strength,
        guidance_rescale=guidance_rescale,
        emphasis=emphasis,
        noise=noise,
        image=image,
        mask=mask,
        noise_level=noise_level,
        control_images=control_images,
        controlnet_scale=controlnet_scale,
    )
    drawn: Any = draw(model, params, request, devices)
    return drawn.images if drawn.frames is None else (drawn.images, drawn.frames)
