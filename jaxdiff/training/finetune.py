"""Denoisers with inputs besides a prompt: ControlNets, inpainting and upscaling UNets."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config import ConfigError, VAEConfig
from jaxdiff.diffusion.prediction import add_noise
from jaxdiff.diffusion.schedules import Time, at, noise_schedule
from jaxdiff.io import infer_config
from jaxdiff.io.configs import replace_config
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.model import Model, apply, encode
from jaxdiff.training.stages import Network, fold_in_each, per_example, plain_network
from jaxdiff.training.train_step import Batch
from jaxdiff.typing import Array, Key, Params

RECTANGLES = 4  # of a random mask, at most
# Arguments of `jaxdiff.generate` besides prompts, and images uint8 [B, H, W, 3] that show them in a sheet.
SampleInputs = tuple[dict[str, Any], np.ndarray]
FULL_MASK_SHARE = 0.25  # share of masks that cover the whole image, so that plain text-to-image is not forgotten
NOISE_LEVEL = 20  # of the small images in an upscaler's sample sheets


def network_of(model: Model, guidance: float = 1.0) -> Network:
    """The network to train, with its inputs besides the prompt; `guidance` as for `plain_network`."""
    if model.inpaints:
        return inpainting_network(model)
    return upscaler_network(model) if model.family == "upscaler" else plain_network(model, guidance)


# --- ControlNet


def controlled_network(model: Model) -> Network:
    """The UNet steered by the model's only ControlNet (Zhang et al. 2023, equation 5), which sees batch["hint"]."""
    (net,) = model.controlnets

    def network(params: Params, x: Array, time: Time, cond: Conditioning, batch: Batch, keys: Key) -> Array:
        hint = batch["hint"].astype(jnp.float32) / 255.0
        inputs = (x, time.t, cond.embeddings, hint, cond.pooled, cond.time_ids)
        residuals = net.apply({"params": params["controlnet"][0]}, *inputs)
        return apply(model, params, "unet", x, time.t, *cond, None, None, residuals)

    return network


def control_inputs(batch: Mapping[str, Any]) -> SampleInputs:
    """Inputs that draw images following batch["hint"]."""
    height, width = batch["hint"].shape[1:3]
    return {"control_images": [batch["hint"]], "height": height, "width": width}, batch["hint"]


def with_control_images(batch: Mapping[str, Any], make_hint: Callable[[np.ndarray], np.ndarray]) -> Mapping[str, Any]:
    """A batch with "hint" uint8 [b, H, W, 3]: its own, or else `make_hint` of each image."""
    return batch if "hint" in batch else {**batch, "hint": np.stack([make_hint(image) for image in batch["image"]])}


# --- more channels


def with_input_channels(model: Model, params: Params, channels: int) -> tuple[Model, Params]:
    """The model with a UNet of `channels` input channels. New channels have weight 0, which keeps the output.

    Raises:
        ConfigError: the UNet has neither `channels` channels nor those of the latents.
    """
    current, latent_channels = model.unet.config.in_channels, model.vae.config.latent_channels
    if current == channels:
        return model, params
    if current != latent_channels:
        raise ConfigError(
            f"the UNet has {current} input channels: start from one with {latent_channels} or {channels}."
        )
    conv_in = params["unet"]["conv_in"]
    kernel = jnp.pad(conv_in["kernel"], ((0, 0), (0, 0), (0, channels - current), (0, 0)))  # [3, 3, in, out]
    unet = {**params["unet"], "conv_in": {**conv_in, "kernel": kernel}}
    return replace_config(model, "unet", in_channels=channels), {**params, "unet": unet}


# --- inpainting


def inpainting_model(model: Model, params: Params) -> tuple[Model, Params]:
    """The model with a UNet that sees a mask and the masked image's latents; see `with_input_channels`."""
    return with_input_channels(model, params, 2 * model.vae.config.latent_channels + 1)


def random_masks(keys: Key, height: int, width: int) -> Array:
    """Masks of what to redraw, bool [B, height, width, 1]: a few rectangles, or everything for FULL_MASK_SHARE."""
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]

    def random_mask(key: Key) -> Array:
        key_corners, key_count, key_whole = jax.random.split(key, 3)
        corners = jnp.sort(
            jax.random.uniform(key_corners, (RECTANGLES, 2, 2), jnp.float32), axis=1
        )  # [n, (from, to), (y, x)]
        (top, left), (bottom, right) = ((corners[:, i] * jnp.array([height, width])).T[..., None, None] for i in (0, 1))
        inside = (rows >= jnp.floor(top)) & (rows <= bottom) & (columns >= jnp.floor(left)) & (columns <= right)
        is_used = jnp.arange(RECTANGLES) < jax.random.randint(key_count, (), 1, RECTANGLES + 1, jnp.int32)
        mask = (inside & is_used[:, None, None]).any(0)
        return (mask | (jax.random.uniform(key_whole, (), jnp.float32) < FULL_MASK_SHARE))[..., None]

    return jax.vmap(random_mask)(keys)


