"""What both APIs share: submit requests, wait for their images, and keep files that are fetched later."""

import asyncio
import base64
import collections
import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from fastapi import Request
from starlette.concurrency import run_in_threadpool

from jaxdiff.serving.engine import Engine
from jaxdiff.serving.enlarging import check_enlarging
from jaxdiff.serving.errors import HttpError
from jaxdiff.serving.requests import Cancelled, DrawRequest, EnlargeRequest, Job
from jaxdiff.serving.uploads import encode_image
from jaxdiff.text.styles import apply_style
from jaxdiff.typing import SEEDS

KEEPALIVE = 15.0  # seconds without an event after which a stream sends a comment


class Files:
    """Images that clients fetch later, under random names, kept for a limited time and within a memory budget.

    Safe to use from several threads at once.

    Args:
        seconds: for which a file is kept.
        room: maximum bytes of all files; the oldest are dropped first.
    """

    def __init__(self, seconds: float = 600.0, room: int = 256 << 20) -> None:
        self._seconds, self._max_bytes, self._size = seconds, room, 0
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[str, tuple[float, str, bytes]] = collections.OrderedDict()

    def add(self, data: bytes, format: str) -> str:
        """Keep a file; returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{format}"
        with self._lock:
            self._files[name] = time.monotonic() + self._seconds, format, data
            self._size += len(data)
            self._forget()
        return name

    def get(self, name: str) -> tuple[str, bytes] | None:
        """The format and bytes of a file that is still there."""
        with self._lock:
            self._forget()
            entry = self._files.get(name)
        return None if entry is None else entry[1:]

    def _forget(self) -> None:
        now = time.monotonic()
        while self._files:
            end, _, data = next(iter(self._files.values()))
            if end > now and self._size <= self._max_bytes:
                return
            self._size -= len(data)
            self._files.popitem(last=False)


@dataclasses.dataclass
class Service:
    """The engine, with the names and limits that the APIs report."""

    engine: Engine
    name: str  # of the model
    flags: dict[str, Any]  # metadata of all images: model, dtype
    steps: int = 25
    pixels: int = 4096 * 4096  # maximum of an uploaded image, and of an enlarged one
    upscaler: str | None = None  # name of the network that enlarges
    files: Files = dataclasses.field(default_factory=Files)

    async def submit(self, http: Request, request: DrawRequest, **options: Any) -> Job:
        """Ask the engine; resolving a request takes some milliseconds. Raises what `Engine.submit` does."""
        return await run_in_threadpool(self.engine.submit, request, owner=owner(http), **options)

    async def wait_for_images(self, http: Request, job: Job) -> list[np.ndarray]:
        """Wait for the images; a client that has gone, or waits too long, cancels them."""
        future = asyncio.wrap_future(job.future)
        future.add_done_callback(lambda f: f.cancelled() or f.exception())  # marks its exception as retrieved
        disconnect = asyncio.create_task(disconnected(http))
        try:
            tasks: set[asyncio.Future[Any]] = {future, disconnect}
            await asyncio.wait(tasks, timeout=self.engine.limits.seconds, return_when="FIRST_COMPLETED")
            if future.done():
                return future.result()
            raise Cancelled if disconnect.done() else self.timeout_error()
        finally:
            disconnect.cancel()
            job.cancel()

    def timeout_error(self) -> HttpError:
        seconds = self.engine.limits.seconds
        return HttpError(504, f"The images were not drawn within {seconds:g} s: ask for fewer.", code="timeout")

    async def events(
        self, http: Request, request: DrawRequest, previews: int, format_event: Callable[..., str]
    ) -> AsyncIterator[str]:
        """Ask the engine, then give the parts of a stream. Raises what `submit` does, before the first part.

        Args:
            previews: of each image.
            format_event: (job, index, image, number of the preview or None), or error= -> the text of one event.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, np.ndarray] | None] = asyncio.Queue()

        def put(part: tuple[int, np.ndarray] | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, part)

        job = await self.submit(http, request, previews=previews, on_preview=lambda i, _, image: put((i, image)))
        job.future.add_done_callback(lambda _: put(None))
        return self._parts(http, job, queue, format_event)

    async def _parts(
        self, http: Request, job: Job, queue: asyncio.Queue, format_event: Callable[..., str]
    ) -> AsyncIterator[str]:
        disconnect = asyncio.create_task(disconnected(http))

        def cancel_job(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                job.cancel()

        disconnect.add_done_callback(cancel_job)
        sent = [0] * len(job.seeds)
        deadline = time.monotonic() + self.engine.limits.seconds
        try:
            while True:
                try:
                    part = await asyncio.wait_for(queue.get(), min(KEEPALIVE, max(0.0, deadline - time.monotonic())))
                except TimeoutError:
                    if time.monotonic() >= deadline:
                        yield format_event(error=self.timeout_error())
                        return
                    yield ": drawing\n\n"
                    continue
                if part is None:
                    break
                index, image = part
                yield await run_in_threadpool(format_event, job, index, image, sent[index])
                sent[index] += 1
            error = job.future.exception()
            if error is not None:
                yield format_event(error=error)
                return
            for index, image in enumerate(job.future.result()):
                yield await run_in_threadpool(format_event, job, index, image, None)
        finally:
            disconnect.cancel()
            job.cancel()

    def apply_style(self, prompt: str, negative_prompt: str | None, style: str | None) -> tuple[str, str | None]:
        """Prompts in a style of this name. Raises PromptError."""
        return (prompt, negative_prompt) if style is None else apply_style(prompt, negative_prompt, style)

    def metadata(self, job: Job, index: int) -> dict[str, Any]:
        """The flags that draw an image again, but for images that were uploaded."""
        request, engine = job.request, self.engine
        width, height = engine.resolver.size(request.width, request.height)
        default_scale = engine.model.options.guidance_scale
        flags: dict[str, Any] = {
            "prompt": job.prompts[index],
            "negative_prompt": request.negative_prompt,
            "seed": job.seeds[index],
            "steps": request.steps,
            "guidance_scale": default_scale if request.guidance_scale is None else request.guidance_scale,
            "pag_scale": (engine.model.options.pag_scale or None) if request.pag_scale is None else request.pag_scale,
            "scheduler": request.scheduler or engine.resolver.scheduler,
            "spacing": request.spacing,
            "height": height,
            "width": width,
            "clip_skip": request.clip_skip or None,
            "strength": request.strength if request.image is not None else None,
            **self.flags,
        }
        if request.hires is not None:
            flags |= {name: getattr(request, name) for name in ("hires", "hires_strength", "hires_upscale")}
        if request.variation_seed is not None:
            flags["variation_seed"] = (request.variation_seed + index) % SEEDS
            flags["variation_strength"] = request.variation_strength
        return {name: value for name, value in flags.items() if value is not None}

    def enlarge(self, owner: str, image: np.ndarray, scale: float) -> Job:
        """Ask the engine to enlarge an image. Raises ArgumentError, and what `Engine.enlarge` does."""
        height, width = image.shape[:2]
        check_enlarging(self.engine.model, height, width, scale, self.pixels)
        return self.engine.enlarge(EnlargeRequest(image, scale), owner=owner)

    def base64(self, job: Job, index: int, image: np.ndarray, format: str = "png", quality: int = 95) -> str:
        return base64.b64encode(encode_image(image, self.metadata(job, index), format, quality)).decode()


def owner(http: Request) -> str:
    """The client, by its address."""
    return http.client.host if http.client else ""


async def disconnected(http: Request) -> None:
    """Returns when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
