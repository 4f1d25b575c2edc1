"""From prompts to images: `generate` compiles the pure functions into one program, mapped over the devices."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import mapping, parallel
from jaxdiff.diffusion.base import Scheduler, pad_grid
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
    codec,
    conditions,
    decode_frames,
    extra_channels,
    lowres_inputs,
    preview_codec,
    slerp,
    starting_point,
    text_by_step,
    to_uint8,
    upscale_latents,
)
from jaxdiff.sampling.noise import initial_noise
from jaxdiff.sampling.resolve import MAX_STEPS, Request, Settings, resolve_images, resolve_settings
from jaxdiff.typing import Array, Denoise, Key, Params

# Time grids are padded to one of these numbers of steps, so that few programs serve any number of steps.
GRID_LENGTHS = (50, 250, 1000, MAX_STEPS)
HIRES = 2**30  # folded into the keys of the second stage; steps fold in small numbers


class Drawn(NamedTuple):
    """What the program returns for B images."""

    images: Array  # uint8 [B, H, W, 3]
    finite: Array  # bool [B]: whether every pixel is finite
    frames: Array | None  # uint8 [B, F, H, W, 3], if asked for
    small: Array | None = None  # uint8 [B, F', h, w, 3], frames of the first stage of `hires`
    enlarged: Array | None = None  # uint8 [B, H, W, 3], the image of the first stage, enlarged


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

    On CPUs a bfloat16 model computes in float32, which is faster there; its weights are cast once a call.

    It recompiles for other shapes and dtypes, and if a field becomes None or ceases to be; all values are traced. Over
    a mesh that divides the parameters, each network is gathered where it is used, the UNet at each step.
    """
    model, cast = to_compute_dtype(model, devices)

    def draw(params: Params, call: CallInputs, inputs: ImageInputs) -> Drawn:
        params = cast(params)
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
                steps = text_by_step(steps, picks, start, (cond, uncond), denoise_with)
            return functools.partial(sample, denoise_with(cond, uncond), x, call.times, steps, keys, start=start)

        previews = preview_codec(model, params, vae)

        def run_stage(run: Callable[..., Any], steps: Array | None) -> tuple[Array, Array | None]:
            """What a stage draws, and frames of its predictions at these steps."""
            if steps is None:
                return run(), None
            x0, predictions = run(trajectory=True)
            return x0, to_uint8(decode_frames(previews, predictions[steps]))

        keys, lowres, small, enlarged = inputs.keys, None, None, None
        if inputs.lowres_noise is not None:
            run = stage(lowres_inputs(model, inputs), keys, call.lowres_start)
            latents, small = run_stage(run, call.lowres_preview_steps)
            lowres, keys = (
                upscale_latents(model, params, vae, latents, inputs.noise.shape, upscale),
                step_keys(keys, HIRES),
            )
            enlarged = None if small is None else to_uint8(previews.decode(lowres))
        x0, frames = run_stage(stage(inputs, keys, call.start, lowres), call.preview_steps)
        images = vae.decode(x0)
        return Drawn(to_uint8(images), jnp.isfinite(images).all((1, 2, 3)), frames, small, enlarged)

    return mapping.pmap(draw, devices, shared=2)


def to_compute_dtype(
    model: Model, devices: Sequence[jax.Device] | jax.sharding.Mesh
) -> tuple[Model, Callable[[Params], Params]]:
    """The model in the dtype that it computes in on these devices, and a function that casts its parameters to it."""
    if not mapping.on_cpus(devices) or model.denoising.dtype != jnp.bfloat16:
        return model, lambda params: params

    def cast(params: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, params)

    return computing_in(model, jnp.float32), cast


def network(
    model: Model, params: Params, call: CallInputs, inputs: ImageInputs, extra: Array | None
) -> Callable[[Conditioning, Conditioning | None], Denoise]:
    """A function (cond, uncond) -> the denoiser of these inputs.

    Args:
        extra: see `extra_channels`.
    """
    guidance_args: dict[str, Any] = {
        "guidance_scale": inputs.guidance_scale,
        "guidance_rescale": inputs.guidance_rescale,
        "guidance_interval": call.guidance_interval,
        "pag_scale": inputs.pag_scale,
        "pag_layers": model.options.pag_layers,
        "extra_channels": extra,
        "class_labels": inputs.noise_level,
        "control_images": inputs.control_images,
        "controlnet_scale": inputs.controlnet_scale,
    }

    def denoise_with(cond: Conditioning, uncond: Conditioning | None) -> Denoise:
        def denoise(x: Array, time: Any) -> Array:
            gathered, x = mapping.anew(params, x)
            return denoiser(model, gathered, cond, uncond, **guidance_args)(x, time)

        return denoise

    return denoise_with


