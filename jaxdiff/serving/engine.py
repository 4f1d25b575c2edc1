"""The thread that owns the model and draws the requests, in batches of images that share a program."""

import collections
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from jaxdiff.models.model import Model
from jaxdiff.sampling.generate import check_finite
from jaxdiff.sampling.stepwise import PROGRAMS, Pace, draw_stepwise
from jaxdiff.serving.enlarging import enlarge
from jaxdiff.serving.loras import Loras
from jaxdiff.serving.requests import (
    Cancelled,
    DrawRequest,
    EnlargeRequest,
    Job,
    Limits,
    Preview,
    QueueFull,
    Stopping,
    TooVaried,
)
from jaxdiff.serving.resolving import Item, Resolver
from jaxdiff.typing import Params

HOUR = 3600.0
SOLO_AFTER = 10.0  # seconds without concurrent requests until a client counts as the only one
# (event, number): images "waiting", images of a "batch" and its "seconds", a request's "latency", …
Observer = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True, eq=False)
class EnlargeItem:
    """An image to enlarge, in a batch of its own. The fields are a subset of `Item`'s."""

    job: Job
    key: object = dataclasses.field(default_factory=object)  # unique
    since: float = 0.0  # long ago, so that it does not wait for others


class Engine:
    """Draws requests from any thread.

    Args:
        model, params: as `jaxdiff.load` gives them; `params` lie where images are drawn.
        limits: what one request may ask for.
        batch_sizes: allowed batch sizes; smaller batches are padded, so that few programs are compiled.
        window: seconds that an image waits for others to join its batch, if other clients were active lately.
        loras: that prompts may name.
        observe: called with each event and its number.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        limits: Limits,
        *,
        batch_sizes: Sequence[int] = (1, 2, 4),
        window: float = 0.02,
        loras: Loras | None = None,
        observe: Observer = lambda event, value: None,
    ) -> None:
        self.model, self.limits, self.batch_sizes = model, limits, sorted(batch_sizes)
        self.loras = Loras(model, params, {}) if loras is None else loras
        self.resolver = Resolver(model, limits, self.loras, self.batch_sizes)
        self.ready = threading.Event()  # set after the first program is compiled
        self._window, self._observe = window, observe
        self._queue: collections.deque[Item | EnlargeItem] = collections.deque()
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 1.0  # moving average of the seconds for one image
        self._last_concurrent = time.monotonic()  # time of the latest request that came while others were in progress
        self._programs: dict[tuple[Any, ...], None] = {}  # keys of compiled programs, the latest one last
        self._compiled: collections.deque[float] = collections.deque()  # times at which they were added, within an hour
        self._pace = functools.lru_cache(PROGRAMS)(lambda program, count: Pace())
        self._warm_up = list(self.batch_sizes)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the images in progress, refuse the others, and end. Returns at once. May be called repeatedly, and
        from a signal handler."""
        threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        with self._changed:
            self._stopping = True
            waiting = [item.job for item in self._queue if not item.job.started]
            self._changed.notify_all()
        for job in waiting:
            job.end(Stopping())

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended; returns whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        return self._stopping

    def jobs(self, owner: str) -> list[Job]:
        """The jobs of an owner that are not done, the oldest first."""
        with self._changed:
            return [job for job in self._jobs if job.owner == owner and not job.future.done()]

    def submit(
        self, request: DrawRequest, *, owner: str = "", previews: int = 0, on_preview: Preview | None = None
    ) -> Job:
        """Check a request and put its images into the queue.

        Args:
            owner: who may see and cancel it.
            previews: of each image, evenly over its steps.
            on_preview: is called in the engine's thread.

        Raises:
            ArgumentError: one sentence naming the argument.
            QueueFull, TooVaried, Stopping: not now.
        """
        job = self.resolver.job(request, owner, previews, on_preview)
        items = self.resolver.items(job, time.monotonic())
        self._put(job, items)
        return job

    def enlarge(self, request: EnlargeRequest, *, owner: str = "") -> Job:
        """Put an image into the queue that the model's upscaler enlarges. Raises QueueFull, Stopping."""
        job = Job(request, [""], [0], owner)
        self._put(job, [EnlargeItem(job)])
        return job

    def _put(self, job: Job, items: Sequence[Item | EnlargeItem]) -> None:
        """Put the images of a job into the queue. Raises QueueFull, TooVaried, Stopping."""
        with self._changed:
            if self._stopping:
                raise Stopping
            self._drop_ended()
            if len(self._queue) + len(items) > self.limits.queue:
                raise QueueFull(max(1, math.ceil(self._seconds * len(self._queue))))
            self._count_programs({item.program for item in items if isinstance(item, Item)})
            if self._jobs:
                self._last_concurrent = time.monotonic()
            self._queue.extend(items)
            self._jobs.append(job)
            self._observe("waiting", len(self._queue))
            self._changed.notify_all()
        start_time = time.monotonic()

        def on_done(future: Any) -> None:
            with self._changed:
                self._jobs.remove(job)
            failed = future.exception() is not None
            self._observe("failed" if failed else "latency", 1 if failed else time.monotonic() - start_time)

        job.future.add_done_callback(on_done)

    def _count_programs(self, programs: set[tuple[Any, ...]]) -> None:
        """Record the programs that are needed. Raises TooVaried if too many were compiled within an hour."""
        now = time.monotonic()
        while self._compiled and self._compiled[0] < now - HOUR:
            self._compiled.popleft()
        new = programs - self._programs.keys()
        if new and len(self._compiled) + len(new) > self.limits.programs:
            raise TooVaried(math.ceil(HOUR - (now - self._compiled[0] if self._compiled else 0)))
        self._compiled.extend([now] * len(new))
        for program in programs:
            self._programs.pop(program, None)
            self._programs[program] = None
        while len(self._programs) > PROGRAMS:  # the samplers keep no more
            del self._programs[next(iter(self._programs))]

    # The engine's own thread.

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            start_time = time.monotonic()
            if batch:
                self._observe("batch", len(batch))
            self._draw(batch)
            if batch:
                seconds = time.monotonic() - start_time
                self._seconds += 0.2 * (seconds / len(batch) - self._seconds)
                self._observe("seconds", seconds)
            self.ready.set()
            del batch  # frees its images

    def _drop_ended(self) -> None:
        """Remove the images of jobs that have ended from the queue."""
        if any(item.job.future.done() for item in self._queue):
            self._queue = collections.deque(item for item in self._queue if not item.job.future.done())

    def _next_batch(self) -> list[Any] | None:
        """Images that share a program; an empty list to compile a program ahead; None at the end."""
        with self._changed:
            while True:
                self._drop_ended()
                if not self._queue and self._stopping:
                    return None
                if not self._queue:
                    if self._warm_up:
                        return []
                    self._changed.wait()
                    continue
                first, max_batch = self._queue[0], self.batch_sizes[-1]
                batch = [item for item in self._queue if item.key == first.key][:max_batch]
                now = time.monotonic()
                wait_time = first.since + self._window - now if now < self._last_concurrent + SOLO_AFTER else 0
                if len(batch) < max_batch and wait_time > 0 and not self._stopping:
                    self._changed.wait(wait_time)
                    continue
                self._queue = collections.deque(item for item in self._queue if item not in batch)
                for item in batch:
                    item.job.started = True
                self._observe("waiting", len(self._queue))
                return batch

    def _draw(self, batch: list[Any]) -> None:
        """Draw a batch and deliver its images. An error ends only its jobs."""
        try:
            if not batch:
                self._compile()
            elif isinstance(batch[0], EnlargeItem):
                self._enlarge(batch[0].job)
            else:
                self._draw_stepwise(batch)
        except Exception as e:
            if "RESOURCE_EXHAUSTED" in str(e) and len(batch) > 1:
                logging.warning("Memory is too small for %d images at once: drawing fewer.", len(batch))
                half = len(batch) // 2
                self._draw(batch[:half])
                self._draw(batch[half:])
                return
            logging.exception("%d images could not be drawn", len(batch))
            for item in batch:
                item.job.end(e)

    def _compile(self) -> None:
        """Compile the program of the next batch size, for images of the first size with default settings."""
        request = self.resolver.example(self._warm_up.pop(0))
        for progress in draw_stepwise(self.model, self.loras.params_with(()), request, seconds=0):
            progress.images()

    def _enlarge(self, job: Job) -> None:
        """Enlarge an image; stop if its job is cancelled."""

        def check() -> None:
            if job.future.done():
                raise Cancelled

        try:
            job.images = [enlarge(self.model, self.loras.params_with(()), job.request, check)]
        except Cancelled:
            self._observe("cancelled", 1)
        else:
            self._observe("images", 1)
            job.end()

    def _draw_stepwise(self, batch: list[Item]) -> None:
        request = self.resolver.request(batch)
        params = self.loras.params_with(batch[0].loras)
        num_steps = len(request.settings.call.times.t) - 1 - int(request.settings.call.start or 0)
        counts = {item.job.previews for item in batch}
        stops = {math.ceil(num_steps * (k + 1) / (count + 1)) for count in counts for k in range(count)}
        pace = self._pace(batch[0].program, len(request.prompts))
        for progress in draw_stepwise(self.model, params, request, stops=stops, pace=pace):
            waiting = [(i, item) for i, item in enumerate(batch) if not item.job.future.done()]
            if not waiting:
                self._observe("cancelled", len(batch))
                return
            fraction = progress.step / progress.steps
            for _, item in waiting:
                item.job.fractions[item.index] = fraction
            if progress.finite is not None:
                images = progress.images()
                for i, item in waiting:
                    self._deliver(item, images[i], bool(progress.finite[i]))
            elif due := [(i, item) for i, item in waiting if item.job.due(item.index, fraction)]:
                images = progress.images()
                for i, item in due:
                    item.job.show(item.index, fraction, images[i])

    def _deliver(self, item: Item, image: np.ndarray, finite: bool) -> None:
        """Add an image to its job, which ends with the last one."""
        job = item.job
        try:
            check_finite(np.asarray([finite]), [job.prompts[item.index]], self.model)
        except FloatingPointError as e:
            job.end(e)
            return
        self._observe("images", 1)
        job.images[item.index] = image
        if all(image is not None for image in job.images):
            job.end()
