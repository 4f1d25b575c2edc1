"""What a picture is drawn from beside its prompt: a picture redrawn, inpainted, enlarged. Pure functions, traced."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.inpainting import keeping
from jaxdiff.diffusion.prediction import add_noise, expand
from jaxdiff.diffusion.schedulers import Scheduler, time_at
from jaxdiff.diffusion.schedules import Time, noise_schedule
from jaxdiff.models.model import Conditioning, Model, decode, encode, encode_text
from jaxdiff.models.tiling import decode_tiled, encode_tiled
from jaxdiff.prompts import Tokens
from jaxdiff.typing import Array, Key, Params

LOW_RES_NOISE = 2**31  # folded into a picture's key for the upscaler's noise; steps take small numbers


class Shared(NamedTuple):
    """What all pictures of a call have in common."""

    times: Time  # grid of N + 1 times
    noise_scale: Array  # of the noise at the first of them
    start: Array | None  # int32, the first step taken; None: all are, from noise alone
    small_start: Array | None  # the same of a small picture that is drawn first
    guidance_interval: tuple[Array, Array] | None
    shown: Array | None  # int32 [F], the steps whose predictions are decoded as well


class Inputs(NamedTuple):
    """What each of B pictures is drawn from."""

    tokens: Tokens
    negative: Tokens | None  # None: without guidance
    guidance_scale: Array  # [B]
    guidance_rescale: Array | None  # [B]
    noise: Array  # [B, h, w, C], unit Gaussian
    keys: Key  # [B]
    blend: Array  # [B], in [0, 1]: how far from the prompts to those of a blend
    image: Array | None = None  # [B, H, W, 3] in [0, 1]; for the upscaler [B, h, w, 3]
    mask: Array | None = None  # bool [B, H, W, 1], true where the image is to be redrawn
    noise_level: Array | None = None  # int32 [B], the upscaler's
    control_images: tuple[Array, ...] = ()  # [B, H, W, 3] in [0, 1] for each ControlNet
    controlnet_scale: tuple[Array, ...] = ()  # [B] for each ControlNet
    blend_tokens: Tokens | None = None
    blend_negative: Tokens | None = None
    small_noise: Array | None = None  # [B, h', w', C]: drawn small from it first, then enlarged


class Codec(NamedTuple):
    """The autoencoder with its parameters: images [B, H, W, 3] in [0, 1] <-> scaled latents [B, h, w, C]."""

    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]


def codec(model: Model, params: Params, tile: int | None) -> Codec:
    """In one piece, or in tiles of so many latents that overlap by a quarter."""
    if tile is None:
        return Codec(functools.partial(encode, model, params), functools.partial(decode, model, params))
    overlap = tile // 4
    return Codec(
        lambda images: encode_tiled(model, params, images, tile, overlap),
        lambda latents: decode_tiled(model, params, latents, tile, overlap),
    )


def small_mask(model: Model, mask: Array) -> Array:
    """A mask [B, H, W, 1] at the size of the latents, by the nearest (upper left) pixel as PyTorch's resizing does."""
    factor = model.vae.config.factor
    return mask[:, ::factor, ::factor]


def conditions(model: Model, params: Params, each: Inputs, clip_skip: int) -> tuple[Conditioning, Conditioning | None]:
    """What the UNet is told of the prompts and of the negative ones (None: without guidance)."""

    def encoded(tokens: Tokens | None, other: Tokens | None) -> Conditioning | None:
        if tokens is None:
            return None
        cond = encode_text(model, params, tokens, clip_skip=clip_skip)
        if other is None:
            return cond
        towards = encode_text(model, params, other, clip_skip=clip_skip)
        return jax.tree.map(lambda a, b: a + expand(each.blend, a) * (b - a), cond, towards)

    cond = encoded(each.tokens, each.blend_tokens)
    assert cond is not None
    return cond, encoded(each.negative, each.blend_negative)


