"""Checks and conversions of single arguments: to numpy arrays with a row for each image.

Each function raises ArgumentError, one sentence that begins with the argument's name.
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdiff import parallel
from jaxdiff.config import TinyVAEConfig, VAEConfig
from jaxdiff.errors import ArgumentError, say_once
from jaxdiff.models.controlnet import check_fits
from jaxdiff.models.dit import PATCH
from jaxdiff.models.model import Model
from jaxdiff.typing import Array, Params

DEFAULT_NOISE_LEVEL = 20  # of an upscaling model's small image, in timesteps


def as_integer(name: str, value: int, low: int, high: int | None = None) -> int:
    """`value` as an int, checked to be a whole number from `low` to `high`."""
    try:
        integer = operator.index(value)
    except TypeError:
        integer = low - 1
    if integer < low or (high is not None and integer > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ArgumentError(name, f"{value} must be a whole number {allowed}.")
    return integer


def vae_channels(config: VAEConfig | TinyVAEConfig) -> int:
    """The smallest number of features that an autoencoder has at each pixel."""
    return min(config.decoder_block_out_channels if isinstance(config, TinyVAEConfig) else config.block_out_channels)


def min_memory(model: Model, height: int, width: int, tile: int | None) -> float:
    """A lower bound on the bytes of memory that drawing one image takes.

    It counts the image, and the largest features of the UNet or of the autoencoder, whichever are larger.

    Args:
        height, width: pixels.
        tile: None decodes the whole image at once; else the autoencoder's features are not counted.
    """
    vae, network, config = model.vae, model.denoising, model.vae.config
    features = vae_channels(config) * np.dtype(vae.dtype).itemsize if tile is None else 0
    channels = network.config.block_out_channels[0] if model.unet is not None else network.config.width / PATCH**2
    latent_bytes = channels * np.dtype(network.dtype).itemsize / config.factor**2
    return height * width * (max(features, latent_bytes) + 15)  # 3 bytes, of 3 floats


def check_memory(model: Model, height: int, width: int, tile: int | None, count: int = 1) -> None:
    """Raise ArgumentError if `count` images at once cannot fit into a device's memory."""
    needed = count * min_memory(model, height, width, tile)
    if needed < 2**30 or needed <= (available := parallel.device_memory()):
        return
    requirement = f"take at least {needed / 2**30:,.1f} GiB of memory, and a device has {available / 2**30:,.1f}"
    if count == 1:
        raise ArgumentError("height", f"{height} and width {width} {requirement}: draw a smaller image.")
    raise ArgumentError("batch_size", f"is too large: {count} images a device {requirement}.")


def check_clip_skip(model: Model, clip_skip: int) -> int:
    """`clip_skip`, checked to leave at least one layer of each text encoder."""
    if model.transformer is not None and model.family != "sd3":
        if clip_skip:
            raise ArgumentError("clip_skip", f"{clip_skip} is for Stable Diffusion: leave it out.")
        return 0
    sdxl = model.text_encoder_2 is not None
    encoders = [encoder for encoder in (model.text_encoder, model.text_encoder_2) if encoder is not None]
    max_skip = min(encoder.config.num_hidden_layers for encoder in encoders) - sdxl
    if as_integer("clip_skip", clip_skip, 0) > max_skip:
        raise ArgumentError("clip_skip", f"{clip_skip} must be 0 to {max_skip}: the text encoder has no more layers.")
    return clip_skip


