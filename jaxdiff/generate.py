"""From prompts to pictures: the pure pieces, and `generate`, which puts them under one compiled program a device."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import parallel
from jaxdiff.denoiser import denoiser
from jaxdiff.diffusion.sampling import sample
from jaxdiff.diffusion.schedulers import get_scheduler
from jaxdiff.diffusion.times import default_scheduler, time_grid
from jaxdiff.models.model import Model, decode, encode, encode_text
from jaxdiff.typing import Array, Key, Params


def tokenize(model: Model, prompts: Sequence[str]) -> np.ndarray:
    """Prompts to token ids int32 [B, L], cut at the text encoder's length with a warning. Host side."""
    assert model.tokenizer is not None
    return model.tokenizer(list(prompts))


class _Plan(NamedTuple):
    """What a compiled sampler depends on: everything here is static, everything else is traced."""

    model: Model
    scheduler: str
    guided: bool
    from_image: bool
    frames: int  # how many predictions along the way are decoded as well


@functools.lru_cache(maxsize=64)
def sampler(plan: _Plan, devices: tuple[jax.Device, ...]) -> parallel.Mapped:
    """The compiled program that draws: (shared arguments…, arguments of each picture…) -> pictures in [0, 1].

    Shared: params, time grid [N + 1], scale of the first noise, first step, steps of the frames [F]. Per picture:
    tokens [B, L], negative tokens [B, L], guidance scale [B], noise [B, h, w, C], keys [B], images [B, H, W, 3] (None
    from text alone).
    """
    model = plan.model

    def draw(params, times, noise_scale, start, moments, tokens, negative, guidance_scale, noise, keys, images):
        cond = encode_text(model, params, tokens)
        uncond = encode_text(model, params, negative) if plan.guided else None
        denoise = denoiser(model, params, cond, uncond, guidance_scale)
        if plan.from_image:
            first = jax.tree.map(lambda a: a[start], times)
            x = first.alpha * encode(model, params, images) + first.sigma * noise
        else:
            x, start = noise_scale * noise, None
        scheduler = get_scheduler(plan.scheduler, model.scheduler)
        if not plan.frames:
            return decode(model, params, sample(denoise, x, times, scheduler, keys, start=start))
        x0, steps = sample(denoise, x, times, scheduler, keys, start=start, trajectory=True)
        chosen = steps[moments]  # [F, B, h, w, C]
        frames = decode(model, params, chosen.reshape(-1, *x0.shape[1:]))
        return decode(model, params, x0), jnp.moveaxis(frames.reshape(*chosen.shape[:2], *frames.shape[1:]), 0, 1)

    return parallel.pmap(draw, devices, shared=5)


def picture_keys(seed: int | Sequence[int], count: int) -> Key:
    """One key a picture: picture i of a call with seed s has key(s + i); a sequence of seeds is taken as it is."""
    seeds = np.arange(count) + seed if isinstance(seed, int | np.integer) else np.asarray(seed)
    return jax.vmap(jax.random.key)(jnp.asarray(seeds % 2**32, jnp.uint32))


