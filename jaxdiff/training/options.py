"""How to optimise: every option with its default and its check."""

import dataclasses

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
MOMENTS = {"float32": OPTIMIZERS, "bfloat16": ("adamw", "lion", "muon"), "int8": ("adamw",)}  # and who can keep them so


class OptionsError(ValueError):
    """Options of training that do not fit each other or the devices."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to optimise; the same for every stage."""

    steps: int  # updates in all
    batch_size: int  # examples of one update, over all hosts
    accumulate: int = 1  # parts that a batch is taken in, one after the other, to save memory
    learning_rate: float = 1e-4  # its peak
    warmup_steps: int = 0  # linear, from 0
    schedule: str = "constant"  # after the warm-up; or "linear" or "cosine", to 0 at the last step
    weight_decay: float = 0.01  # of matrices and kernels; biases, norms and scalars are left alone
    b1: float = 0.9
    b2: float = 0.999
    optimizer: str = "adamw"  # or "adafactor", "lion", "muon"
    moments: str = "float32"  # type of the optimizer's moments: or "bfloat16" (the first), "int8" (both)
    rates: tuple[tuple[str, float], ...] = ()  # (start of a parameter's path, factor of its learning rate)
    frozen_dtype: str = "float32"  # type in which the devices keep what is not trained: or "bfloat16", "float16"
    clip_norm: float = 1.0  # of the whole gradient; 0 does not clip
    ema_decay: float = 0.999  # of the average of parameters that is evaluated and exported; 0 keeps no past
    ema_sigmas: tuple[float, ...] = ()  # lengths of averages to keep snapshots of, as shares of the training
    snapshot_every: int = 1000  # steps
    seed: int = 0
    fsdp: int = 1  # devices that each parameter is kept split over
    tensor: int = 1  # devices that the layers themselves are split over
    log_every: int = 20  # steps
    eval_every: int = 1000  # steps; 0 evaluates at the end only
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 2
    max_skipped: int = 10  # updates in a row that may be left out because loss or gradient is not finite

    def check(self, devices: int) -> None:
        """Raises OptionsError, one sentence naming the option."""
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "fsdp",
            "tensor",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "max_skipped",
            "snapshot_every",
        ):
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
        if self.optimizer not in MOMENTS.get(self.moments, ()):
            known = ", ".join(f"{name} (with {', '.join(who)})" for name, who in MOMENTS.items())
            raise OptionsError(f"moments {self.moments!r} of {self.optimizer} must be one of {known}.")
        if self.frozen_dtype not in ("float32", "bfloat16", "float16"):
            raise OptionsError(f"frozen_dtype {self.frozen_dtype!r} must be float32, bfloat16 or float16.")
        if not 0 <= self.ema_decay < 1:
            raise OptionsError(f"ema_decay {self.ema_decay} must be in [0, 1).")