def as_prompts(prompts: str | Sequence[str]) -> list[str]:
    """One or more prompts as a list of at least one."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ArgumentError("prompts", "is empty: give at least one.")
    return prompts


def as_devices(
    devices: Sequence[jax.Device] | None, count: int, params: Params
) -> tuple[jax.Device, ...] | jax.sharding.Mesh:
    """The devices, or the mesh, to draw `count` images on.

    That is where `params` were put, if they were; else `devices`, or all of this process, but no more than images.
    """
    placed = parallel.committed(params)
    if devices is not None and not len(devices):
        raise ArgumentError("devices", "is empty: give at least one, or None for all of this process.")
    if placed:
        param_devices = set(placed.devices.flat) if isinstance(placed, jax.sharding.Mesh) else set(placed)
        if devices is not None and set(devices) != param_devices:
            raise ArgumentError(
                "devices", f"differ from the {len(param_devices)} that params were put on: leave out devices."
            )
        return placed
    selected = tuple(jax.local_devices() if devices is None else devices)
    # A mesh of several processes is used whole: each of them must take part.
    return selected if parallel.data_mesh(selected).is_multi_process else selected[:count]


def as_batch(name: str, value: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """One text for each of `count` images; a single text is repeated."""
    values = [value] if value is None or isinstance(value, str) else list(value)
    values = values * count if len(values) == 1 else values
    if len(values) != count:
        raise ArgumentError(name, f"holds {len(values)} texts for {count} prompts: give one, or one a prompt.")
    return values


def as_numbers(
    name: str, value: float | Sequence[float], count: int, low: float = -np.inf, high: float = np.inf, dtype=np.float32
) -> np.ndarray:
    """One number from low to high for each image, [B] of `dtype`; a single number is repeated."""
    is_integer = np.issubdtype(dtype, np.integer)
    numbers = np.asarray(value, np.float64 if is_integer else dtype)
    if numbers.shape not in ((), (count,)):
        raise ArgumentError(name, f"has shape {list(numbers.shape)} for {count} prompts: give one, or one a prompt.")
    if not np.isfinite(numbers).all():
        raise ArgumentError(name, f"{value} must be finite.")
    if not ((numbers >= low) & (numbers <= high)).all():
        raise ArgumentError(name, f"{value} must be from {low} to {high}.")
    if is_integer and (numbers % 1).any():
        raise ArgumentError(name, f"{value} must be a whole number.")
    return np.broadcast_to(numbers.astype(dtype), (count,))


def as_images(name: str, image: Array, count: int, shape: tuple[int, int]) -> np.ndarray:
    """One image or a batch, uint8 or float in [0, 1], as float32 [B, H, W, 3] of the size drawn."""
    image = np.asarray(image)
    if image.ndim not in (3, 4) or image.shape[-3:] != (*shape, 3):
        raise ArgumentError(
            name,
            f"has shape {list(image.shape)[-3:]}, but the output is {[*shape, 3]}: resize it to height "
            f"{shape[0]} and width {shape[1]} in RGB, or give the height and width that fit it.",
        )
    if image.ndim == 4 and len(image) not in (1, count):
        raise ArgumentError(name, f"holds {len(image)} images for {count} prompts: give one, or one a prompt.")
    values = image.astype(np.float32) / 255 if image.dtype == np.uint8 else as_unit_range(name, image)
    return np.broadcast_to(values, (count, *image.shape[-3:]))


def as_unit_range(name: str, values: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1] as float32; resampling may overshoot the range by 1e-3."""
    if not (values.min() >= -1e-3 and values.max() <= 1 + 1e-3):  # also true of NaN
        kind, low, high = values.dtype, values.min(), values.max()
        raise ArgumentError(
            name, f"is {kind} from {low:g} to {high:g}: give uint8 from 0 to 255, or numbers from 0 to 1."
        )
    return values.astype(np.float32, copy=False)


def as_mask(mask: Array, count: int, shape: tuple[int, int]) -> np.ndarray:
    """One mask [H, W] or a batch [B, H, W], bool, uint8 or float in [0, 1], as bool [B, H, W, 1]: white is redrawn."""
    mask = np.asarray(mask)
    if mask.ndim not in (2, 3) or mask.shape[-2:] != shape:
        raise ArgumentError(
            "mask", f"has shape {list(mask.shape)[-2:]}, the image {list(shape)}: make them of one size."
        )
    if mask.ndim == 3 and len(mask) not in (1, count):
        raise ArgumentError("mask", f"holds {len(mask)} masks for {count} prompts: give one, or one a prompt.")
    if mask.dtype == np.uint8:
        if mask.max() == 1:
            raise ArgumentError("mask", "is uint8 and nowhere above 1: white is 255; or give it as bool.")
        mask = mask >= 128
    elif mask.dtype != bool:
        mask = as_unit_range("mask", mask) >= 0.5
    if not mask.any():
        say_once("The mask is nowhere white: nothing of the image is redrawn.")
    return np.broadcast_to(mask, (count, *shape))[..., None]


