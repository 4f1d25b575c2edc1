"""Checks of settings before any data or weights are read. They raise OptionsError."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jaxdiff import parallel
from jaxdiff.config import SchedulerConfig
from jaxdiff.config.networks import FIXED_UNET, FIXED_VAE
from jaxdiff.io.configs import FRESH
from jaxdiff.models.model import Model
from jaxdiff.sampling.checks import vae_channels
from jaxdiff.training.defaults import OPEN, RULES, flat
from jaxdiff.training.losses import SCALES
from jaxdiff.training.options import DISTILLED, STAGES, OptionsError, check_pairs
from jaxdiff.training.ranges import check_value, suggest

IGNORED_KEYS = {*FIXED_UNET, *FIXED_VAE, "architectures", "model_type"}  # of config.json: not fields of the config
AUTOENCODERS = ("vae", "vae_decoder")  # stages that train an autoencoder
PIXEL_STAGES = ("clip", *AUTOENCODERS, "super_resolution")  # stages that read images themselves
# The stages that do not read a setting.
NOT_READ_BY = {
    "crop": tuple(stage for stage in STAGES if stage not in (*AUTOENCODERS, "super_resolution")),
    "cache_latents": PIXEL_STAGES,
    "latents.path": PIXEL_STAGES,
    "prior_preservation.path": (*PIXEL_STAGES, "gan"),
    "data.buckets": ("gan",),  # whose generator has one size
    "feature_weight": tuple(stage for stage in STAGES if stage != "vae_decoder"),
    "redraw.strength": tuple(stage for stage in STAGES if stage != "vae_decoder"),
    "adversary.init_from": tuple(stage for stage in STAGES if stage != "vae_decoder"),
    "super_resolution.photographs": tuple(stage for stage in STAGES if stage != "super_resolution"),
    "init_from.upscaler": tuple(stage for stage in STAGES if stage != "super_resolution"),
    "eval.prompts": ("super_resolution",),
    "prediction_type": (*DISTILLED, "gan"),  # distillation uses the teacher's, a GAN has none
    "zero_terminal_snr": (*DISTILLED, "gan"),
    "min_snr_gamma": (*DISTILLED, "gan"),
    "input_perturbation": (*DISTILLED, "gan"),
    "offset_noise": ("gan",),
    "distillation.guidance_dim": tuple(stage for stage in STAGES if stage not in ("lcm", "scm")),
}
# Settings that exclude each other.
EXCLUSIVE = {
    "latents.path": ("cache_latents", "prior_preservation.path"),
    "cache_latents": ("prior_preservation.path",),
    "redraw.strength": ("crop",),
    "data.buckets": ("prior_preservation.path", "crop", "super_resolution.photographs"),
}
# (lower, upper): a lower bound may not exceed its upper bound, unless that is 0.
ORDERED = (("controlnet.canny_low", "controlnet.canny_high"), ("data.filter.min_caption", "data.filter.max_caption"),
           ("distillation.guidance_min", "distillation.guidance_max"))  # fmt: skip


def check_settings(config: Any) -> None:
    """Check names, types and ranges of settings, those that the stage does not read, and those that conflict."""
    check_names(config)
    for name, field in RULES.items():
        if isinstance(field, dataclasses.Field):
            check_value(name, config[name], field)
    check_pairs(config.lr_multipliers)
    _check_networks(config.model)
    unread = [name for name, stages in NOT_READ_BY.items() if config[name] and config.stage in stages]
    if unread:
        values = ", ".join(f"{name}={config[name]}" for name in unread)
        raise OptionsError(f"{values}: the stage {config.stage} does not read this; leave it out.")
    for name, others in EXCLUSIVE.items():
        other = next((other for other in others if config[other]), None)
        if config[name] and other:
            raise OptionsError(f"{name}={config[name]} does not go with {other}={config[other]}: leave out one.")
    if config.batch_size < 2 and config.prior_preservation.path:
        raise OptionsError("batch_size must be 2 or more, for the class images of prior_preservation.path.")
    for low, high in ORDERED:
        if config[low] > config[high] > 0:
            raise OptionsError(f"{low} {config[low]} must be at most {high}, {config[high]}.")
    if config.stage == "textual_inversion" and not (
        config.textual_inversion.token and config.textual_inversion.initial
    ):
        raise OptionsError("textual_inversion needs a token, the new word, and initial, the words that it starts from.")


def too_long(config: Any) -> list[str]:
    """Warnings about what a stage phases in over more steps than the run has, one sentence each."""
    phases = {
        "scm": ("distillation.tangent_warmup", "the student's derivative never counts in full"),
        "vae_decoder": ("adversary.start", "the discriminator never reaches the decoder"),
    }
    name, what = phases.get(config.stage, ("", ""))
    if not name or not config[name] or config[name] < config.steps:
        return []
    return [
        f"config.{name} {config[name]} is not below config.steps {config.steps}: {what}. Lower it, or train longer."
    ]


def check_names(config: Any) -> None:
    """Raise OptionsError for unknown settings, such as misspelt ones, and for missing ones."""
    settings = flat(config.to_dict())
    open_prefixes = tuple(f"{name}." for name in OPEN)
    for name, value in settings.items():
        if name not in RULES and not name.startswith(open_prefixes):
            raise OptionsError(f"{name} is no setting: {suggest(name, list(RULES))}")
        if name not in RULES and name.startswith("data.filter.") and not isinstance(value, tuple | list):
            raise OptionsError(f"{name} {value!r} must be a tuple of the values that the column may have.")
    for name in RULES:
        if name not in settings and name not in OPEN:
            raise OptionsError(f"{name} is missing: begin the config with jaxdiff.training.defaults.base().")


def _check_networks(sizes: Any) -> None:
    """Raise OptionsError for unknown names and invalid numbers among the sizes of fresh networks."""
    for part, values in sizes.items():
        known: dict[str, Any] = {"scheduler": SchedulerConfig, **FRESH}
        if part not in known:
            raise OptionsError(f"model.{part} is no part of a model: {suggest(part, list(known))}")
        if part == "scheduler":  # whose files have many more names
            continue
        defaults = {field.name: field.default for field in dataclasses.fields(known[part])}
        for name, value in values.items():
            full_name = f"model.{part}.{name}"
            if name not in defaults and name not in IGNORED_KEYS and not name.startswith("_"):
                names = [f"model.{part}.{field}" for field in defaults]
                raise OptionsError(f"{full_name} is no setting: {suggest(full_name, names)}")
            is_number = isinstance(defaults.get(name), int | float)
            for x in value if isinstance(value, tuple | list) else (value,):
                if (is_number and isinstance(x, str)) or (isinstance(x, int | float) and not 0 <= x < math.inf):
                    raise OptionsError(f"{full_name} {value!r} must be a number, at least 0 and finite.")


def check_sizes(config: Any, model: Model) -> None:
    """Raise OptionsError for image sizes that the autoencoder, or its loss at several scales, cannot take."""
    if config.stage == "clip" or config.latents.path:  # any size is valid, or it was checked by --precompute
        return
    crop, buckets = config.crop, config.data.buckets
    factor = model.vae.config.factor if config.stage in AUTOENCODERS else model.multiple
    side = image_size(config, model)
    step = smallest = factor
    origin = "the autoencoder's factor" if model.transformer is None else "that of the autoencoder and of patches"
    reason = f"{factor}, {origin}"
    if config.stage in AUTOENCODERS:
        step, smallest = max(factor, 2 ** (SCALES - 1)), max(factor, 2**SCALES)
        reason = f"{step}, for the autoencoder's factor {factor} and the loss's {SCALES} scales"
    if config.stage == "vae_decoder":
        smallest = max(smallest, 3 * 2**config.adversary.layers)  # for one score of the discriminator's last layer
    # With crops or buckets, only evaluation sees the full size; it is not cropped and has no loss.
    divisor = factor if crop or buckets else step
    if side < smallest or side % divisor:
        multiple = reason if divisor == step else factor
        raise OptionsError(f"data.image_size {side} must be at least {smallest}, and a multiple of {multiple}.")
    if crop and (crop % step or not smallest <= crop <= side):
        raise OptionsError(
            f"crop {crop} must be from {smallest} to {side - side % step}, and a multiple of {reason}; or 0 for "
            "whole images."
        )
    if buckets % step:
        raise OptionsError(f"data.buckets {buckets} must be a multiple of {reason}; or 0 for squares.")


def check_memory(config: Any, model: Model, devices: int) -> None:
    """Images that cannot fit into a device's memory, by the largest features of the autoencoder alone."""
    if config.stage == "clip" or config.latents.path or config.cache_latents:
        return
    count = max(1, config.batch_size // (devices * config.accumulate))
    side = config.crop or image_size(config, model)
    features = vae_channels(model.vae.config) * jnp.dtype(config.dtype).itemsize
    needed = count * side**2 * (features + 15)  # 3 bytes, of 3 floats
    if needed > max(2**30, there := parallel.device_memory()):
        raise OptionsError(
            f"data.image_size {side}: {count} images a device take at least {needed / 2**30:,.1f} GiB of memory, and a "
            f"device has {there / 2**30:,.1f}: lower it or batch_size, or raise accumulate."
        )


def image_size(config: Any, model: Model) -> int:
    """The side of the training images in pixels."""
    size = model.sample_size
    return config.data.image_size or (size if isinstance(size, int) else min(size)) * model.vae.config.factor