def check_finite(finite: Array, prompts: list[str], model: Model) -> None:
    """Raise FloatingPointError if an image holds a NaN.

    Args:
        finite: bool [B].
    """
    non_finite = np.flatnonzero(~np.asarray(finite))
    if non_finite.size:
        is_half = model.denoising.dtype == jnp.float16
        advice = (
            "float16 overflows in this model, so load it with dtype bfloat16 or float32"
            if is_half
            else "lower guidance_scale and the scales of LoRAs and ControlNets, or fetch damaged weights again"
        )
        raise FloatingPointError(
            f"{non_finite.size} of {len(prompts)} images, the first {prompts[non_finite[0]]!r:.60}, came out as "
            f"not-a-number (NaN): {advice}."
        )


def with_noise(request: Request) -> ImageInputs:
    """The request's inputs with their initial noise, for both stages of `hires`."""
    inputs, settings = request.images, request.settings

    def make_noise(shape: tuple[int, ...], fixed: Array | None = None) -> Array:
        noise = initial_noise(inputs.keys, shape) if fixed is None else fixed
        if request.variation is None:
            return noise
        keys, amount = request.variation
        return slerp(noise, initial_noise(keys, shape), amount)

    lowres = None if settings.lowres_latents is None else make_noise(settings.lowres_latents)
    return inputs._replace(noise=make_noise(settings.latents, inputs.noise), lowres_noise=lowres)


def padded_inputs(model: Model, request: Request) -> tuple[CallInputs, ImageInputs]:
    """The program's inputs, with the time grid padded so that any number of steps uses the same program."""
    settings, inputs = request.settings, with_noise(request)
    length = padded_length(model, settings)
    if length is None:
        return settings.call, inputs
    if inputs.picks is not None:
        pad_width = ((0, 0), (0, 0), (0, length - inputs.picks.shape[2]))
        inputs = inputs._replace(picks=np.pad(inputs.picks, pad_width, "edge"))
    return settings.call._replace(times=pad_grid(settings.call.times, length)), inputs


