"""Requests of clients, their limits, and the errors that refuse them."""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxdiff.errors import JaxdiffError


class QueueFull(JaxdiffError):
    """Too many images are waiting."""

    def __init__(self, seconds: int):
        super().__init__(f"Too many images are waiting: try again in {seconds} s.")
        self.seconds = seconds


class TooVaried(JaxdiffError):
    """Too many programs were compiled lately to add another."""

    def __init__(self, seconds: int):
        super().__init__(
            "Too many different combinations of size, scheduler and other settings were asked for lately: ask for one "
            f"of these, or try again in {seconds} s."
        )
        self.seconds = seconds


class Stopping(JaxdiffError):
    """The server is stopping, and only finishes the images in progress."""

    def __init__(self) -> None:
        super().__init__("The server is stopping: try again later, or use another server.")


class Cancelled(JaxdiffError):
    """Nobody waits for these images any more."""

    def __init__(self) -> None:
        super().__init__("The request was cancelled.")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    sizes: tuple[tuple[int, int], ...]  # (width, height) in pixels; each other size would be compiled separately
    steps: int = 150
    images: int = 10
    prompt: int = 4000  # characters
    texts: int = 8  # that one image attends to: chunks of a long prompt, times the texts it is edited to
    guidance_scale: float = 100.0
    queue: int = 64  # images that wait
    programs: int = 40  # compiled per hour and batch size
    seconds: float = 600.0  # until a request times out


@dataclasses.dataclass(frozen=True, eq=False)
class DrawRequest:
    """Arguments of `jaxdiff.generate`, by its names but for `prompt`; None is the model's or the server's default."""

    prompt: str
    negative_prompt: str | None = None
    n: int = 1
    seed: int | None = None  # of the first image; None: a random one
    steps: int = 25
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    pag_scale: float | None = None
    scheduler: str | None = None
    spacing: str | None = None
    width: int | None = None
    height: int | None = None
    clip_skip: int = 0
    variation_seed: int | None = None
    variation_strength: float = 0.0
    image: np.ndarray | None = None  # uint8 [H, W, 3] at the size drawn, as are the mask and the control images
    strength: float | None = None
    mask: np.ndarray | None = None  # bool [H, W], true where the image is redrawn
    control_images: tuple[np.ndarray, ...] = ()
    controlnet_scale: float | tuple[float, ...] = 1.0
    hires: float | None = None
    hires_strength: float = 0.6
    hires_upscale: str = "pixel"
    matrix: bool = False  # whether {red|green} in the prompt stands for several, each with `n` images


@dataclasses.dataclass(frozen=True, eq=False)
class EnlargeRequest:
    """An image to be enlarged by the network."""

    image: np.ndarray  # uint8 [H, W, 3 or 4]
    scale: float
    steps: int = 1
    n: int = 1


Preview = Callable[[int, float, np.ndarray], None]  # index of the image, fraction of its steps taken, uint8 [H, W, 3]


class Job:
    """A request in progress. Clients wait for `future`; once it is done, nothing more is drawn for it."""

    def __init__(
        self,
        request: Any,  # DrawRequest or EnlargeRequest
        prompts: list[str],
        seeds: list[int],
        owner: str = "",
        previews: int = 0,
        on_preview: Preview | None = None,
    ) -> None:
        self.request, self.prompts, self.seeds, self.owner = (
            request,
            prompts,
            seeds,
            owner,
        )  # prompts and seeds: one an image
        self.future: concurrent.futures.Future[list[np.ndarray]] = concurrent.futures.Future()
        self.future.set_running_or_notify_cancel()  # from now on only `end` ends it
        self.images: list[np.ndarray | None] = [None] * len(seeds)
        self.fractions = [0.0] * len(seeds)  # fraction of the steps taken, by image
        self.started = False
        self.since = time.monotonic()
        self.watched = False  # whether the next preview is to be stored as `preview`
        self.preview: np.ndarray | None = None
        self.previews, self._sent, self._on_preview = previews, [0] * len(seeds), on_preview
        self._lock = threading.Lock()

    @property
    def fraction(self) -> float:
        """The fraction of its steps that are taken, from 0 to 1."""
        return sum(self.fractions) / len(self.fractions)

    def end(self, error: BaseException | None = None) -> None:
        """Complete the future with the images or an error; later calls have no effect."""
        with self._lock:
            if self.future.done():
                return
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result([image for image in self.images if image is not None])

    def cancel(self) -> None:
        self.end(Cancelled())

    def due(self, index: int, fraction: float) -> bool:
        """Whether a preview of an image is due when it has taken this fraction of its steps."""
        return self.watched or (
            self._on_preview is not None
            and self._sent[index] < self.previews
            and fraction * (self.previews + 1) >= self._sent[index] + 1 - 1e-9
        )

    def show(self, index: int, fraction: float, image: np.ndarray) -> None:
        """Take a preview that was due."""
        self.preview, self.watched = image, False
        if self._on_preview is not None and self.previews:
            self._sent[index] = max(self._sent[index] + 1, int(fraction * (self.previews + 1)))
            self._on_preview(index, fraction, image)
