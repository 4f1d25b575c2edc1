"""Inputs of the compiled program, and how it redraws, inpaints or enlarges an image. Pure functions, traced."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.base import Scheduler, time_at
from jaxdiff.diffusion.inpainting import masked_blending
from jaxdiff.diffusion.prediction import add_noise, expand
from jaxdiff.diffusion.schedules import Time, noise_schedule
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.model import Model, decode, encode
from jaxdiff.models.text_encoding import encode_text
from jaxdiff.models.tiling import decode_tiled, encode_tiled, tile_starts, tiled
from jaxdiff.text.chunks import Tokens
from jaxdiff.typing import Array, Denoise, Key, Params

UPSCALER_NOISE = 2**31  # folded into an image's key for the upscaler's noise; steps fold in small numbers


class CallInputs(NamedTuple):
    """Inputs that all images of a call share."""

    times: Time  # grid of N + 1 times
    noise_scale: Array  # standard deviation of the noise at the first of them
    start: Array | None  # int32, the first step taken; None: all steps are taken, from pure noise
    lowres_start: Array | None  # the same for the first stage of `hires`
    guidance_interval: tuple[Array, Array] | None
    preview_steps: Array | None  # int32 [F], the steps whose predictions are decoded as well
    lowres_preview_steps: Array | None = None  # the same for the first stage of `hires`


class ImageInputs(NamedTuple):
    """Inputs of each of B images."""

    tokens: Tokens | None  # None if `conditions` are given
    negative: Tokens | None  # None: without guidance
    guidance_scale: Array  # [B]
    guidance_rescale: Array | None  # [B]
    noise: Any  # [B, h, w, C], unit Gaussian; None until it is drawn from the keys
    keys: Key  # [B]
    blend: Array  # [B], in [0, 1]: interpolation from the prompts to the blend prompts
    image: Array | None = None  # [B, H, W, 3] in [0, 1]; for the upscaler [B, h, w, 3]
    mask: Array | None = None  # bool [B, H, W, 1], true where the image is redrawn
    noise_level: Array | None = None  # int32 [B], the upscaler's
    control_images: tuple[Array, ...] = ()  # [B, H, W, 3] in [0, 1] for each ControlNet
    controlnet_scale: tuple[Array, ...] = ()  # [B] for each ControlNet
    blend_tokens: Tokens | None = None
    blend_negative: Tokens | None = None
    lowres_noise: Array | None = None  # [B, h', w', C], of the first stage of `hires`
    # int32 [B, stages, N]: which of T texts each step of each stage attends to; tokens and conditioning are then
    # [B, T, …]. None: all steps attend to one text.
    picks: Array | None = None
    pag_scale: Array | None = None  # [B]; None: without perturbed-attention guidance
    conditions: "tuple[Conditioning, Conditioning | None] | None" = None  # encoded beforehand


class Codec(NamedTuple):
    """The autoencoder with its parameters: images [B, H, W, 3] in [0, 1] <-> scaled latents [B, h, w, C]."""

    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]


def codec(model: Model, params: Params, tile: int | None) -> Codec:
    """The codec of the model's autoencoder, on whole images or on tiles of `tile` latents that overlap by a quarter."""
    if tile is None:
        return Codec(functools.partial(encode, model, params), functools.partial(decode, model, params))
    overlap = tile // 4
    return Codec(
        lambda images: encode_tiled(model, params, images, tile, overlap),
        lambda latents: decode_tiled(model, params, latents, tile, overlap),
    )


def latent_mask(model: Model, mask: Array) -> Array:
    """A mask [B, H, W, 1] at the size of the latents, by the nearest (upper left) pixel as PyTorch's resizing does."""
    factor = model.vae.config.factor
    return mask[:, ::factor, ::factor]


def preview_codec(model: Model, params: Params, vae: Codec) -> Codec:
    """The codec that decodes previews: the tiny autoencoder if the model has one, else `vae`."""
    if model.tiny_vae is None:
        return vae
    return codec(dataclasses.replace(model, vae=model.tiny_vae), {"vae": params["tiny_vae"]}, None)


def decode_frames(vae: Codec, steps: Array) -> Array:
    """Predicted latents [F, B, h, w, C] decoded to images [B, F, H, W, 3] in [0, 1]."""
    frames = vae.decode(steps.reshape(-1, *steps.shape[2:]))
    return jnp.moveaxis(frames.reshape(*steps.shape[:2], *frames.shape[1:]), 0, 1)


