"""What a run says while it goes on: a bar on a terminal, a line an interval otherwise, and TensorBoard files."""

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
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
        self._name, self._batch_size, self._log_every, self._steps = name, batch_size, log_every, steps
        self._collected: list[Mapping[str, Any]] = []
        self._since: float | None = None
        self._timed = 0  # steps since then
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

    def step(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float] | None:
        """Take in the metrics of one step, still on the devices.

        Returns:
            The means over the interval when this step ends one.
        """
        self._collected.append(metrics)
        self._timed += 1
        if self._since is None:
            jax.block_until_ready(metrics)  # compiled, or whatever came between is over: the clock starts here
            self._since, self._timed = time.perf_counter(), 0
        if step % self._log_every and step != self._steps:
            return None
        collected = jax.device_get(self._collected)
        means = {k: float(np.mean([m[k] for m in collected])) for k in collected[0]}
        now = time.perf_counter()
        if self._timed:
            means["images_per_second"] = self._batch_size * self._timed / (now - self._since)
        self._collected, self._since, self._timed = [], now, 0
        self.show(step, means)
        return means

    def restart_clock(self) -> None:
        """Do not count the time until the next step."""
        self._since = None

    def say(self, text: str) -> None:
        """A sentence, above the bar."""
        if not self._quiet:
            (print if self._bar is None else self._bar.console.print)(f"{self._name}: {text}")

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Write these values now."""
        if self._quiet:
            return
        assert self._writer is not None
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is None:
            print(f"step {step}/{self._steps}: {text}{self._left(step, values)}", flush=True)
        elif "loss" in values:
            shown = [f"loss {values['loss']:.4g}"]
            shown += [f"{rate:.4g} images/s" for name, rate in values.items() if name == "images_per_second"]
            self._bar.update(self._task, completed=step, text=" ".join(shown))
        else:
            self.say(f"step {step}: {text}")

    def _left(self, step: int, values: Mapping[str, float]) -> str:
        if not (rate := values.get("images_per_second")):
            return ""
        return f", {timedelta(seconds=round((self._steps - step) * self._batch_size / rate))} left"
