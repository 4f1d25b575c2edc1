"""The options of the optimization and of the noise that a denoiser learns from, each with its default and its range.

These are the defaults of all configs: `jaxdiff.training.defaults.base` takes them over.
"""

import dataclasses
import math
from typing import Any, Self

from jaxdiff.training.ranges import MAX_INT, OptionsError, check_fields, setting

STAGES = (
    "clip",
    "vae",
    "vae_decoder",
    "unet",
    "lora",
    "textual_inversion",
    "controlnet",
    "inpainting",
    "upscaler",
    "super_resolution",
    "lcm",
    "lcm_lora",
    "scm",
    "gan",
)
DISTILLED = ("lcm", "lcm_lora", "scm")  # those that learn from a teacher (distillation.py)
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
# Types of the optimizer's moments, and which optimizers can have them.
MOMENT_DTYPES = {"float32": OPTIMIZERS, "bfloat16": ("adamw", "lion", "muon"), "int8": ("adamw",)}
DTYPES = ("float32", "bfloat16", "float16")
TIMES = ("uniform", "logit_normal")
ADVERSARIES = ("hinge", "non_saturating", "relativistic")
AUGMENTATIONS = ("color", "translation", "cutout")
SEEDS = 2**32 - 4  # the highest seed; a run also uses the few that follow it
LONGEST_WARMUP = 500
DISCRIMINATOR = "discriminator_"  # prefix of the discriminator's own settings


