"""What both APIs do alike: ask the engine, wait for it, and keep what is fetched later."""

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
from jaxdiff.serving.uploads import encoded
from jaxdiff.text.styles import apply_style
from jaxdiff.typing import SEEDS

QUIET = 15.0  # seconds after which a stream says that it is alive


class Files:
    """Images that clients fetch later, under random names, kept for a limited time and within a memory budget.

    Safe to use from several threads at once.

    Args:
        seconds: for which a file is kept.
        room: bytes of all files together; the oldest are dropped first.
    """

    def __init__(self, seconds: float = 600.0, room: int = 256 << 20) -> None:
        self._seconds, self._room, self._size = seconds, room, 0
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[str, tuple[float, str, bytes]] = collections.OrderedDict()

    def add(self, data: bytes, format: str) -> str:
        """Keep a file; returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{format}"
        with self._lock:
            self._kept[name] = time.monotonic() + self._seconds, format, data
            self._size += len(data)
            self._forget()
        return name

    def get(self, name: str) -> tuple[str, bytes] | None:
        """The format and bytes of a file that is still there."""
        with self._lock:
            self._forget()
            found = self._kept.get(name)
        return None if found is None else found[1:]

    def _forget(self) -> None:
        now = time.monotonic()
        while self._kept:
            end, _, data = next(iter(self._kept.values()))
            if end > now and self._size <= self._room:
                return
            self._size -= len(data)
            self._kept.popitem(last=False)


@dataclasses.dataclass
class Service:
    """The engine with what the APIs say about it."""

    engine: Engine
    name: str  # of the model
    flags: dict[str, Any]  # that draw an image again beside its own: model, dtype
    steps: int = 25
    pixels: int = 4096 * 4096  # of an uploaded image, and of one that is enlarged
    upscaler: str | None = None  # name of the network that enlarges
    files: Files = dataclasses.field(default_factory=Files)

    async def submit(self, http: Request, asked: DrawRequest, **more: Any) -> Job:
        """Ask the engine; resolving a request takes some milliseconds. Raises what `Engine.submit` does."""
        return await run_in_threadpool(self.engine.submit, asked, owner=owner(http), **more)

    async def finished(self, http: Request, job: Job) -> list[np.ndarray]:
        """Wait for the images; a client that has gone, or waits too long, cancels them."""
        future = asyncio.wrap_future(job.future)
        future.add_done_callback(lambda f: f.cancelled() or f.exception())  # said to be seen
        gone = asyncio.create_task(disconnected(http))
        try:
            both: set[asyncio.Future[Any]] = {future, gone}
            await asyncio.wait(both, timeout=self.engine.limits.seconds, return_when="FIRST_COMPLETED")
            if future.done():
                return future.result()
            raise Cancelled if gone.done() else self.late()
        finally:
            gone.cancel()
            job.cancel()

    def late(self) -> HttpError:
        seconds = self.engine.limits.seconds
        return HttpError(504, f"The images were not drawn within {seconds:g} s: ask for fewer.", code="timeout")

    async def events(
        self, http: Request, asked: DrawRequest, previews: int, form: Callable[..., str]
    ) -> AsyncIterator[str]:
        """Ask the engine, then give the parts of a stream. Raises what `submit` does, before the first part.

        Args:
            previews: of each image.
            form: (job, index, image, number of the preview or None) -> the text of one event; or of an error.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, np.ndarray] | None] = asyncio.Queue()

        def put(what: tuple[int, np.ndarray] | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, what)

        job = await self.submit(http, asked, previews=previews, on_preview=lambda i, _, image: put((i, image)))
        job.future.add_done_callback(lambda _: put(None))
        return self._parts(http, job, queue, form)

    async def _parts(
        self, http: Request, job: Job, queue: asyncio.Queue, form: Callable[..., str]
    ) -> AsyncIterator[str]:
        gone = asyncio.create_task(disconnected(http))

        def left(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                job.cancel()

        gone.add_done_callback(left)
        sent = [0] * len(job.seeds)
        deadline = time.monotonic() + self.engine.limits.seconds
        try:
            while True:
                try:
                    part = await asyncio.wait_for(queue.get(), min(QUIET, max(0.0, deadline - time.monotonic())))
                except TimeoutError:
                    if time.monotonic() >= deadline:
                        yield form(error=self.late())
                        return
                    yield ": drawing\n\n"
                    continue
                if part is None:
                    break
                index, image = part
                yield await run_in_threadpool(form, job, index, image, sent[index])
                sent[index] += 1
            error = job.future.exception()
            if error is not None:
                yield form(error=error)
                return
            for index, image in enumerate(job.future.result()):
                yield await run_in_threadpool(form, job, index, image, None)
        finally:
            gone.cancel()
            job.cancel()

    def styled(self, prompt: str, negative_prompt: str | None, style: str | None) -> tuple[str, str | None]:
        """Prompts in a style of this name. Raises PromptError."""
        return (prompt, negative_prompt) if style is None else apply_style(prompt, negative_prompt, style)

    def metadata(self, job: Job, index: int) -> dict[str, Any]:
        """The flags that draw an image again, but for images that were uploaded."""
        asked, engine = job.request, self.engine
        width, height = engine.resolver.size(asked.width, asked.height)
        own = engine.model.options.guidance_scale
        given: dict[str, Any] = {
            "prompt": job.prompts[index],
            "negative_prompt": asked.negative_prompt,
            "seed": job.seeds[index],
            "steps": asked.steps,
            "guidance_scale": own if asked.guidance_scale is None else asked.guidance_scale,
            "pag_scale": (engine.model.options.pag_scale or None) if asked.pag_scale is None else asked.pag_scale,
            "scheduler": asked.scheduler or engine.resolver.scheduler,
            "spacing": asked.spacing,
            "height": height,
            "width": width,
            "clip_skip": asked.clip_skip or None,
            "strength": asked.strength if asked.image is not None else None,
            **self.flags,
        }
        if asked.hires is not None:
            given |= {name: getattr(asked, name) for name in ("hires", "hires_strength", "hires_upscale")}
        if asked.variation_seed is not None:
            given["variation_seed"] = (asked.variation_seed + index) % SEEDS
            given["variation_strength"] = asked.variation_strength
        return {name: value for name, value in given.items() if value is not None}

    def enlarge(self, owner: str, image: np.ndarray, scale: float) -> Job:
        """Ask the engine to enlarge an image. Raises ArgumentError, and what `Engine.enlarge` does."""
        height, width = image.shape[:2]
        check_enlarging(self.engine.model, height, width, scale, self.pixels)
        return self.engine.enlarge(EnlargeRequest(image, scale), owner=owner)

    def base64(self, job: Job, index: int, image: np.ndarray, format: str = "png", quality: int = 95) -> str:
        return base64.b64encode(encoded(image, self.metadata(job, index), format, quality)).decode()


def owner(http: Request) -> str:
    """Who asks, as far as that can be told."""
    return http.client.host if http.client else ""


async def disconnected(http: Request) -> None:
    """Returns when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
