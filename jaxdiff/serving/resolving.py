"""From a client's request to inputs of the sampler: the images of a request, and batches of them."""

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

CALL_ARGUMENTS = (
    "steps", "clip_skip", "scheduler", "spacing", "height", "width", "image", "strength", "mask", "hires",
    "hires_strength", "hires_upscale",
)  # fmt: skip
IMAGE_ARGUMENTS = (
    "guidance_scale", "guidance_rescale", "pag_scale", "image", "mask", "control_images", "controlnet_scale",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One image of a job."""

    job: Job
    index: int
    key: tuple[Any, ...]  # items with equal keys fit one batch
    program: tuple[Any, ...]  # items with equal values share a compiled program
    settings: Settings
    loras: Weighted
    row: ImageInputs  # without the batch axis and the keys
    seed: int
    since: float  # time of the request


@dataclasses.dataclass
class Resolver:
    """Checks requests and turns them into inputs of the sampler; see `Engine` for the fields."""

    model: Model
    limits: Limits
    loras: Loras
    batch_sizes: Sequence[int]

    @property
    def scheduler(self) -> str:
        """The scheduler of requests that name none."""
        return default_scheduler(self.model.scheduler)

    def size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height that are drawn, by default the first of the sizes. Raises ArgumentError for others."""
        default = self.limits.sizes[0]
        size = default[0] if width is None else width, default[1] if height is None else height
        if size not in self.limits.sizes:
            known = ", ".join(f"{w}x{h}" for w, h in self.limits.sizes)
            raise ArgumentError("size", f"{size[0]}x{size[1]} is not a size of this server; known are {known}.")
        return size

    def job(self, request: DrawRequest, *args: Any) -> Job:
        """A job with a prompt and a seed for each image. Raises ArgumentError."""
        self._check(request)
        prompts = [prompt for prompt in self._prompts(request) for _ in range(request.n)]
        first = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        return Job(request, prompts, [(first + i) % SEEDS for i in range(len(prompts))], *args)

    def _prompts(self, request: DrawRequest) -> list[str]:
        """The prompts that a matrix stands for."""
        if not request.matrix:
            return [request.prompt]
        try:
            return expand(request.prompt, matrix=True, limit=max(1, self.limits.images // request.n)).prompts
        except PromptError as e:
            raise ArgumentError("prompt", f"cannot be used: {e}") from None

    def _check(self, request: DrawRequest) -> None:
        """Raise ArgumentError if the request exceeds the limits."""
        limits = self.limits
        self.size(request.width, request.height)
        for name in ("prompt", "negative_prompt"):
            text = getattr(request, name) or ""
            if len(text) > limits.prompt:
                raise ArgumentError(name, f"has {len(text)} characters, more than {limits.prompt}: shorten it.")
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ArgumentError(name, "is not valid Unicode: it holds half of a surrogate pair.")
        ranges = (("n", 1, limits.images), ("steps", 1, limits.steps), ("guidance_scale", 0, limits.guidance_scale),
                   ("seed", 0, SEEDS - 1), ("variation_seed", 0, SEEDS - 1))  # fmt: skip
        for name, low, high in ranges:
            value = getattr(request, name)
            if value is not None and not low <= value <= high:
                raise ArgumentError(name, f"{value} must be from {low} to {high}.")

    def items(self, job: Job, now: float) -> list[Item]:
        """The images of a job. Raises ArgumentError."""
        width, height = self.size(job.request.width, job.request.height)
        shared: dict[str, Any] = {name: getattr(job.request, name) for name in CALL_ARGUMENTS}
        settings = resolve_settings(self.model, **(shared | {"height": height, "width": width}))
        items = []
        for prompt in dict.fromkeys(job.prompts):
            indices = [i for i, other in enumerate(job.prompts) if other == prompt]
            items += self._prompt_items(job, prompt, indices, settings, now)
        return sorted(items, key=lambda item: item.index)

    def _prompt_items(self, job: Job, prompt: str, indices: list[int], settings: Settings, now: float) -> list[Item]:
        """The images of one prompt, by their indices."""
        request, seeds = job.request, [job.seeds[i] for i in indices]
        text, loras = self.loras.split(prompt)
        arguments: dict[str, Any] = {name: getattr(request, name) for name in IMAGE_ARGUMENTS}
        has_variation = request.variation_seed is not None
        if has_variation:
            arguments |= {"variation_seed": request.variation_seed, "variation_strength": request.variation_strength}
        prompts = [text] * len(indices)
        images = resolve_images(self.model, settings, prompts, request.negative_prompt, seed=seeds, **arguments).images
        self._check_texts(images)
        no_keys: Any = None
        rows = jax.tree.map(np.asarray, images._replace(keys=no_keys))
        call_values = tuple(
            getattr(request, name) for name in CALL_ARGUMENTS if name not in ("image", "mask", "strength")
        )
        key = (*call_values, settings.strength, has_variation, loras, row_signature(rows))
        program = program_key(self.model, settings, rows)
        return [
            Item(job, i, key, program, settings, loras, jax.tree.map(lambda x, k=k: x[k], rows), job.seeds[i], now)
            for k, i in enumerate(indices)
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
        """A batch, padded with its last image."""
        size = next(size for size in self.batch_sizes if size >= len(batch))
        padded = batch + batch[-1:] * (size - len(batch))
        rows = jax.tree.map(lambda *each: np.stack(each), *(item.row for item in padded))
        images = rows._replace(keys=image_keys([item.seed for item in padded], size))
        requests, variation = [item.job.request for item in padded], None
        if requests[0].variation_seed is not None:
            seeds = [((r.variation_seed or 0) + item.index) % SEEDS for r, item in zip(requests, padded, strict=True)]
            amounts = np.asarray([r.variation_strength for r in requests], np.float32)
            variation = image_keys(seeds, size, "variation_seed"), amounts
        return Request(batch[0].settings, [item.job.prompts[item.index] for item in padded], images, variation)

    def example(self, count: int) -> Request:
        """A batch of the first size with default settings, for which a program is compiled ahead.

        A model for inpainting gets a grey image with a mask over all of it.
        """
        width, height = self.limits.sizes[0]
        inputs: dict[str, Any] = {}
        if self.model.inpaints:
            inputs = {"image": np.full((height, width, 3), 127, np.uint8), "mask": np.ones((height, width), bool)}
        settings = resolve_settings(self.model, steps=2, width=width, height=height, **inputs)
        return resolve_images(self.model, settings, [""] * count, "", **inputs)


def row_signature(rows: ImageInputs) -> tuple[Any, ...]:
    return jax.tree.structure(rows), tuple((x.shape[1:], x.dtype.str) for x in jax.tree.leaves(rows))


def program_key(model: Model, settings: Settings, rows: ImageInputs) -> tuple[Any, ...]:
    """What decides which program draws these images, except their number."""
    call = settings.call
    static = settings.scheduler, settings.clip_skip, settings.latents, settings.lowres_latents, settings.hires_upscale
    grid = padded_length(model, settings) or len(call.times.t), call.start is None, call.lowres_start is None
    # Before they are padded, there are as many picks as steps, so their shape does not count.
    return (*static, *grid, rows.picks is None, *row_signature(rows._replace(picks=None)))