def as_noise(noise: Array, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Noise [B, h, w, C] as float32, checked to have this shape and to be finite."""
    noise = np.asarray(noise, np.float32)
    if noise.shape != (count, *shape):
        raise ArgumentError("noise", f"has shape {list(noise.shape)}, but must have {[count, *shape]}.")
    if not np.isfinite(noise).all():
        raise ArgumentError("noise", "must be finite: draw it again.")
    return noise


def as_interval(interval: tuple[float, float] | None) -> tuple[np.ndarray, np.ndarray] | None:
    """(low, high) as two float32 numbers, 0 <= low < high; numpy values, so that they are traced under `jit`."""
    if interval is None:
        return None
    values = np.asarray(interval, np.float32)
    if values.shape != (2,) or not 0 <= values[0] < values[1]:
        raise ArgumentError(
            "guidance_interval", f"{interval} must be two noise levels, the lower one first and at least 0."
        )
    return values[0], values[1]


def as_controls(
    model: Model,
    control_images: Array | Sequence[Array],
    scale: float | Sequence[float],
    count: int,
    size: tuple[int, int],
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """For each of the model's ControlNets, its images [B, H, W, 3] and its scales [B]; both empty if none are given."""
    several = isinstance(control_images, list | tuple)
    images: list[Array] = list(control_images) if several else [np.asarray(control_images)]
    controlnets = model.controlnets
    if not images:
        return (), ()
    if not controlnets:
        raise ArgumentError("control_images", "are for ControlNets, and this model has none: add one.")
    if len(images) != len(controlnets):
        raise ArgumentError(
            "control_images", f"are {len(images)} for {len(controlnets)} ControlNets: give one for each."
        )
    for controlnet in controlnets:
        check_fits(controlnet.config, model.unet.config)
    scales = np.asarray(scale, np.float32)
    if scales.shape not in ((), (len(controlnets),)):
        raise ArgumentError(
            "controlnet_scale", f"{scale} must be one number, or one for each of {len(controlnets)} ControlNets."
        )
    if not np.isfinite(scales).all():
        raise ArgumentError("controlnet_scale", f"{scale} must be finite.")
    per_image = np.repeat(np.broadcast_to(scales, (len(controlnets),))[:, None], count, 1)
    return tuple(as_images("control_images", image, count, size) for image in images), tuple(per_image)


def max_noise_level(model: Model) -> int:
    """The highest noise_level of an upscaling model."""
    classes = model.unet.config.num_class_embeds
    assert classes is not None
    return min(model.options.max_noise_level, classes - 1)


def as_noise_level(model: Model, value: int | Sequence[int] | None, count: int) -> np.ndarray | None:
    """The noise on an upscaling model's small images, int32 [B]; None for other models."""
    if model.family != "upscaler":
        if value is not None:
            raise ArgumentError("noise_level", "is for upscaling models, which this one is not: leave it out.")
        return None
    highest = max_noise_level(model)
    return as_numbers(
        "noise_level", min(DEFAULT_NOISE_LEVEL, highest) if value is None else value, count, 0, highest, np.int32
    )


STEPWISE = "is for models that remove noise step by step, and this one draws at once"
REDRAWN = "is for models that redraw images, and this one draws from text alone"
UNGUIDED = "is for guidance, which this model does not use"
GAN_UNSUPPORTED = {  # argument -> why a GAN cannot use it
    "steps": STEPWISE,
    "scheduler": STEPWISE,
    "spacing": STEPWISE,
    "frames": STEPWISE,
    "hires": STEPWISE,
    "guidance_scale": UNGUIDED,
    "guidance_interval": UNGUIDED,
    "guidance_rescale": UNGUIDED,
    "negative_prompts": UNGUIDED,
    "blend_negative_prompts": UNGUIDED,
    "image": REDRAWN,
    "mask": REDRAWN,
    "strength": REDRAWN,
}


def check_gan(model: Model, **arguments: Any) -> None:
    """Raise ArgumentError if a GAN is given an argument that it cannot use. Other models pass."""
    unsupported = [name for name, value in arguments.items() if value is not None and name in GAN_UNSUPPORTED]
    if model.is_gan and unsupported:
        raise ArgumentError(unsupported[0], f"{GAN_UNSUPPORTED[unsupported[0]]}: leave it out.")


def check_gan_size(model: Model, latents: tuple[int, int, int]) -> None:
    """Raise ArgumentError if a GAN is asked for another size than it was trained on."""
    trained_size = model.sample_size
    for name, side in zip(("height", "width"), latents, strict=False):
        if model.is_gan and side != trained_size:
            pixels = [n * model.vae.config.factor for n in (side, trained_size)]
            raise ArgumentError(name, f"{pixels[0]} must be {pixels[1]}, the only size that this model draws.")


def check_task(model: Model, image: Array | None, mask: Array | None, hires: float | None, hires_upscale: str) -> None:
    """Raise ArgumentError if the images given do not fit the model's task: inpainting, upscaling or neither."""
    if mask is not None and image is None:
        raise ArgumentError("mask", "needs the image that it is laid over: give image as well.")
    if model.inpaints and mask is None:
        raise ArgumentError("mask", "is missing: this model is for inpainting: give image and mask (white is redrawn).")
    if model.family == "upscaler" and mask is not None:
        raise ArgumentError("mask", "is for images that are redrawn; this model enlarges them: leave it out.")
    if model.family == "upscaler" and image is None:
        raise ArgumentError("image", "is missing: this model is for upscaling: give the small image as image.")
    if hires is not None and model.family == "upscaler":
        raise ArgumentError("hires", "is not for models that upscale: leave it out.")
    if hires_upscale not in ("pixel", "latent", "network"):
        raise ArgumentError("hires_upscale", f"{hires_upscale!r} is unknown; known are pixel, latent and network.")
    if hires is not None and hires_upscale == "network" and (model.upscaler is None or model.upscaler.config.scale < 2):
        raise ArgumentError("hires_upscale", "network needs a model with an upscaler that enlarges: see with_upscaler.")
