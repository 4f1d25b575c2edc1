"""What a run says while it goes on: a bar on a terminal, a line an interval otherwise, and TensorBoard files."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Report:
    """Collects the metrics of steps and shows their means every `log_every` steps. A context manager.

    Only the first host shows anything.
    """

    def __init__(self, folder: str | Path, name: str, start: int, steps: int, batch_size: int, log_every: int) -> None:
        self._batch_size, self._log_every, self._steps = batch_size, log_every, steps
        self._collected: list[Mapping[str, Any]] = []
        self._seconds, self._timed = 0.0, 0
        self._quiet = jax.process_index() != 0
        self._writer = self._bar = None
        if self._quiet:
            return
        from tensorboardX import SummaryWriter  # half a second, on the first host only

        self._writer = SummaryWriter(str(folder), purge_step=start if start else None)
        if sys.stdout.isatty():
            text = TextColumn("{task.fields[text]}")
            columns = (
                TextColumn(name),
                BarColumn(),
                MofNCompleteColumn(),
                text,
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns)
            self._task = self._bar.add_task(name, total=steps, completed=start, text="compiling")
            self._bar.start()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def step(self, step: int, metrics: Mapping[str, Any], seconds: float | None) -> dict[str, float] | None:
        """Take in the metrics of one step, still on the devices; `seconds` it took, None if it is not to be counted.

        Returns:
            The means over the interval when this step ends one.
        """
        self._collected.append(metrics)
        if seconds is not None:
            self._seconds, self._timed = self._seconds + seconds, self._timed + 1
        if step % self._log_every and step != self._steps:
            return None
        collected = jax.device_get(self._collected)
        means = {k: float(np.mean([m[k] for m in collected])) for k in collected[0]}
        if self._timed:
            means["images_per_second"] = self._batch_size * self._timed / max(self._seconds, 1e-9)
        self._collected, self._seconds, self._timed = [], 0.0, 0
        self.show(step, means)
        return means

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Write these values now."""
        if self._quiet:
            return
        assert self._writer is not None
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._bar is None:
            left = ""
            if rate := values.get("images_per_second"):
                seconds = (self._steps - step) * self._batch_size / rate
                left = f", {time.strftime('%H:%M:%S', time.gmtime(seconds))} left"
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"step {step}/{self._steps}: {text}{left}", flush=True)
        else:
            text = " ".join(f"{values[k]:.4g} {k}" for k in ("loss", "images_per_second") if k in values)
            self._bar.update(self._task, completed=step, text=text.replace("images_per_second", "images/s"))
