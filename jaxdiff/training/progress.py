"""The progress of a run: a bar on a terminal, otherwise a line each interval, and numbers for trackers."""

import collections
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxdiff.training.mfu import Speed
from jaxdiff.training.trackers import TrackedImages, Tracker

# A loss is a spike if it exceeds the median of the last SPIKE_WINDOW by SPIKE_DISTANCE median absolute deviations.
SPIKE_WINDOW, SPIKE_DISTANCE = 100, 10.0
HIDDEN = ("flops_per_second", "memory_bytes", "memory_peak_bytes")  # metrics that lines of text leave out


class Report:
    """Collects the metrics of steps and shows their means every `log_every` steps. A context manager.

    Only the first host shows anything. Skipped steps do not count in the means; "skipped" is their number.

    Args:
        trackers: closed on exit; none on hosts other than the first.
        name: of the stage.
        start, steps: updates already made, and in total.

    Attributes:
        speed: needed for FLOP/s and MFU; may be set later.
    """

    def __init__(
        self, trackers: Sequence[Tracker], name: str, start: int, steps: int, batch_size: int, log_every: int
    ) -> None:
        self._trackers = trackers
        self._name, self._batch_size, self._log_every, self._steps = name, batch_size, log_every, steps
        self.speed: Speed | None = None
        self._collected: list[Mapping[str, Any]] = []
        self._losses: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)
        self._timed_from: float | None = None
        self._timed_steps = 0
        self._quiet = jax.process_index() != 0
        self._bar = None
        if self._quiet:
            return
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
        for tracker in self._trackers:
            tracker.close()

    def step(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float] | None:
        """Add the metrics of one step, still on the devices.

        Returns:
            The means over the interval when this step ends one.
        """
        self._collected.append(metrics)
        self._timed_steps += self._timed_from is not None
        if not self.ends_interval(step):
            return None
        collected = jax.device_get(self._collected)
        now = time.perf_counter()
        means = self._means(step, collected)
        if self._timed_from is not None and self._timed_steps:
            rate = self._timed_steps / (now - self._timed_from)
            means["images_per_second"] = self._batch_size * rate
            means |= self.speed.values(rate) if self.speed else {}
        self._collected, self._timed_steps = [], 0
        self._timed_from = now if self._timed_from is not None else None
        self.show(step, means)
        return means

    def _means(self, step: int, collected: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        applied = [m for m in collected if not m.get("skipped", 0)]
        means = {k: float(np.mean([m[k] for m in applied or collected])) for k in collected[0] if k != "skipped"}
        if skipped := len(collected) - len(applied):
            self.say(f"{skipped} of the {len(collected)} updates up to step {step} skipped: not finite.")
            means["skipped"] = float(skipped)
        for i, metrics in enumerate(collected, step - len(collected) + 1):
            if not metrics.get("skipped", 0):
                self._check_spike(i, float(metrics["loss"]))
        return means

    def _check_spike(self, step: int, loss: float) -> None:
        """Print a message if a loss is far above those before it."""
        if len(self._losses) >= SPIKE_WINDOW // 4:
            median = float(np.median(self._losses))
            distance = float(np.median(np.abs(np.asarray(self._losses) - median)))
            if loss > median + SPIKE_DISTANCE * distance and loss > 2 * median:
                self.say(f"the loss jumps to {loss:.4g} at step {step}, from a median of {median:.4g}.")
        self._losses.append(loss)

    def ends_interval(self, step: int) -> bool:
        """Whether metrics are shown after this step, at which the caller may have no later step in flight."""
        return step % self._log_every == 0 or step == self._steps

    def start_clock(self) -> None:
        """Start timing. Call it while no step is in flight: after compiling and after an evaluation."""
        self._timed_from, self._timed_steps = time.perf_counter(), 0

    def say(self, text: str) -> None:
        """Print a sentence, above the bar if there is one."""
        if not self._quiet:
            line = f"{self._name}: {text}"
            print(line, flush=True) if self._bar is None else self._bar.console.print(line)

    def show(self, step: int, values: Mapping[str, float | TrackedImages]) -> None:
        """Report these values and images now."""
        if self._quiet:
            return
        for tracker in self._trackers:
            for name, images in values.items():
                if isinstance(images, TrackedImages):
                    tracker.draw(step, name, images)
        numbers = {name: value for name, value in values.items() if not isinstance(value, TrackedImages)}
        for tracker in self._trackers:
            tracker.write(step, numbers)  # also without numbers: the line marks the evaluation as done
        if numbers:
            self._show_numbers(step, numbers)

    def _show_numbers(self, step: int, values: Mapping[str, float]) -> None:
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in HIDDEN)
        if self._bar is None:
            print(f"step {step}/{self._steps}: {text}{self._remaining_time(step, values)}", flush=True)
        elif "loss" in values:
            summary = [f"loss {values['loss']:.4g}"]
            summary += [f"{rate:.4g} images/s" for name, rate in values.items() if name == "images_per_second"]
            self._bar.update(self._task, completed=step, text=" ".join(summary))
        else:
            self.say(f"step {step}: {text}")

    def _remaining_time(self, step: int, values: Mapping[str, float]) -> str:
        if not (rate := values.get("images_per_second")):
            return ""
        return f", {timedelta(seconds=round((self._steps - step) * self._batch_size / rate))} left"
