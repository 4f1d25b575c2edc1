"""The options of the optimization and of the noise that a denoiser learns from, each with its default and its check.

These are the defaults of all configs: `jaxdiff.training.defaults.base` takes them over.
"""

import dataclasses
from typing import Any, Self

from jaxdiff.errors import JaxdiffError

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
# Types of the optimizer's moments, and which optimizers can have them.
MOMENT_DTYPES = {"float32": OPTIMIZERS, "bfloat16": ("adamw", "lion", "muon"), "int8": ("adamw",)}
FROZEN_DTYPES = ("float32", "bfloat16", "float16")
TIMES = ("uniform", "logit_normal")
AT_LEAST_ONE = (
    "steps", "batch_size", "accumulate", "fsdp", "tensor", "log_every", "checkpoint_every", "keep_checkpoints",
    "max_skipped", "snapshot_every",
)  # fmt: skip


class OptionsError(JaxdiffError, ValueError):
    """Settings that do not fit each other, the model or the devices: a sentence that begins with the setting's name."""


class FromConfig:
    """A dataclass whose fields are settings of a config."""

    @classmethod
    def from_config(cls, config: Any) -> Self:
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Options(FromConfig):
    """How to optimise; the same for every stage."""

    steps: int = 10_000  # updates in all
    batch_size: int = 64  # examples of one update, over all devices and hosts
    accumulate: int = 1  # parts that a batch is taken in, to save memory; may change on resuming, but for clip
    learning_rate: float = 1e-4  # its peak
    warmup_steps: int = 500  # linear, from 0
    schedule: str = "cosine"  # after the warm-up, to 0 at the last step; or "linear", or "constant"
    weight_decay: float = 0.01  # of matrices and kernels; biases, norms and scalars are left alone
    b1: float = 0.9
    b2: float = 0.99
    optimizer: str = "adamw"  # or "adafactor", "lion", "muon"
    moment_dtype: str = "float32"  # of the optimizer's moments: or "bfloat16" (the first), "int8" (both, adamw)
    # Factors of learning_rate by the start of a parameter's path: (("text_encoder", 0.1),).
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    frozen_dtype: str = "float32"  # of parameters that do not learn: or "bfloat16", "float16", half the memory
    clip_norm: float = 1.0  # of the whole gradient; 0 does not clip
    ema_decay: float = 0.999  # of the average of parameters that is evaluated and exported; 0 keeps no past
    # Lengths, as shares of the run, of averages of which snapshots are kept, for one of any length later: (0.05, 0.1).
    ema_sigmas: tuple[float, ...] = ()
    snapshot_every: int = 1000  # steps
    seed: int = 0
    # The devices are a mesh ("data", "fsdp", "tensor"); "data" is what the other two leave.
    fsdp: int = 1  # devices that each parameter is kept split over
    tensor: int = 1  # devices that the layers themselves are split over
    log_every: int = 50  # steps
    eval_every: int = 1000  # steps; 0 evaluates at the end only
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 2
    max_skipped: int = 10  # updates in a row that may be left out because loss or gradient is not finite

    def check(self, devices: int) -> None:
        """Raises OptionsError, one sentence naming the option."""
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise OptionsError(f"{name} {getattr(self, name)} must be at least 1.")
        parts = max(devices // self.tensor, 1) * self.accumulate
        if self.batch_size % parts:
            divided = f"devices {devices}" + (f" / tensor {self.tensor}" if self.tensor > 1 else "")
            raise OptionsError(
                f"batch_size {self.batch_size} must be divisible by the number of {divided} x accumulate "
                f"{self.accumulate} = {parts}."
            )
        if self.schedule not in SCHEDULES:
            raise OptionsError(f"schedule {self.schedule!r} must be one of {', '.join(SCHEDULES)}.")
        if self.optimizer not in OPTIMIZERS:
            raise OptionsError(f"optimizer {self.optimizer!r} must be one of {', '.join(OPTIMIZERS)}.")
        if self.optimizer not in MOMENT_DTYPES.get(self.moment_dtype, ()):
            known = ", ".join(f"{name} (with {', '.join(who)})" for name, who in MOMENT_DTYPES.items())
            raise OptionsError(f"moment_dtype {self.moment_dtype!r} of {self.optimizer} must be one of {known}.")
        if self.frozen_dtype not in FROZEN_DTYPES:
            raise OptionsError(f"frozen_dtype {self.frozen_dtype!r} must be one of {', '.join(FROZEN_DTYPES)}.")
        if not 0 <= self.ema_decay < 1:
            raise OptionsError(f"ema_decay {self.ema_decay} must be in [0, 1).")


@dataclasses.dataclass(frozen=True)
class NoiseOptions(FromConfig):
    """How noise, times and captions are drawn while a denoiser learns, and how its errors are weighed."""

    # Share of examples that see the empty prompt, which guidance needs (Ho & Salimans 2022, algorithm 1).
    caption_dropout: float = 0.1
    # Bounds the weight of easy times (Hang et al. 2023, equation 5; 5 in the paper). 0 weighs all alike, as a
    # v-prediction with zero terminal signal-to-noise wants it: there the bound is a weight of 0.
    min_snr_gamma: float = 0.0
    # Deviation of a noise that is one number for each channel of an image, added to that of each pixel, so that the
    # model learns to make whole images darker or lighter (0.1 is usual). 0: off.
    offset_noise: float = 0.0
    # Deviation of more noise that is in the input and not in the target (Ning et al. 2023, algorithm 1; 0.1). 0: off.
    input_perturbation: float = 0.0
    times: str = "uniform"  # or "logit_normal": the middle times more often (Esser et al. 2024, equation 19)
    logit_mean: float = 0.0  # of the logit of t / T; above 0 means more noise
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("caption_dropout", "min_snr_gamma", "offset_noise", "input_perturbation"):
            if getattr(self, name) < 0:
                raise OptionsError(f"{name} {getattr(self, name)} must be 0 or more.")
        if self.times not in TIMES:
            raise OptionsError(f"times {self.times!r} must be one of {', '.join(TIMES)}.")
        if self.logit_std <= 0:
            raise OptionsError(f"logit_std {self.logit_std} must be above 0.")
