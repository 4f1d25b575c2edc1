"""Settings that cannot be right, found before data or weights are read. Raises OptionsError."""

from typing import Any

from jaxdiff.models.model import Model
from jaxdiff.training.losses import SCALES
from jaxdiff.training.options import OptionsError

STAGES = ("clip", "vae", "unet", "lora", "textual_inversion", "controlnet", "inpainting", "upscaler")
# Settings that only some stages read.
READ_BY_ALL_BUT = {
    "crop": tuple(stage for stage in STAGES if stage != "vae"),
    "cache_latents": ("clip", "vae"),
    "latents.path": ("clip", "vae"),
    "prior_preservation.path": ("clip", "vae"),
}


def check_settings(config: Any) -> None:
    """Settings by themselves: the stage, what it does not read, and numbers out of range."""
    if config.stage not in STAGES:
        raise OptionsError(f"stage {config.stage!r} must be one of {', '.join(STAGES)}.")
    unread = [name for name, stages in READ_BY_ALL_BUT.items() if config[name] and config.stage in stages]
    if unread:
        given = ", ".join(f"{name}={config[name]}" for name in unread)
        raise OptionsError(f"{given}: the stage {config.stage} does not read this; leave it out.")
    if config.eval.pictures < 0:
        raise OptionsError(f"eval.pictures {config.eval.pictures} must be 0, for none, or more.")


def check_sizes(config: Any, model: Model) -> None:
    """Sizes of images that the autoencoder, or its loss at several scales, cannot take."""
    if config.stage == "clip" or config.latents.path:  # any size will do, or was settled when they were written
        return
    factor, crop, buckets = model.vae.config.factor, config.crop, config.data.buckets
    side = image_size(config, model)
    step = least = factor
    reason = f"{factor}, the autoencoder's factor"
    if config.stage == "vae":
        step, least = max(factor, 2 ** (SCALES - 1)), max(factor, 2**SCALES)
        reason = f"{step}, for the autoencoder's factor {factor} and the loss's {SCALES} scales"
    whole = factor if crop or buckets else step  # what is evaluated is not cropped, and has no loss
    if side < least or side % whole:
        raise OptionsError(
            f"data.image_size {side} must be at least {least}, and a multiple of {reason if whole == step else factor}."
        )
    if crop and (crop % step or not least <= crop <= side):
        raise OptionsError(
            f"crop {crop} must be from {least} to {side - side % step}, and a multiple of {reason}; or 0 for "
            "whole images."
        )
    if buckets % step:
        raise OptionsError(f"data.buckets {buckets} must be a multiple of {reason}; or 0 for squares.")


def image_size(config: Any, model: Model) -> int:
    """Pixels of a side of the images to train on."""
    return config.data.image_size or model.unet.config.side * model.vae.config.factor