def inpainting_network(model: Model) -> Network:
    """The UNet that sees a random mask and the masked image (Rombach et al. 2022, section 4.5).

    As in `jaxdiff.generate`: the mask is resized to the latents' size by the nearest pixel, and the image is encoded
    with grey in the mask. Batches hold "image".
    """
    factor = model.vae.config.factor

    def network(params: Params, x: Array, time: Time, cond: Conditioning, batch: Batch, keys: Key) -> Array:
        images = batch["image"].astype(jnp.float32) / 255.0
        mask = random_masks(keys, *images.shape[1:3])
        masked = jax.lax.stop_gradient(encode(model, params, jnp.where(mask, 0.5, images)))
        small = mask[:, ::factor, ::factor].astype(masked.dtype)
        return apply(model, params, "unet", jnp.concatenate([x, small, masked], -1), time.t, *cond)

    return network


def inpainting_inputs(batch: Mapping[str, Any]) -> SampleInputs:
    """Inputs that redraw the middle of the images, half of each side."""
    images = batch["image"]
    height, width = images.shape[1:3]
    mask = np.zeros((height, width), bool)
    mask[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    preview = np.where(mask[..., None], np.uint8(127), images)
    return {"image": images, "mask": mask, "height": height, "width": width}, preview


# --- upscaling


def with_scaling_factor(model: Model, params: Params, scale: float) -> tuple[Model, Params]:
    """The model with another scaling_factor and an autoencoder that compensates: scaled latents do not change.

    The quotient is absorbed by the convolutions next to the latents. An autoencoder without them is left unchanged.
    """
    config = model.vae.config
    if config.scaling_factor == scale or not isinstance(config, VAEConfig):
        return model, params
    if config.shift_factor or not (config.use_quant_conv and config.use_post_quant_conv):
        return model, params
    quotient, channels = config.scaling_factor / scale, config.latent_channels
    quant, post = params["vae"]["quant_conv"], params["vae"]["post_quant_conv"]
    factors = jnp.repeat(jnp.asarray([quotient, 1.0]), channels)  # of means and of log-variances
    quant = {
        "kernel": quant["kernel"] * factors,
        "bias": quant["bias"] * factors + jnp.repeat(jnp.asarray([0.0, 2 * np.log(quotient)]), channels),
    }
    vae = {**params["vae"], "quant_conv": quant, "post_quant_conv": {**post, "kernel": post["kernel"] / quotient}}
    return replace_config(model, "vae", scaling_factor=scale), {**params, "vae": vae}


def upscaler_model(model: Model, params: Params) -> tuple[Model, Params]:
    """The model with a UNet that sees a small image and its noise level; see `with_input_channels`.

    Latents are scaled as in the published x4 upscaler, since PyTorch's pipeline hard-codes that factor.
    """
    model, params = with_scaling_factor(model, params, infer_config.SCALING["upscaler"])
    model, params = with_input_channels(model, params, model.vae.config.latent_channels + 3)
    if model.options.low_res_scheduler is None:
        low_res_scheduler = infer_config.pipeline_options("upscaler").low_res_scheduler
        options = dataclasses.replace(model.options, low_res_scheduler=low_res_scheduler)
        model = dataclasses.replace(model, options=options)
    if model.unet.config.num_class_embeds is None:
        levels = model.options.max_noise_level + 1
        table = jnp.zeros((levels, 4 * model.unet.config.block_out_channels[0]), jnp.float32)
        model = replace_config(model, "unet", num_class_embeds=levels)
        params = {**params, "unet": {**params["unet"], "class_embedding": {"embedding": table}}}
    return model, params


def upscaler_inputs(model: Model, batch: Mapping[str, Any]) -> SampleInputs:
    """Inputs that enlarge copies of the images at the size of the latents."""
    images, factor = batch["image"], model.vae.config.factor
    size = (len(images), images.shape[1] // factor, images.shape[2] // factor, 3)
    small = np.asarray(jnp.clip(jax.image.resize(images.astype(np.float32), size, "cubic"), 0, 255)).round()
    small = small.astype(np.uint8)
    level = min(NOISE_LEVEL, model.options.max_noise_level)
    return {"image": small, "noise_level": level}, small.repeat(factor, 1).repeat(factor, 2)


def upscaler_network(model: Model) -> Network:
    """The UNet that sees the image at the size of the latents with random noise, and the level of that noise.

    (Conditioning augmentation: Ho et al. 2022, Cascaded Diffusion Models, section 4.) Batches hold "image".
    """
    assert model.options.low_res_scheduler is not None
    schedule = noise_schedule(model.options.low_res_scheduler)

    def network(params: Params, x: Array, time: Time, cond: Conditioning, batch: Batch, keys: Key) -> Array:
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        small = jax.image.resize(images, (*x.shape[:3], 3), "cubic")  # antialiased
        max_level = model.options.max_noise_level
        level = jax.vmap(lambda key: jax.random.randint(key, (), 0, max_level + 1, jnp.int32))(fold_in_each(keys, 1))
        noised = add_noise(small, per_example(jax.random.normal, keys, small.shape[1:]), at(schedule, level))
        return apply(model, params, "unet", jnp.concatenate([x, noised], -1), time.t, *cond, level)

    return network