def starting_point(
    model: Model,
    vae: Codec,
    shared: Shared,
    each: Inputs,
    start: Array | None,
    drawn: Array | None,
    scheduler: Scheduler,
) -> tuple[Array, Scheduler]:
    """The latents [B, h, w, C] at the first step taken, and what takes the steps.

    Where all steps are taken (`start` is None), noise. Else the image, or what a first stage has `drawn`, with the
    noise of that step; but pure noise where step 0 is the first and a mask says what of the image is to be redrawn.
    Ordinary models keep the rest of it by `keeping`.
    """
    noise = shared.noise_scale * each.noise
    if start is None:
        return noise, scheduler
    clean = drawn
    if each.image is not None:
        image = vae.encode(each.image)
        clean = image if drawn is None else drawn
        if each.mask is not None and not model.inpaints:
            scheduler = keeping(scheduler, image, each.noise, small_mask(model, each.mask))
    assert clean is not None
    x = add_noise(clean, each.noise, time_at(shared.times, scheduler.entry(start)))
    if each.mask is not None and drawn is None:
        x = jnp.where(start == 0, noise, x)
    return x, scheduler


def enlarged(model: Model, vae: Codec, latents: Array, shape: tuple[int, ...], upscale: str) -> Array:
    """Clean latents [B, h', w', C] at another size, [B, h, w, C] = shape: resized as they are, or as a picture."""
    if upscale == "latent":
        return jax.image.resize(latents, shape, "cubic")
    factor = model.vae.config.factor
    size = (shape[0], shape[1] * factor, shape[2] * factor, model.vae.config.out_channels)
    picture = jax.image.resize(vae.decode(latents), size, "lanczos3")
    return vae.encode(jnp.clip(picture, 0.0, 1.0))


def shrunk(model: Model, each: Inputs) -> Inputs:
    """What the small picture of a first stage is drawn from: its own noise, and every picture given at its size."""
    assert each.small_noise is not None
    size = [side * model.vae.config.factor for side in each.small_noise.shape[1:3]]

    def resized(x: Array) -> Array:
        return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "linear")

    return each._replace(
        noise=each.small_noise,
        small_noise=None,
        image=None if each.image is None else resized(each.image),
        mask=None if each.mask is None else resized(each.mask.astype(jnp.float32)) >= 0.5,
        control_images=tuple(resized(x) for x in each.control_images),
    )


@jax.jit
def slerp(a: Array, b: Array, weight: Array) -> Array:
    """From a to b [B, ...] along the great circle between them, weight [B] in [0, 1] of the way (Shoemake 1985).

    Between two draws of unit Gaussian noise it passes through vectors as long as such noise is.
    """
    axes = tuple(range(1, a.ndim))
    norms = jnp.linalg.norm(a.reshape(len(a), -1), axis=-1) * jnp.linalg.norm(b.reshape(len(b), -1), axis=-1)
    angle = jnp.arccos(jnp.clip(jnp.sum(a * b, axes) / norms, -1.0, 1.0))
    near = jnp.sin(angle) < 1e-4  # one direction: the line is the circle
    sine = jnp.where(near, 1.0, jnp.sin(angle))
    parts = (
        jnp.where(near, straight, jnp.sin(straight * angle) / sine).reshape(-1, *[1] * len(axes))
        for straight in (1 - weight, weight)
    )
    first, second = parts
    return first * a + second * b


def extra_channels(model: Model, vae: Codec, each: Inputs) -> Array | None:
    """What the UNet sees beside the latents, [B, h, w, c], if it has channels for more.

    Inpainting models: the mask, and the latents of the picture with grey in the mask (Rombach et al. 2022, section
    4.5). Upscalers: the small picture with the noise of `noise_level` on it.
    """
    if model.inpaints:
        assert each.image is not None
        assert each.mask is not None
        masked = vae.encode(jnp.where(each.mask, 0.5, each.image))
        return jnp.concatenate([small_mask(model, each.mask).astype(masked.dtype), masked], -1)
    if model.family == "upscaler":
        assert each.image is not None
        assert each.noise_level is not None
        noise = low_res_noise(each.keys, each.image.shape[1:])
        schedule = noise_schedule(model.options.low_res_scheduler or model.scheduler)
        alpha, sigma = (jnp.asarray(table)[each.noise_level] for table in schedule)
        return add_noise(2 * each.image - 1, noise, Time(each.noise_level, alpha, sigma))
    return None


def low_res_noise(keys: Key, shape: tuple[int, ...]) -> Array:
    """The unit Gaussian noise [B, *shape] that is put on an upscaler's small pictures."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, LOW_RES_NOISE), shape))(keys)