def padded_length(model: Model, settings: Settings) -> int | None:
    """The number of steps that a time grid is padded to; None: it is not padded.

    A user's own scheduler may count the entries of the grid, and pndm's Runge-Kutta start depends on their number.
    """
    depends_on_length = settings.scheduler == "pndm" and not skip_prk_steps(model.scheduler)
    if isinstance(settings.scheduler, Scheduler) or depends_on_length:
        return None
    return next(length for length in GRID_LENGTHS if length >= len(settings.call.times.t) - 1)


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
        lookup: called with what decides the program, the program and its arguments; returns the program compiled by an
            earlier process, see `jaxdiff.io.programs.lookup`.
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
    bound_lookup = None if lookup is None else functools.partial(lookup, static)
    output = parallel.fetch(sampler(*static)(params, *padded_inputs(model, request), lookup=bound_lookup))
    check_finite(output.finite, request.prompts, model)
    return output


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
    pag_scale: float | Sequence[float] | None = None,
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

    It compiles one program for each batch size, image size, dtype, scheduler, number of chunks, number of texts that a
    prompt is edited to, and set of arguments given (and for more than 50, 250 and 1000 steps). Prompts, seeds, noise,
    images, scales, interval, spacing, strength, noise level and the number of steps are traced.

    Args:
        prompts: B prompts. Brackets mean emphasis or editing, and long prompts are split into chunks (jaxdiff/text/);
            the transformer families read prompts as they are. No image depends on the other prompts.
        negative_prompts: what to steer away from: none, one for all, or one a prompt. Unused without guidance, which a
            warning says.
        prompts_2, negative_prompts_2: prompts for SDXL's second text encoder, at both ends of a blend; None: the same.
        blend_prompts, blend_negative_prompts, blend: prompts whose embeddings are interpolated with those of `prompts`
            and `negative_prompts`; `blend` is the fraction from 0 to 1, for all or one an image. Many values make an
            animation from one prompt to another.
        seed: image i is drawn from key(seed + i), alone or in a batch, on one device or many; or one seed an image.
            (Another batch size changes the order of sums, so that a pixel may differ by one grey level.)
        variation_seed, variation_strength: a second seed (counted up like `seed`), and how far, 0 to 1, the noise is
            interpolated towards that seed's: small values vary an image, many values make an animation between two.
        steps: number of denoising steps; None: the model's default, else 25.
        guidance_scale: weight of the prompt, for all or one an image; 1 or less turns guidance off. None: the model's
            default, else 7.5. Distilled models (LCM) take it as an input, and need no unconditional pass.
        guidance_rescale: in [0, 1], how much of the contrast that guidance adds is taken back (Lin et al. 2023).
        guidance_interval: (low, high) of sigma / alpha, the noise levels with guidance (Kynkäänniemi et al. 2024).
        pag_scale: weight of perturbed-attention guidance (Ahn et al. 2024), for all or one an image: clearer shapes,
            for half as much time again. Each step compares with the UNet without self-attention in the layers
            `model.options.pag_layers` ("mid" by default). None: the model's default, else 0.
        clip_skip: how many of the text encoder's last layers to skip, beyond those that the model always skips.
        emphasis: whether to read brackets, tags and BREAK in prompts as emphasis and editing by step, such as
            [cat:dog:0.5] and [cat|dog] (jaxdiff/text/schedule.py).
        scheduler: a name in `SCHEDULERS`, or a `Scheduler` of your own, which gets the time grid of "euler"; None: the
            model's own.
        spacing: of the time grid, see `time_grid`; None: the model's own. "ays" takes SDXL's table for SDXL.
        height, width: pixels, multiples of the VAE's factor; None: the model's own size.
        noise: unit Gaussian latents [B, h, w, C] to use instead of those drawn from the seeds; with `hires`, in the
            second stage.
        image: image or images [B, H, W, 3] (uint8, or float in [0, 1]) to start from instead of pure noise; with
            an upscaling model, the small one [B, H / factor, W / factor, 3].
        strength: in (0, 1], the fraction of the steps that redraw an `image` (Meng et al. 2022, SDEdit); None: 0.6, or
            1 with a mask. At 1 the masked area is drawn from noise alone. An LCM (without `mask` and `hires`) takes all
            its steps, over that fraction of the steps of its distillation.
        mask: [H, W] or [B, H, W] (bool, uint8, or float in [0, 1]): white is redrawn; black is kept, up to the
            autoencoder's error. Any model inpaints; those with 9 input channels were trained for it.
        noise_level: of an upscaling model: noise on the small image, in timesteps, 0 to the model's max_noise_level;
            None: 20, or the maximum if that is lower.
        control_images: for each of the model's ControlNets an image [H, W, 3] or images [B, H, W, 3] to follow.
        controlnet_scale: weight of the ControlNets, one for all or one for each.
        hires: draw this many times smaller first, enlarge, then redraw at full size with the fraction `hires_strength`
            of the steps: for large images from models that were trained on small ones. An image, mask and control
            images are resized for the first stage, to which `strength` applies.
        hires_upscale: how the small image is enlarged: "pixel", its pixels (Lanczos); "latent", its latents, which is
            cheaper and blurrier; or "network", its pixels by the network of `with_upscaler`.
        tile: encode and decode in overlapping tiles of this many latents (jaxdiff/models/tiling.py), for images too
            large for the autoencoder to process at once.
        frames: how many predictions of the finished image to return as well, evenly spread over the steps, at most
            `steps`; if fewer steps are taken, one for each.
        devices: devices to divide the batch over; None: those that `params` were put on, as by `replicate` and
            `shard`, else all of this process. If they belong to several processes, each process calls `generate` with
            the same arguments and gets all the images.

    Returns:
        uint8 [B, H, W, 3]; with `frames` = F > 0 also uint8 [B, F, H, W, 3], from first (rough) to last.

    Raises:
        ArgumentError (a ValueError): one sentence naming the argument and what it may be.
        FloatingPointError: an image came out as NaN, for example because float16 overflowed.
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
        pag_scale=pag_scale,
        emphasis=emphasis,
        noise=noise,
        image=image,
        mask=mask,
        noise_level=noise_level,
        control_images=control_images,
        controlnet_scale=controlnet_scale,
    )
    output: Any = draw(model, params, request, devices)
    return output.images if output.frames is None else (output.images, output.frames)
