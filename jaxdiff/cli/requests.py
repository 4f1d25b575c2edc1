"""From the flags of sample.py to the pictures to draw: each one's prompt, seed, and the flags that draw it again."""

import itertools
import math
from typing import Any

from absl import flags

from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.sample_flags import NEEDS, SEEDS, is_given
from jaxdiff.prompts import PromptError, PromptLine, read_prompts
from jaxdiff.styles import apply_style
from jaxdiff.wildcards import expand

# Arguments of `generate` that all pictures of a call share, and those that each has for itself.
SHARED = ("steps", "guidance_rescale", "guidance_interval", "clip_skip", "emphasis", "scheduler", "spacing", "height",
          "width", "strength", "noise_level", "hires", "hires_strength", "hires_upscale", "tile")  # fmt: skip
EACH = ("seed", "guidance_scale", "prompt_2", "negative_prompt_2", "blend_prompt", "blend_negative_prompt",
        "blend", "variation_seed", "variation_strength")  # fmt: skip
# What draws a picture again beside them. The batch size is one of them, and so is the preview: other shapes and other
# programs may round otherwise.
REST = ("negative_prompt", "image", "mask", "outpaint", "controlnet", "control_image", "controlnet_scale",
        "control_edges", "lora", "embedding", "vae", "model", "prediction_type", "dtype", "batch_size", "preview",
        "preview_vae")  # fmt: skip
ARGUMENTS = {  # what `generate` calls a flag
    "prompt_2": "prompts_2",
    "negative_prompt_2": "negative_prompts_2",
    "blend_prompt": "blend_prompts",
    "blend_negative_prompt": "blend_negative_prompts",
}
Picture = dict[str, Any]


def lines(f: flags.FlagValues) -> list[PromptLine]:
    """The line of each picture, with its seed, of all flags and files, expanded and in style; raises UsageError.

    Seeds count up over all pictures; a line of a prompts file that has a seed starts its own.
    """
    try:
        found: list[PromptLine] = []
        for line in [PromptLine(p) for p in f.prompt] + (read_prompts(f.prompts_file) if f.prompts_file else []):
            negative = f.negative_prompt if line.negative_prompt is None else line.negative_prompt
            for (i, prompt), k in itertools.product(enumerate(alternatives(f, line.prompt)), range(f.num_images)):
                seed = (f.seed + len(found) if line.seed is None else line.seed + k) % SEEDS
                drawn = alternatives(f, line.prompt, seed)[i] if f.wildcards and not f.matrix else prompt
                found.append(PromptLine(drawn, negative, seed))
        if f.style is None:
            return found
        styled = [apply_style(line.prompt, line.negative_prompt, f.style, f.styles_file) for line in found]
        return [PromptLine(*texts, line.seed) for texts, line in zip(styled, found, strict=True)]
    except PromptError as e:
        raise UsageError(str(e)) from None


def alternatives(f: flags.FlagValues, prompt: str, seed: int = 0) -> list[str]:
    """The prompts that one of the flags' stands for; how many does not depend on the seed, which draws wildcards."""
    return expand(prompt, f.wildcards, seed=seed, matrix=f.matrix).prompts if f.matrix or f.wildcards else [prompt]


def plan(f: flags.FlagValues, given: list[PromptLine]) -> list[Picture]:
    """The pictures in order: what tells each from the others, and the flags that draw it again, to the byte."""
    shared = {name: f[name].value for name in (*EACH, *SHARED, *REST) if name in f and name != "seed"}
    for name, needed in NEEDS.items():
        if name in shared and not is_given(shared[needed]):
            shared[name] = None
    if f["emphasis"].value:
        shared["emphasis"] = None  # as by default
    for name in ("guidance_rescale", "clip_skip", "control_edges", "preview"):  # switched off
        shared[name] = shared[name] or None
    if not f["noise_level"].present:
        shared["noise_level"] = None
    shared = {name: value for name, value in shared.items() if value not in (None, [])}
    pictures: list[Picture] = []
    for line in given:
        negative: Picture = {} if line.negative_prompt is None else {"negative_prompt": line.negative_prompt}
        pictures.append({"prompt": line.prompt, "seed": line.seed, **shared, **negative})
    pictures = film(pictures, f.interpolate) if f.interpolate else pictures
    # In one order, so that a picture drawn again from its flags is the same file.
    return [{name: p[name] for name in ("prompt", *EACH, *SHARED, *REST) if name in p} for p in pictures]


def film(pictures: list[Picture], frames: int) -> list[Picture]:
    """So many pictures from each one to the next; from a single one, to the picture of the next seed."""
    if len(pictures) == 1:
        pictures = [*pictures, pictures[0] | {"seed": (pictures[0]["seed"] + 1) % SEEDS}]
    negative = len({p.get("negative_prompt") for p in pictures}) > 1

    def frame(a: Picture, b: Picture, part: float) -> Picture:
        text = {"blend_prompt": b["prompt"], "blend": part}
        if negative:
            text["blend_negative_prompt"] = b.get("negative_prompt") or ""
        return a | text | {"variation_seed": b["seed"], "variation_strength": part}

    between = [frame(a, b, k / frames) for a, b in itertools.pairwise(pictures) for k in range(frames)]
    return [*between, frame(pictures[-1], pictures[-1], 0.0)]


def how_many(f: flags.FlagValues, given: list[PromptLine]) -> int:
    """How many pictures `plan` will have."""
    count = len(given)
    return count if f.interpolate is None else max(count - 1, 1) * f.interpolate + 1


def columns(f: flags.FlagValues, count: int) -> int:
    """Of the sheet of `count` pictures: a prompt's in a row, else a matrix's last alternatives, else near a square."""
    if f.num_images > 1:
        return f.num_images
    if f.matrix and len(f.prompt) == 1:
        axes = expand(f.prompt[0], f.wildcards, seed=f.seed, matrix=True).axes
        return len(axes[-1]) if axes else 1
    return math.ceil(math.sqrt(count))


def arguments(batch: list[Picture]) -> dict[str, Any]:
    """The arguments of `generate` that draw a batch, but for pictures."""
    first = batch[0]
    options = {name: first[name] for name in SHARED if name in first}
    options |= {ARGUMENTS.get(name, name): [p[name] for p in batch] for name in EACH if name in first}
    negative = [p.get("negative_prompt") for p in batch]
    return {"prompts": [p["prompt"] for p in batch], "negative_prompts": negative, **options}


def batch_size(total: int, devices: int) -> int:
    """Batches of equal size, of at most 4 pictures a device."""
    return math.ceil(total / math.ceil(total / (4 * devices)))