def default_warmup(steps: int) -> int:
    """The default number of warm-up steps: a twentieth of the run, at most LONGEST_WARMUP."""
    return min(steps // 20, LONGEST_WARMUP)


def check_pairs(multipliers: Any) -> None:
    """Raise OptionsError unless learning-rate multipliers are pairs of a name and a number from 0 to 1000000."""
    entries = multipliers if isinstance(multipliers, tuple | list) else ()
    pairs = [entry for entry in entries if isinstance(entry, tuple | list) and len(entry) == 2]
    numbers = [
        factor
        for prefix, factor in pairs
        if isinstance(prefix, str) and isinstance(factor, int | float) and not isinstance(factor, bool)
    ]
    if not isinstance(multipliers, tuple | list) or len(numbers) < len(multipliers):
        raise OptionsError(f"lr_multipliers {multipliers!r} must be pairs such as (('text_encoder', 0.1),).")
    if not all(math.isfinite(factor) and 0 <= factor <= 1e6 for factor in numbers):
        raise OptionsError(f"lr_multipliers {multipliers!r}: each factor must be from 0 to 1000000.")


class FromConfig:
    """A dataclass whose fields are settings of a config."""

    @classmethod
    def from_config(cls, config: Any) -> Self:
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Options(FromConfig):
    """Options of the optimization, the same for every stage."""

    steps: int = setting(10_000, 1, MAX_INT)  # updates in total
    batch_size: int = setting(64, 1, MAX_INT)  # examples of one update, over all devices and hosts
    # Parts that a batch is split into, to save memory. May change on resuming, except for clip and vae_decoder.
    accumulate: int = setting(1, 1, MAX_INT)
    learning_rate: float = setting(1e-4, above=0, high=1000)  # its peak
    warmup_steps: int | None = setting(None, 0, MAX_INT, kind=int)  # linear, from 0; None: see `default_warmup`
    # Decay after the warm-up: to 0 at the last step, or none with "constant".
    schedule: str = setting("cosine", choices=SCHEDULES)
    weight_decay: float = setting(0.01, 0, 1000)  # of matrices and kernels, not of biases, norms and scalars
    b1: float = setting(0.9, 0, below=1)
    b2: float = setting(0.99, 0, below=1)
    optimizer: str = setting("adamw", choices=OPTIMIZERS)  # or "adafactor", "lion", "muon"
    # Dtype of the optimizer's moments. "bfloat16" applies to the first moment, "int8" to both (adamw only).
    moment_dtype: str = setting("float32", choices=MOMENT_DTYPES)
    # Factors of learning_rate by prefix of a parameter's path: (("text_encoder", 0.1),).
    lr_multipliers: tuple[tuple[str, float], ...] = setting((), items=object)
    # Dtype of frozen parameters; "bfloat16" and "float16" halve their memory.
    frozen_dtype: str = setting("float32", choices=DTYPES)
    clip_norm: float = setting(1.0, 0)  # of the whole gradient; 0 does not clip
    # Of the discriminator, in stages that have one; None: the same as for the generator.
    discriminator_learning_rate: float | None = setting(None, above=0, high=1000, kind=float)
    discriminator_weight_decay: float | None = setting(None, 0, 1000, kind=float)
    discriminator_b1: float | None = setting(None, 0, below=1, kind=float)
    discriminator_b2: float | None = setting(None, 0, below=1, kind=float)
    discriminator_clip_norm: float | None = setting(None, 0, kind=float)
    # Decay of the parameters' moving average, which is evaluated and exported; 0: the parameters themselves.
    ema_decay: float = setting(0.999, 0, below=1)
    # Relative widths of the averages whose snapshots are kept for post-hoc EMA (Karras et al. 2024): (0.05, 0.1).
    ema_sigmas: tuple[float, ...] = setting((), above=0, below=12**-0.5, items=float)
    snapshot_every: int = setting(1000, 1, MAX_INT)  # steps
    seed: int = setting(0, 0, SEEDS)
    # The devices are a mesh ("data", "fsdp", "tensor"); "data" gets the remaining devices.
    fsdp: int = setting(1, 1, MAX_INT)  # devices that each parameter is sharded over
    tensor: int = setting(1, 1, MAX_INT)  # devices that the layers themselves are split over (tensor parallelism)
    log_every: int = setting(50, 1, MAX_INT)  # steps
    eval_every: int = setting(1000, 0, MAX_INT)  # steps; 0 evaluates at the end only
    checkpoint_every: int = setting(1000, 1, MAX_INT)  # steps
    keep_checkpoints: int = setting(2, 1, MAX_INT)
    # Consecutive updates skipped because loss or gradient is not finite, after which the run stops.
    max_skipped: int = setting(10, 1, MAX_INT)

    def check(self, devices: int) -> None:
        """Raise OptionsError if options are out of range, or do not fit each other or the number of devices."""
        check_fields(self)
        check_pairs(self.lr_multipliers)
        if devices % (self.fsdp * self.tensor):
            raise OptionsError(f"fsdp {self.fsdp} x tensor {self.tensor} must divide the number of devices, {devices}.")
        parts = max(devices // self.tensor, 1) * self.accumulate
        if self.batch_size % parts:
            divided = f"devices {devices}" + (f" / tensor {self.tensor}" if self.tensor > 1 else "")
            raise OptionsError(
                f"batch_size {self.batch_size} must be divisible by the number of {divided} x accumulate "
                f"{self.accumulate} = {parts}."
            )
        if self.optimizer not in MOMENT_DTYPES.get(self.moment_dtype, ()):
            known = ", ".join(f"{name} (with {', '.join(optimizers)})" for name, optimizers in MOMENT_DTYPES.items())
            raise OptionsError(f"moment_dtype {self.moment_dtype!r} of {self.optimizer} must be one of {known}.")

    @property
    def of_discriminator(self) -> "Options":
        """These options with the `discriminator_*` values in place of the general ones."""
        names = (field.name for field in dataclasses.fields(self) if field.name.startswith(DISCRIMINATOR))
        overrides = {
            name.removeprefix(DISCRIMINATOR): value for name in names if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **overrides)

    @property
    def warmup(self) -> int:
        """Steps of the warm-up."""
        return default_warmup(self.steps) if self.warmup_steps is None else self.warmup_steps

    def too_long(self) -> list[str]:
        """Warnings about a warm-up or snapshots that need a longer run, one sentence each."""
        warnings, steps = list[str](), self.steps
        if self.warmup >= steps:
            warnings.append(
                f"config.warmup_steps {self.warmup} is not below config.steps {steps}: the learning rate never "
                f"reaches {self.learning_rate:g}. Set it to {default_warmup(steps)} for a run of this length."
            )
        if self.ema_sigmas and self.snapshot_every >= steps:
            warnings.append(
                f"config.snapshot_every {self.snapshot_every} is not below config.steps {steps}: averages of other "
                "lengths than ema_sigmas need about ten snapshots, and there will be one."
            )
        return warnings


@dataclasses.dataclass(frozen=True)
class NoiseOptions(FromConfig):
    """How noise, timesteps and dropped captions are sampled in training, and how errors are weighted."""

    # Share of examples trained on the empty prompt, for classifier-free guidance (Ho & Salimans 2022, algorithm 1).
    caption_dropout: float = setting(0.1, 0, 1)
    # Gamma of min-SNR weighting (Hang et al. 2023, equation 5; 5 in the paper). 0 turns it off. Leave it off for
    # v-prediction with zero terminal SNR, where the last timestep would get a weight of 0.
    min_snr_gamma: float = setting(0.0, 0)
    # Standard deviation of noise that is constant over each channel of an image, added to the noise of each pixel, so
    # that the model learns to make whole images darker or lighter (0.1 is usual). 0: off.
    offset_noise: float = setting(0.0, 0, 100)
    # Standard deviation of extra noise in the input that the target lacks (Ning et al. 2023, algorithm 1; 0.1). 0: off.
    input_perturbation: float = setting(0.0, 0, 100)
    # "logit_normal" samples middle timesteps more often (Esser et al. 2024, equation 19).
    times: str = setting("uniform", choices=TIMES)
    logit_mean: float = setting(0.0, -100, 100)  # of the logit of t / T; above 0 means more noise
    logit_std: float = setting(1.0, above=0, high=100)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class DistillationOptions(FromConfig):
    """How a student is distilled from its teacher."""

    # Range of the teacher's guidance scale, sampled uniformly for each example. Equal bounds build one scale in.
    guidance_min: float = setting(3.0, 1, 1000)
    guidance_max: float = setting(15.0, 1, 1000)
    # Width of the student's embedding of the guidance scale, 256 in published models; 0: no embedding.
    guidance_dim: int = setting(0, 0, 4096)
    solver_steps: int = setting(50, 1, MAX_INT)  # lcm: DDIM steps from noise to image; the teacher takes one per update
    huber_c: float = setting(1e-3, above=0, high=1000)  # lcm: width of the pseudo-Huber loss, quadratic below it
    tangent_warmup: int = setting(1000, 0, MAX_INT)  # scm: updates over which the student's derivative is phased in
    # scm: radians a step; sinusoids of the timestep that turn faster lose their weight, see `distillation.smooth`.
    time_frequency: float = setting(0.05, above=0, high=1)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class RedrawOptions(FromConfig):
    """How the model redraws latents before the stage "vae_decoder" decodes them."""

    strength: float = setting(0.0, 0, 1)  # the highest noise level, as a share of the schedule; 0: not redrawn
    steps: int = setting(5, 1, 1000)  # of DDIM
    guidance_scale: float = setting(0.0, 0, 1000)  # 0: the model's own

    def __post_init__(self) -> None:
        check_fields(self)