@functools.partial(jax.jit, static_argnums=1)
def initial_noise(keys: Key, shape: tuple[int, ...]) -> Array:
    """Unit Gaussian latents [B, *shape] float32, each drawn from its own key only."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


def latent_shape(model: Model, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(h, w, C) of a picture's latents; raises ValueError if the VAE's factor does not divide height or width."""
    unet, factor = model.unet.config, model.vae.config.factor
    sizes = []
    for name, pixels in (("height", height), ("width", width)):
        pixels = unet.sample_size * factor if pixels is None else pixels
        if pixels < factor or pixels % factor:
            raise ValueError(f"{name} {pixels} must be a positive multiple of {factor}, the VAE's factor.")
        sizes.append(pixels // factor)
    return sizes[0], sizes[1], unet.in_channels


def as_batch(name: str, value: str | Sequence[str] | None, count: int) -> list[str]:
    """A text for each picture: one text serves all."""
    values = [value or ""] if value is None or isinstance(value, str) else list(value)
    values = values * count if len(values) == 1 else values
    if len(values) != count:
        raise ValueError(f"{len(values)} {name} for {count} prompts: give one, or one a prompt.")
    return values


def as_images(image: Array, count: int, shape: tuple[int, int]) -> Array:
    """One picture or a batch, uint8 or float in [0, 1], as float32 [B, H, W, 3] of the size drawn."""
    image = np.asarray(image)
    image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
    image = np.broadcast_to(image, (count, *image.shape[-3:]))
    if image.shape[1:] != (*shape, 3):
        raise ValueError(f"image has shape {list(image.shape[1:])}, drawn are {[*shape, 3]}: resize it first.")
    return image


def generate(
    model: Model,
    params: Params,
    prompts: str | Sequence[str],
    negative_prompts: str | Sequence[str] | None = None,
    *,
    seed: int | Sequence[int] = 0,
    steps: int = 25,
    guidance_scale: float | Sequence[float] = 7.5,
    scheduler: str | None = None,
    spacing: str | None = None,
    height: int | None = None,
    width: int | None = None,
    noise: Array | None = None,
    image: Array | None = None,
    strength: float = 0.6,
    frames: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Draw one picture a prompt.

    Compiled once for each batch size, picture size, type, scheduler and number of steps; prompts, seeds, noise,
    guidance scale, spacing and strength are traced.

    Args:
        prompts: B prompts.
        negative_prompts: what to steer away from: none, one for all, or one a prompt.
        seed: picture i is drawn from key(seed + i), alone or in a batch, on one device or many (the batch a device
            draws changes the order of sums, so that a pixel may differ by one grey level); or a seed a picture.
        steps: length of the time grid.
        guidance_scale: weight of the prompt, for all or one a picture; 1 or less turns guidance off.
        scheduler: a name of `SCHEDULERS`; None takes what the model's scheduler_config.json says.
        spacing: of the time grid: "leading", "trailing", "linspace" or "karras"; None takes what the config says.
        height, width: pixels, multiples of the VAE's factor; None takes the model's own size.
        noise: unit Gaussian latents [B, h, w, C] to start from instead of those drawn from the seeds.
        image: picture or pictures [B, H, W, 3] (uint8, or float in [0, 1]) to start from instead of pure noise.
        strength: in (0, 1], the part of the steps that an `image` goes through (Meng et al. 2022, SDEdit).
        frames: how many predictions of the finished picture along the way are returned as well.
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
    if noise is not None:
        noise = np.asarray(noise, np.float32)
        factor = model.vae.config.factor
        height, width = height or noise.shape[1] * factor, width or noise.shape[2] * factor
    count, shape = len(prompts), latent_shape(model, height, width)
    if noise is not None and noise.shape != (count, *shape):
        raise ValueError(f"noise has shape {list(noise.shape)}, drawn from are {[count, *shape]}.")
    negative = as_batch("negative_prompts", negative_prompts, count)
    scales = np.broadcast_to(np.asarray(guidance_scale, np.float32), (count,))
    scheduler = default_scheduler(model.scheduler) if scheduler is None else scheduler
    times, noise_scale = time_grid(model.scheduler, steps, scheduler, spacing)
    start = 0
    if image is not None:
        start = steps - min(int(steps * strength), steps)
        if not 0 < strength <= 1 or start == steps:
            raise ValueError(f"strength {strength} must be in (0, 1] and leave at least one of {steps} steps.")
        image = as_images(image, count, (shape[0] * model.vae.config.factor, shape[1] * model.vae.config.factor))
    keys = picture_keys(seed, count)
    noise = initial_noise(keys, shape) if noise is None else noise
    chosen = np.unique(np.linspace(start, steps - 1, frames).round().astype(np.int32))
    plan = _Plan(model, scheduler, bool((scales > 1).any()), image is not None, len(chosen))
    devices = tuple(jax.local_devices() if devices is None else devices)
    each = (tokenize(model, prompts), tokenize(model, negative), scales, noise, keys, image)
    drawn = sampler(plan, devices[:count])(params, times, noise_scale, np.int32(start), chosen, *each)
    return jax.tree.map(lambda x: np.asarray(jnp.round(255 * x).astype(jnp.uint8)), drawn)
