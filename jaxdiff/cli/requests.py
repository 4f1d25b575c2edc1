"""From the flags to a request for each image: its prompt, its seed, and the flags that draw it again."""

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.options import OPTIONS, Option, is_given
from jaxdiff.text.prompt_files import PromptError, PromptLine, read_prompts
from jaxdiff.text.styles import apply_style
from jaxdiff.text.wildcards import expand
from jaxdiff.typing import SEEDS

MAX_IMAGES = 10**6  # of a run
MAX_PADDING = 0.2  # maximum fraction of a device's images that only pad batches
ImageRequest = dict[str, Any]  # the flags that draw one image, by name


def prompt_lines(f: flags.FlagValues) -> list[PromptLine]:
    """A line for each image of all prompts, with alternatives expanded, the style applied and its seed.

    Seeds count up over all images; a line of a prompts file with a seed counts from that. Raises UsageError.
    """
    if f.wildcards is not None and not os.path.isdir(f.wildcards):
        raise UsageError(f"--wildcards: {f.wildcards} is not a folder: check the path.")
    try:
        expanded: list[PromptLine] = []
        lines = [PromptLine(p) for p in f.prompt] + file_lines(f)
        if len(lines) * f.num_images * (f.interpolate or 1) > MAX_IMAGES:
            flag = "interpolate" if f.interpolate else "num_images"
            raise UsageError(
                f"--{flag} {f[flag].value} makes more than {MAX_IMAGES} images: draw them in several runs."
            )
        for line in lines:
            negative = f.negative_prompt if line.negative_prompt is None else line.negative_prompt
            for (i, prompt), k in itertools.product(enumerate(alternatives(f, line.prompt)), range(f.num_images)):
                seed = (f.seed + len(expanded) if line.seed is None else line.seed + k) % SEEDS
                text = alternatives(f, line.prompt, seed)[i] if f.wildcards and not f.matrix else prompt
                expanded.append(PromptLine(text, negative, seed))
        if f.style is None:
            return expanded
    except PromptError as e:
        raise UsageError(str(e)) from None
    try:
        styled = [apply_style(line.prompt, line.negative_prompt, f.style, f.styles_file) for line in expanded]
    except PromptError as e:
        raise UsageError(f"--{'style' if f.styles_file is None else 'styles_file'}: {e}") from None
    return [PromptLine(*texts, line.seed) for texts, line in zip(styled, expanded, strict=True)]


def file_lines(f: flags.FlagValues) -> list[PromptLine]:
    """The lines of --prompts_file; [] if it is not given. Raises UsageError."""
    try:
        return read_prompts(f.prompts_file) if f.prompts_file else []
    except PromptError as e:
        raise UsageError(f"--prompts_file: {e}") from None


def alternatives(f: flags.FlagValues, prompt: str, seed: int = 0) -> list[str]:
    """The prompts that one prompt expands to; their number does not depend on the seed, which chooses wildcards."""
    return expand(prompt, f.wildcards, seed=seed, matrix=f.matrix).prompts if f.matrix or f.wildcards else [prompt]


def image_requests(f: flags.FlagValues, lines: list[PromptLine]) -> list[ImageRequest]:
    """The request of each image, in order: exactly the flags that draw this image again."""
    metadata_options = [option for option in OPTIONS.values() if option.in_metadata]
    shared = {option.name: f[option.name].value for option in metadata_options if is_recorded(f, option)}
    requests: list[ImageRequest] = []
    for line in lines:
        negative = {} if line.negative_prompt is None else {"negative_prompt": line.negative_prompt}
        requests.append({**shared, "prompt": line.prompt, "seed": line.seed, **negative})
    requests = animation(requests, f.interpolate) if f.interpolate else requests
    # In a fixed order, so that an image drawn again from its flags is the same file, byte by byte.
    return [{option.name: r[option.name] for option in metadata_options if option.name in r} for r in requests]


def is_recorded(f: flags.FlagValues, option: Option) -> bool:
    """Whether a flag belongs in the metadata: without it, the image would differ, now or with another default."""
    value = f[option.name].value
    if option.needs:
        return is_given(value) and is_given(f[option.needs].value)
    return (option.always and value is not None) or value != option.default


def animation(requests: list[ImageRequest], frames: int) -> list[ImageRequest]:
    """`frames` images from each request to the next; from a single one, to the image of the next seed."""
    if len(requests) == 1:
        requests = [*requests, requests[0] | {"seed": (requests[0]["seed"] + 1) % SEEDS}]
    negatives_differ = len({r.get("negative_prompt") for r in requests}) > 1

    def frame(a: ImageRequest, b: ImageRequest, fraction: float) -> ImageRequest:
        text = {"blend_prompt": b["prompt"], "blend": fraction}
        if negatives_differ:
            text["blend_negative_prompt"] = b.get("negative_prompt") or ""
        return a | text | {"variation_seed": b["seed"], "variation_strength": fraction}

    transitions = [frame(a, b, k / frames) for a, b in itertools.pairwise(requests) for k in range(frames)]
    return [*transitions, frame(requests[-1], requests[-1], 0.0)]


def count_images(f: flags.FlagValues, lines: list[PromptLine]) -> int:
    """The number of images that `image_requests` returns."""
    count = len(lines)
    return count if f.interpolate is None else max(count - 1, 1) * f.interpolate + 1


def sheet_columns(f: flags.FlagValues, count: int) -> int:
    """The number of columns of the sheet of `count` images.

    A row holds the images of a prompt, or those of the last alternatives of --matrix; else the sheet is about square.
    """
    if f.num_images > 1:
        return f.num_images
    if f.matrix and len(f.prompt) == 1:
        axes = expand(f.prompt[0], f.wildcards, seed=f.seed, matrix=True).axes
        return len(axes[-1]) if axes else 1
    return math.ceil(math.sqrt(count))


def batch_arguments(batch: list[ImageRequest]) -> dict[str, Any]:
    """The arguments of `resolve_images` for a batch, except images."""
    arguments: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        if option.part == "image" and any(name in r for r in batch):
            arguments[option.argument or name] = [r.get(name) for r in batch]
        if option.part == "prompts" and name in batch[0]:
            arguments[name] = batch[0][name]
    return arguments


def batch_size(groups: Sequence[int], devices: int, max_per_device: int = 4) -> int:
    """One size for all batches, from 1 to `max_per_device` images a device, so that one program draws all.

    Of the sizes with which at most MAX_PADDING of a device's images are padding, it is the smallest with the fewest
    batches. If one image a device is enough, it is a power of 2, so that few programs are compiled over time.

    Args:
        groups: sizes of the groups of images that may share a batch.
        devices: number of devices.
    """

    def num_batches(per_device: int) -> int:
        return sum(math.ceil(count / (per_device * devices)) for count in groups)

    candidates = [n for n in range(1, max_per_device + 1) if (1 - MAX_PADDING) * n * num_batches(n) <= num_batches(1)]
    per_device = min(candidates, key=lambda n: (num_batches(n), n))
    return min(devices, 2 ** math.ceil(math.log2(max(groups)))) if per_device == 1 else per_device * devices
