"""One thread that owns the model and draws what is asked for, in batches of whatever fits one program."""

import collections
import dataclasses
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from jaxdiff.diffusion.times import default_scheduler
from jaxdiff.errors import ArgumentError
from jaxdiff.io.lora import Weighted
from jaxdiff.models.model import Model
from jaxdiff.sampling.generate import check_finite
from jaxdiff.sampling.inputs import ImageInputs
from jaxdiff.sampling.resolve import Request, Settings, image_keys, resolve_images, resolve_settings
from jaxdiff.sampling.stepwise import draw_stepwise
from jaxdiff.serving.loras import Loras
from jaxdiff.serving.requests import DrawRequest, Job, Limits, Preview, QueueFull, Stopping
from jaxdiff.typing import SEEDS, Params

SHARED = ("steps", "clip_skip", "scheduler", "spacing", "height", "width", "image", "strength", "mask", "hires",
          "hires_strength", "hires_upscale")  # fmt: skip
EACH = ("guidance_scale", "guidance_rescale", "image", "mask", "control_images", "controlnet_scale")
# What happens, with a number: "waiting" images, a "batch" of so many, which took "seconds", a request's "latency", …
Observer = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One image of a job."""

    job: Job
    index: int
    key: tuple[Any, ...]  # equal for those that one program draws, at once
    settings: Settings
    loras: Weighted
    row: ImageInputs  # without the axis of the batch, and without a key
    seed: int
    since: float  # when it was asked for


class Engine:
    """Draws requests from any thread.

    Args:
        model, params: as `jaxdiff.load` gives them; `params` lie where images are drawn.
        limits: what one request may ask for.
        batch_sizes: how many images are drawn at once; fewer are filled up, so that few programs are compiled.
        window: seconds for which an image waits for others that would fit its batch.
        loras: that prompts may name.
        observe: is told what happens.
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
        observe: Observer = lambda what, number: None,
    ) -> None:
        self.model, self.limits, self.batch_sizes = model, limits, sorted(batch_sizes)
        self.loras = Loras(model, params, {}) if loras is None else loras
        self.ready = threading.Event()  # after the first program is compiled
        self._window, self._observe = window, observe
        self._queue: collections.deque[Item] = collections.deque()
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 1.0  # an image, lately
        self._warm_up = list(self.batch_sizes)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Draw what is begun, tell the others, and end. Returns at once; may be called again, and in a signal handler's
        thread."""
        threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        with self._changed:
            self._stopping = True
            waiting = [item.job for item in self._queue if not item.job.begun]
            self._changed.notify_all()
        for job in waiting:
            job.end(Stopping())

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended; whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def scheduler(self) -> str:
        """What draws where a request names none."""
        return default_scheduler(self.model.scheduler)

    @property
    def stopping(self) -> bool:
        return self._stopping

    def jobs(self, owner: str) -> list[Job]:
        """What is under way for somebody, the oldest first."""
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
            QueueFull, Stopping: not now.
        """
        self._check(request)
        first = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        seeds = [(first + i) % SEEDS for i in range(request.n)]
        job = Job(request, seeds, owner, previews, on_preview)
        items = self._items(job)
        with self._changed:
            if self._stopping:
                raise Stopping
            self._drop_ended()
            if len(self._queue) + len(items) > self.limits.queue:
                raise QueueFull(max(1, math.ceil(self._seconds * len(self._queue))))
            self._queue.extend(items)
            self._jobs.append(job)
            self._observe("waiting", len(self._queue))
            self._changed.notify_all()
        began = time.monotonic()

        def done(future: Any) -> None:
            with self._changed:
                self._jobs.remove(job)
            failed = future.exception() is not None
            self._observe("failed" if failed else "latency", 1 if failed else time.monotonic() - began)

        job.future.add_done_callback(done)
        return job

    def size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height that are drawn, by default the first of the sizes. Raises ArgumentError for others."""
        own = self.limits.sizes[0]
        size = own[0] if width is None else width, own[1] if height is None else height
        if size not in self.limits.sizes:
            known = ", ".join(f"{w}x{h}" for w, h in self.limits.sizes)
            raise ArgumentError("size", f"{size[0]}x{size[1]} is not drawn here; known are {known}.")
        return size

    def _check(self, request: DrawRequest) -> None:
        """Raise ArgumentError for more than the limits."""
        limits = self.limits
        self.size(request.width, request.height)
        for name in ("prompt", "negative_prompt"):
            text = getattr(request, name) or ""
            if len(text) > limits.prompt:
                raise ArgumentError(name, f"has {len(text)} characters, more than {limits.prompt}: shorten it.")
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ArgumentError(name, "is no valid Unicode: it holds half a surrogate pair.")
        numbers = (("n", 1, limits.images), ("steps", 1, limits.steps), ("guidance_scale", 0, limits.guidance_scale),
                   ("seed", 0, SEEDS - 1), ("variation_seed", 0, SEEDS - 1))  # fmt: skip
        for name, low, high in numbers:
            value = getattr(request, name)
            if value is not None and not low <= value <= high:
                raise ArgumentError(name, f"{value} must be from {low} to {high}.")

    def _items(self, job: Job) -> list[Item]:
        """The images of a job, resolved. Raises ArgumentError."""
        request, count = job.request, len(job.seeds)
        width, height = self.size(request.width, request.height)
        words, chosen = self.loras.split(request.prompt)
        shared: dict[str, Any] = {name: getattr(request, name) for name in SHARED} | {"height": height, "width": width}
        each: dict[str, Any] = {name: getattr(request, name) for name in EACH}
        if request.variation_seed is not None:
            each |= {"variation_seed": request.variation_seed, "variation_strength": request.variation_strength}
        settings = resolve_settings(self.model, **shared)
        prompts = [words] * count
        images = resolve_images(self.model, settings, prompts, request.negative_prompt, seed=job.seeds, **each).images
        tokenizer = self.model.tokenizer or self.model.tokenizer_2
        assert tokenizer is not None
        texts = max(
            np.prod(t.ids.shape[1:]) // tokenizer.max_length for t in (images.tokens, images.negative) if t is not None
        )
        if texts > self.limits.texts:
            raise ArgumentError("prompt", f"fills {texts} texts, more than {self.limits.texts}: shorten it.")
        no_keys: Any = None
        rows = jax.tree.map(np.asarray, images._replace(keys=no_keys))
        shapes = jax.tree.structure(rows), tuple((x.shape[1:], x.dtype.str) for x in jax.tree.leaves(rows))
        varied = request.variation_seed is not None
        alike = tuple(value for name, value in shared.items() if name not in ("image", "mask", "strength"))
        key = (*alike, settings.strength, varied, chosen, shapes)
        now = time.monotonic()
        return [
            Item(job, i, key, settings, chosen, jax.tree.map(lambda x, i=i: x[i], rows), seed, now)
            for i, seed in enumerate(job.seeds)
        ]

    # The engine's own thread.

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            began = time.monotonic()
            if batch:
                self._observe("batch", len(batch))
            self._draw(batch)
            if batch:
                seconds = time.monotonic() - began
                self._seconds += 0.2 * (seconds / len(batch) - self._seconds)
                self._observe("seconds", seconds)
            self.ready.set()
            del batch  # and with it the images

    def _drop_ended(self) -> None:
        """Forget what nobody waits for any more."""
        if any(item.job.future.done() for item in self._queue):
            self._queue = collections.deque(item for item in self._queue if not item.job.future.done())

    def _next_batch(self) -> list[Item] | None:
        """Images that fit one program; none, for a program to be compiled ahead; None at the end."""
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
                first, most = self._queue[0], self.batch_sizes[-1]
                fitting = [item for item in self._queue if item.key == first.key][:most]
                left = first.since + self._window - time.monotonic()
                if len(fitting) < most and left > 0 and not self._stopping:
                    self._changed.wait(left)
                    continue
                self._queue = collections.deque(item for item in self._queue if item not in fitting)
                for item in fitting:
                    item.job.begun = True
                self._observe("waiting", len(self._queue))
                return fitting

    def _draw(self, batch: list[Item]) -> None:
        """Draw a batch and give its images away. Whatever goes wrong ends its jobs alone."""
        try:
            if batch:
                self._draw_stepwise(batch)
            else:
                self._compile()
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
        """Compile the program of the next batch size, for images of the first size and no other wishes."""
        width, height = self.limits.sizes[0]
        count = self._warm_up.pop(0)
        settings = resolve_settings(self.model, steps=2, width=width, height=height, **self._needed())
        request = resolve_images(self.model, settings, [""] * count, "", **self._needed())
        for moment in draw_stepwise(self.model, self.loras.params_with(()), request, seconds=0):
            moment.images()

    def _needed(self) -> dict[str, Any]:
        """Images that a model for inpainting needs: grey, and all to be redrawn."""
        width, height = self.limits.sizes[0]
        if not self.model.inpaints:
            return {}
        return {"image": np.full((height, width, 3), 127, np.uint8), "mask": np.ones((height, width), bool)}

    def _draw_stepwise(self, batch: list[Item]) -> None:
        request = self._request(batch)
        params = self.loras.params_with(batch[0].loras)
        taken = len(request.settings.call.times.t) - 1 - int(request.settings.call.start or 0)
        counts = {item.job.previews for item in batch}
        stops = {math.ceil(taken * (k + 1) / (count + 1)) for count in counts for k in range(count)}
        for moment in draw_stepwise(self.model, params, request, stops=stops):
            alive = [(i, item) for i, item in enumerate(batch) if not item.job.future.done()]
            if not alive:
                self._observe("cancelled", len(batch))
                return
            fraction = moment.step / moment.steps
            for _, item in alive:
                item.job.fractions[item.index] = fraction
            if moment.finite is not None:
                images = moment.images()
                for i, item in alive:
                    self._deliver(item, images[i], bool(moment.finite[i]))
            elif due := [(i, item) for i, item in alive if item.job.due(item.index, fraction)]:
                images = moment.images()
                for i, item in due:
                    item.job.show(item.index, fraction, images[i])

    def _deliver(self, item: Item, image: np.ndarray, finite: bool) -> None:
        """Give one image to its job, which ends with its last."""
        job = item.job
        try:
            check_finite(np.asarray([finite]), [job.request.prompt], self.model)
        except FloatingPointError as e:
            job.end(e)
            return
        self._observe("images", 1)
        job.images[item.index] = image
        if all(image is not None for image in job.images):
            job.end()

    def _request(self, batch: list[Item]) -> Request:
        """A batch, filled up with its last image."""
        size = next(size for size in self.batch_sizes if size >= len(batch))
        filled = batch + batch[-1:] * (size - len(batch))
        rows = jax.tree.map(lambda *each: np.stack(each), *(item.row for item in filled))
        images = rows._replace(keys=image_keys([item.seed for item in filled], size))
        requests, variation = [item.job.request for item in filled], None
        if requests[0].variation_seed is not None:
            seeds = [((r.variation_seed or 0) + item.index) % SEEDS for r, item in zip(requests, filled, strict=True)]
            amounts = np.asarray([r.variation_strength for r in requests], np.float32)
            variation = image_keys(seeds, size, "variation_seed"), amounts
        return Request(batch[0].settings, [r.prompt for r in requests], images, variation)