def to_uint8(images: Array) -> Array:
    """Images in [0, 1] as uint8."""
    return jnp.round(255 * images).astype(jnp.uint8)


def conditions(
    model: Model, params: Params, inputs: ImageInputs, clip_skip: int
) -> tuple[Conditioning, Conditioning | None]:
    """The conditioning of the prompts and of the negative prompts (None: without guidance)."""
    if inputs.conditions is not None:
        return inputs.conditions

    def encode_tokens(tokens: Tokens) -> Conditioning:
        if inputs.picks is None:
            return encode_text(model, params, tokens, clip_skip=clip_skip)
        shape = tokens.ids.shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tokens)
        cond = encode_text(model, params, flat, clip_skip=clip_skip)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), cond)

    def encode_blended(tokens: Tokens | None, blend_tokens: Tokens | None) -> Conditioning | None:
        if tokens is None:
            return None
        cond = encode_tokens(tokens)
        if blend_tokens is None:
            return cond
        blend_cond = encode_tokens(blend_tokens)
        return jax.tree.map(lambda a, b: a + expand(inputs.blend, a) * (b - a), cond, blend_cond)

    cond = encode_blended(inputs.tokens, inputs.blend_tokens)
    assert cond is not None
    return cond, encode_blended(inputs.negative, inputs.blend_negative)


def text_by_step(
    scheduler: Scheduler,
    picks: Array,
    start: Array | None,
    conds: tuple[Conditioning, Conditioning | None],
    denoise_with: Callable[[Conditioning, Conditioning | None], Denoise],
) -> Scheduler:
    """The scheduler with another text at each step.

    Args:
        picks: int32 [B, N], which of T texts each step attends to, counted from the first step taken.
        start: the first step taken; None: 0.
        conds: conditioning of all texts, [B, T, …].
        denoise_with: conditioning [B, …] -> denoiser.
    """

    def step(_: Denoise, state: Any, times: Time, i: Array, keys: Key) -> Any:
        text_ids = picks[:, i if start is None else i - start]
        step_conds = jax.tree.map(lambda x: x[jnp.arange(len(text_ids)), text_ids], conds)
        return scheduler.step(denoise_with(*step_conds), state, times, i, keys)

    return scheduler._replace(step=step)


def starting_point(
    model: Model,
    vae: Codec,
    call: CallInputs,
    inputs: ImageInputs,
    start: Array | None,
    lowres: Array | None,
    scheduler: Scheduler,
) -> tuple[Array, Scheduler]:
    """The latents [B, h, w, C] at the first step taken, and the scheduler that takes the steps.

    If all steps are taken (`start` is None) the latents are noise. Else they are the image, or the result of the first
    stage, with the noise of that step; with a mask and start = 0, pure noise. A model that was not trained for
    inpainting keeps the unmasked part by `masked_blending`.
    """
    noise = call.noise_scale * inputs.noise
    if start is None:
        return noise, scheduler
    clean = lowres
    if inputs.image is not None:
        image_latents = vae.encode(inputs.image)
        clean = image_latents if lowres is None else lowres
        if inputs.mask is not None and not model.inpaints:
            scheduler = masked_blending(scheduler, image_latents, inputs.noise, latent_mask(model, inputs.mask))
    assert clean is not None
    x = add_noise(clean, inputs.noise, time_at(call.times, scheduler.start_index(start)))
    if inputs.mask is not None and lowres is None:
        x = jnp.where(start == 0, noise, x)
    return x, scheduler


NETWORK_TILE = 256  # pixels along a side of a tile of the upscaler's input; neighbours share 64


def enlarge_with_network(model: Model, params: Params, images: Any, min_height: int) -> Any:
    """Images [B, H, W, 3] in [0, 1] through the upscaler, in tiles, until they are `min_height` high or more."""
    net = model.upscaler
    assert net is not None
    scale, multiple = net.config.scale, net.config.unshuffle

    def apply(x: Array) -> Any:
        return net.apply({"params": params["upscaler"]}, x)

    while images.shape[1] < min_height:
        height, width = images.shape[1:3]
        padding = [(0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0)]
        x: Any = jnp.pad(jnp.clip(images, 0.0, 1.0), padding, "symmetric")
        rows, columns = ([n - n % multiple for n in tile_starts(side, NETWORK_TILE, 64)] for side in x.shape[1:3])
        x = tiled(apply, x, (rows, columns), NETWORK_TILE, lambda i: i * scale)
        images = x[:, : height * scale, : width * scale]
    return images


