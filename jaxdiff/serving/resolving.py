"""From what a client asks for to what one program draws: the images of a request, and batches of them."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdiff.diffusion.times import default_scheduler
from jaxdiff.errors import ArgumentError
from jaxdiff.io.lora import Weighted
from jaxdiff.models.model import Model
from jaxdiff.sampling.generate import padded_length
from jaxdiff.sampling.inputs import ImageInputs
from jaxdiff.sampling.noise import image_keys
from jaxdiff.sampling.resolve import Request, Settings, resolve_images, resolve_settings
from jaxdiff.serving.loras import Loras
from jaxdiff.serving.requests import DrawRequest, Job, Limits
from jaxdiff.text.prompt_files import PromptError
from jaxdiff.text.wildcards import expand
from jaxdiff.typing import SEEDS

SHARED = ("steps", "clip_skip", "scheduler", "spacing", "height", "width", "image", "strength", "mask", "hires",
          "hires_strength", "hires_upscale")  # fmt: skip
EACH = ("guidance_scale", "guidance_rescale", "pag_scale", "image", "mask", "control_images", "controlnet_scale")


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One image of a job."""

    job: Job
    index: int
    key: tuple[Any, ...]  # items with equal keys fit one batch
    program: tuple[Any, ...]  # items with equal values share a compiled program
    settings: Settings
    loras: Weighted
    row: ImageInputs  # without the axis of the batch, and without a key
    seed: int
    since: float  # when it was asked for


@dataclasses.dataclass
class Resolver:
    """Checks requests and brings them into form; see `Engine` for the fields."""

    model: Model
    limits: Limits
    loras: Loras
    batch_sizes: Sequence[int]

    @property
    def scheduler(self) -> str:
        """What draws where a request names none."""
        return default_scheduler(self.model.scheduler)

    def size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height that are drawn, by default the first of the sizes. Raises ArgumentError for others."""
        own = self.limits.sizes[0]
        size = own[0] if width is None else width, own[1] if height is None else height
        if size not in self.limits.sizes:
            known = ", ".join(f"{w}x{h}" for w, h in self.limits.sizes)
            raise ArgumentError("size", f"{size[0]}x{size[1]} is not a size of this server; known are {known}.")
        return size

    def job(self, request: DrawRequest, *more: Any) -> Job:
        """A job with a prompt and a seed for each image. Raises ArgumentError."""
        self._check(request)
        prompts = [prompt for prompt in self._prompts(request) for _ in range(request.n)]
        first = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        return Job(request, prompts, [(first + i) % SEEDS for i in range(len(prompts))], *more)

    def _prompts(self, request: DrawRequest) -> list[str]:
        """The prompts that a matrix stands for."""
        if not request.matrix:
            return [request.prompt]
        try:
            return expand(request.prompt, matrix=True, limit=max(1, self.limits.images // request.n)).prompts
        except PromptError as e:
            raise ArgumentError("prompt", f"cannot be used: {e}") from None

    def _check(self, request: DrawRequest) -> None:
        """Raise ArgumentError for more than the limits."""
        limits = self.limits
        self.size(request.width, request.height)
        for name in ("prompt", "negative_prompt"):
            text = getattr(request, name) or ""
            if len(text) > limits.prompt:
                raise ArgumentError(name, f"has {len(text)} characters, more than {limits.prompt}: shorten it.")
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ArgumentError(name, "is not valid Unicode: it holds half of a surrogate pair.")
        numbers = (("n", 1, limits.images), ("steps", 1, limits.steps), ("guidance_scale", 0, limits.guidance_scale),
                   ("seed", 0, SEEDS - 1), ("variation_seed", 0, SEEDS - 1))  # fmt: skip
        for name, low, high in numbers:
            value = getattr(request, name)
            if value is not None and not low <= value <= high:
                raise ArgumentError(name, f"{value} must be from {low} to {high}.")

    def items(self, job: Job, now: float) -> list[Item]:
        """The images of a job. Raises ArgumentError."""
        width, height = self.size(job.request.width, job.request.height)
        shared: dict[str, Any] = {name: getattr(job.request, name) for name in SHARED}
        settings = resolve_settings(self.model, **(shared | {"height": height, "width": width}))
        found = []
        for prompt in dict.fromkeys(job.prompts):
            mine = [i for i, other in enumerate(job.prompts) if other == prompt]
            found += self._items_of(job, prompt, mine, settings, now)
        return sorted(found, key=lambda item: item.index)

    def _items_of(self, job: Job, prompt: str, numbers: list[int], settings: Settings, now: float) -> list[Item]:
        """The images of one prompt, by their numbers."""
        request, seeds = job.request, [job.seeds[i] for i in numbers]
        words, chosen = self.loras.split(prompt)
        each: dict[str, Any] = {name: getattr(request, name) for name in EACH}
        varied = request.variation_seed is not None
        if varied:
            each |= {"variation_seed": request.variation_seed, "variation_strength": request.variation_strength}
        prompts = [words] * len(numbers)
        images = resolve_images(self.model, settings, prompts, request.negative_prompt, seed=seeds, **each).images
        self._check_texts(images)
        no_keys: Any = None
        rows = jax.tree.map(np.asarray, images._replace(keys=no_keys))
        alike = tuple(getattr(request, name) for name in SHARED if name not in ("image", "mask", "strength"))
        key = (*alike, settings.strength, varied, chosen, shapes_of(rows))
        program = program_of(self.model, settings, rows)
        return [
            Item(job, i, key, program, settings, chosen, jax.tree.map(lambda x, k=k: x[k], rows), job.seeds[i], now)
            for k, i in enumerate(numbers)
        ]

    def _check_texts(self, images: ImageInputs) -> None:
        """Raise ArgumentError for prompts that fill too many texts."""
        tokenizer = self.model.tokenizer or self.model.tokenizer_2
        assert tokenizer is not None
        texts = max(
            np.prod(t.ids.shape[1:]) // tokenizer.max_length for t in (images.tokens, images.negative) if t is not None
        )
        if texts > self.limits.texts:
            raise ArgumentError("prompt", f"fills {texts} texts, more than {self.limits.texts}: shorten it.")

    def request(self, batch: list[Item]) -> Request:
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
        return Request(batch[0].settings, [item.job.prompts[item.index] for item in filled], images, variation)

    def example(self, count: int) -> Request:
        """A batch of the first size without other wishes, for which a program is compiled ahead.

        A model for inpainting gets a grey image that is all to be redrawn.
        """
        width, height = self.limits.sizes[0]
        given: dict[str, Any] = {}
        if self.model.inpaints:
            given = {"image": np.full((height, width, 3), 127, np.uint8), "mask": np.ones((height, width), bool)}
        settings = resolve_settings(self.model, steps=2, width=width, height=height, **given)
        return resolve_images(self.model, settings, [""] * count, "", **given)


def shapes_of(rows: ImageInputs) -> tuple[Any, ...]:
    return jax.tree.structure(rows), tuple((x.shape[1:], x.dtype.str) for x in jax.tree.leaves(rows))


def program_of(model: Model, settings: Settings, rows: ImageInputs) -> tuple[Any, ...]:
    """What decides which program draws these images, but for their number."""
    call, picks = settings.call, rows.picks is None  # of which there are as many as steps, before they are filled up
    static = settings.scheduler, settings.clip_skip, settings.latents, settings.lowres_latents, settings.hires_upscale
    grid = padded_length(model, settings) or len(call.times.t), call.start is None, call.lowres_start is None
    return (*static, *grid, picks, *shapes_of(rows._replace(picks=None)))
