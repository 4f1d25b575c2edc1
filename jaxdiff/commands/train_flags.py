"""The flags of train.py."""

import re
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxdiff.cli.errors import UsageError

STAGES = ("clip", "vae", "unet", "lora", "textual_inversion", "controlnet", "inpainting", "upscaler")


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of a command line, the program's name first.

    Raises:
        UsageError: one sentence naming the flag or setting.
    """
    f = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "The experiment: a file of configs/.", flag_values=f)
    flags.DEFINE_string("workdir", None, "Folder of all that the run writes.", f)
    flags.DEFINE_bool(
        "distributed", False, "This is one of several processes, on a TPU pod or under Slurm: find the others.", f
    )
    flags.DEFINE_string("coordinator_address", None, "Where the first of several processes listens, host:port.", f)
    flags.DEFINE_integer(
        "num_processes", None, "How many processes there are, with --coordinator_address.", flag_values=f
    )
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=f)
    flags.DEFINE_string("plan", None, "Print memory and messages of each device instead of training; or =quick.", f)
    flags.DEFINE_integer("plan_devices", 0, "Devices to plan for; 0: those of this machine.", flag_values=f)
    flags.DEFINE_integer(
        "profile", 0, "Write a trace of this many steps to the workdir's folder profile.", 0, flag_values=f
    )
    flags.DEFINE_bool(
        "precompute", False, "Only write the latents of all pictures to WORKDIR/latents, for config.latents.path.", f
    )
    flags.DEFINE_float(
        "posthoc_ema", None, "Only write WORKDIR/export-ema-LENGTH: the average of this length, a share of the run, "
        "out of the snapshots of config.ema_sigmas. Needs no --config.", flag_values=f,
    )  # fmt: skip
    flags.DEFINE_bool("verbose", False, "Show the traceback of an error.", f)
    flags.DEFINE_bool("help", False, "Show this help.", f, short_name="h")
    try:
        rest = f([f"{a}=full" if a.lstrip("-") == "plan" else a for a in argv])[1:]
        stage = f.config is not None and f.config.stage  # raises where the file could not be read
    except (flags.Error, OSError, LookupError, AttributeError, TypeError, ValueError, SyntaxError, ImportError) as e:
        raise UsageError(config_error(e)) from None
    if f.help:
        return f
    if rest:
        raise UsageError(f"{rest[0]!r} belongs to no flag; --help shows all.")
    if f.posthoc_ema is not None and not 0 < f.posthoc_ema < 12**-0.5:
        raise UsageError(f"--posthoc_ema={f.posthoc_ema:g} must be above 0 and below {12**-0.5:.3f}.")
    if f.posthoc_ema is not None and f.workdir and f.config is None:
        return f
    if f.config is None:
        raise UsageError("--config is missing: name the experiment, such as --config=configs/icons/vae.py.")
    if not f.workdir and not f.plan:
        raise UsageError("--workdir is missing: name a folder for the run, such as --workdir=runs/vae.")
    among = f.num_processes, f.process_id
    if f.coordinator_address and (None in among or not 0 <= f.process_id < f.num_processes):
        raise UsageError("--coordinator_address needs --num_processes and a --process_id from 0 to one less.")
    if among != (None, None) and not f.coordinator_address:
        raise UsageError("--num_processes and --process_id need --coordinator_address=host:port.")
    if stage not in STAGES:
        raise UsageError(f"config.stage {stage!r} must be one of {', '.join(STAGES)}.")
    check_read(f.config)
    if f.config.eval.pictures < 0:
        raise UsageError(f"config.eval.pictures {f.config.eval.pictures} must be 0, for none, or more.")
    if not f.config.data.path and not f.plan:
        raise UsageError("config.data.path is missing: name a captioned folder, --config.data.path=pictures/.")
    return f


def check_read(config: Any) -> None:
    """Raise UsageError for settings of other stages, which this one would not read."""
    given = {
        "crop": config.crop,
        "cache_latents": config.cache_latents,
        "latents.path": config.latents.path,
        "prior.path": config.prior.path,
    }
    read = {"vae": ("crop",), "clip": ()}.get(config.stage, ("cache_latents", "latents.path", "prior.path"))
    if unread := [f"config.{name}={value}" for name, value in given.items() if value and name not in read]:
        raise UsageError(f"{', '.join(unread)}: the stage {config.stage} does not read this; leave it out.")


def check_sizes(config: Any, model: Any) -> None:
    """Raise UsageError for images of a size that the autoencoder, or its loss at several scales, cannot take."""
    from jaxdiff.training.losses import SCALES

    if config.stage == "clip" or config.latents.path:  # any size will do, or was settled when they were written
        return
    factor, crop, buckets = model.vae.config.factor, config.crop, config.data.buckets
    side = config.data.image_size or model.unet.config.side * factor
    step = least = factor
    reason = f"{factor}, the autoencoder's factor"
    if config.stage == "vae":
        step, least = max(factor, 2 ** (SCALES - 1)), max(factor, 2**SCALES)
        reason = f"{step}, for the autoencoder's factor {factor} and the loss's {SCALES} scales"
    whole = factor if crop or buckets else step  # what is evaluated is not cropped, and has no loss
    if side < least or side % whole:
        raise UsageError(
            f"config.data.image_size {side} must be at least {least}, and a multiple of "
            f"{reason if whole == step else factor}."
        )
    if crop and (crop % step or not least <= crop <= side):
        raise UsageError(
            f"config.crop {crop} must be from {least} to {side - side % step}, and a multiple of {reason}; or 0 for "
            "whole images."
        )
    if buckets % step:
        raise UsageError(f"config.data.buckets {buckets} must be a multiple of {reason}; or 0 for squares.")


def config_error(error: Exception) -> str:
    """One sentence out of what ml_collections says, which may hold a whole traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, LookupError):
        return f"--config has no setting {text.strip(chr(34))}; configs/common.py lists all."
    return f"--config: {re.split(r'Error: |.Errno [0-9]+. ', text)[-1]}"