def upscale_latents(
    model: Model, params: Params, vae: Codec, latents: Array, shape: tuple[int, ...], upscale: str
) -> Array:
    """Clean latents [B, h', w', C] enlarged to `shape` [B, h, w, C], as `upscale` says.

    Args:
        upscale: "latent" resizes the latents; "pixel" resizes the decoded image; "network" enlarges it by the model's
            upscaler first.
    """
    if upscale == "latent":
        return jax.image.resize(latents, shape, "cubic")
    factor = model.vae.config.factor
    size = (shape[0], shape[1] * factor, shape[2] * factor, model.vae.config.out_channels)
    image = vae.decode(latents)
    if upscale == "network":
        image = enlarge_with_network(model, params, image, size[1])
    image = jax.image.resize(image, size, "lanczos3")
    return vae.encode(jnp.clip(image, 0.0, 1.0))


def lowres_inputs(model: Model, inputs: ImageInputs) -> ImageInputs:
    """The inputs of the first stage of `hires`: its own noise, and all images resized to it."""
    assert inputs.lowres_noise is not None
    size = [side * model.vae.config.factor for side in inputs.lowres_noise.shape[1:3]]

    def resize(x: Array) -> Array:
        return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "linear")

    return inputs._replace(
        noise=inputs.lowres_noise,
        lowres_noise=None,
        image=None if inputs.image is None else resize(inputs.image),
        mask=None if inputs.mask is None else resize(inputs.mask.astype(jnp.float32)) >= 0.5,
        control_images=tuple(resize(x) for x in inputs.control_images),
    )


@jax.jit
def slerp(a: Array, b: Array, weight: Array) -> Array:
    """From a to b [B, ...] along the great circle between them, weight [B] in [0, 1] of the way (Shoemake 1985).

    Between two draws of unit Gaussian noise it passes through vectors as long as such noise is.
    """
    axes = tuple(range(1, a.ndim))
    norms = jnp.linalg.norm(a.reshape(len(a), -1), axis=-1) * jnp.linalg.norm(b.reshape(len(b), -1), axis=-1)
    angle = jnp.arccos(jnp.clip(jnp.sum(a * b, axes) / norms, -1.0, 1.0))
    is_parallel = jnp.sin(angle) < 1e-4  # almost parallel: interpolate linearly
    sine = jnp.where(is_parallel, 1.0, jnp.sin(angle))
    parts = (
        jnp.where(is_parallel, fraction, jnp.sin(fraction * angle) / sine).reshape(-1, *[1] * len(axes))
        for fraction in (1 - weight, weight)
    )
    first, second = parts
    return first * a + second * b


def extra_channels(model: Model, vae: Codec, inputs: ImageInputs) -> Array | None:
    """The UNet's input channels besides the latents, [B, h, w, c]; None if it has no others.

    Inpainting models: the mask, and the latents of the image with grey in the mask (Rombach et al. 2022, section
    4.5). Upscalers: the small image with the noise of `noise_level` on it.
    """
    if model.inpaints:
        assert inputs.image is not None
        assert inputs.mask is not None
        masked_latents = vae.encode(jnp.where(inputs.mask, 0.5, inputs.image))
        return jnp.concatenate([latent_mask(model, inputs.mask).astype(masked_latents.dtype), masked_latents], -1)
    if model.family == "upscaler":
        assert inputs.image is not None
        assert inputs.noise_level is not None
        noise = upscaler_noise(inputs.keys, inputs.image.shape[1:])
        schedule = noise_schedule(model.options.low_res_scheduler or model.scheduler)
        alpha, sigma = (jnp.asarray(table)[inputs.noise_level] for table in schedule)
        return add_noise(2 * inputs.image - 1, noise, Time(inputs.noise_level, alpha, sigma))
    return None


def upscaler_noise(keys: Key, shape: tuple[int, ...]) -> Array:
    """The unit Gaussian noise [B, *shape] that is put on an upscaler's small images."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, UPSCALER_NOISE), shape, jnp.float32))(keys)
