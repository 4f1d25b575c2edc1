"""Adapters that flags and prompts add to a model. Their files are read before the model's own weights."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from jax.sharding import Mesh

import jaxdiff
from jaxdiff.cli.errors import UsageError, file_errors
from jaxdiff.cli.flags import parse_embedding, parse_lora
from jaxdiff.cli.requests import ImageRequest
from jaxdiff.io import lora_folders
from jaxdiff.io.controlnet import load_controlnet
from jaxdiff.io.lora import Lora, Weighted, read_lora
from jaxdiff.io.textual_inversion import Word, read_textual_inversion
from jaxdiff.io.vae import load_tiny_vae
from jaxdiff.text.other_programs import LoraTag, split_tags
from jaxdiff.text.prompt_files import PromptError
from jaxdiff.typing import Params


class Adapters(NamedTuple):
    """Adapters of a model, except those of its autoencoder."""

    words: list[Word]
    loras: list[tuple[Lora, float]]
    controlnets: list[tuple[Any, Params]]
    tiny_vae: tuple[Any, Params] | None


def read_adapters(f: flags.FlagValues, model: jaxdiff.Model, mesh: Mesh | None = None) -> Adapters:
    """The files of --embedding, --lora, --controlnet and --preview_vae. Raises UsageError.

    Args:
        mesh: to shard ControlNets over.
    """
    with file_errors("--embedding"):
        words = read_textual_inversion(model, [parse_embedding(given) for given in f.embedding])
    with file_errors("--lora"):
        loras = [(read_lora(model, path), weight) for path, weight in map(parse_lora, f.lora)]
    with file_errors("--controlnet"):
        unet_config = None if model.unet is None else model.unet.config
        options: Any = {"dtype": f.dtype, "like": unet_config, "mesh": mesh}
        controlnets = [load_controlnet(path, **options) for path in f.controlnet]
        jaxdiff.with_controlnets(model, {}, *controlnets)  # raises if one does not fit
    with file_errors("--preview_vae"):
        return Adapters(
            words, loras, controlnets, load_tiny_vae(f.preview_vae, dtype=f.dtype) if f.preview_vae else None
        )


def prompt_loras(f: flags.FlagValues, requests: Sequence[ImageRequest]) -> list[Weighted]:
    """The LoRAs of --lora_dir that each image's prompt names, with their weights. Raises UsageError."""
    if f.lora_dir is None:
        return [()] * len(requests)
    files = lora_folders.files_below(f.lora_dir)

    @functools.cache
    def find(name: str) -> Path:
        matches = lora_folders.named(files, name)
        if len(matches) == 1:
            return matches[0]
        if matches:
            both = f"{matches[0]} and {matches[1]}"
            raise UsageError(f"--lora_dir: <lora:{name}> may be {both}: write <lora:{files[matches[0]]}>.")
        available = ", ".join(path.stem for path in list(files)[:10]) or "no LoRA"
        raise UsageError(f"--lora_dir {f.lora_dir} has no {name}.safetensors for <lora:{name}>: it has {available}.")

    def resolve_tag(tag: LoraTag) -> tuple[Path, float, float]:
        return find(tag.name), tag.text_encoder, tag.unet

    try:
        return [tuple(map(resolve_tag, split_tags(request["prompt"])[1])) for request in requests]
    except PromptError as e:
        raise UsageError(f"--prompt: {e}") from None


def without_tags(f: flags.FlagValues, request: ImageRequest) -> ImageRequest:
    """An image's flags without the LoRA tags in its prompt, which --lora_dir applies to the model."""
    if f.lora_dir is None:
        return request
    prompt, tags = split_tags(request["prompt"])
    blend_prompt = request.get("blend_prompt")
    if blend_prompt is not None:
        blend_text, blend_tags = split_tags(blend_prompt)
        if blend_tags == tags:  # other tags are left out later, with a warning
            request = request | {"blend_prompt": blend_text}
    return request | {"prompt": prompt}


def read_prompt_loras(model: jaxdiff.Model, chosen: Sequence[Weighted]) -> dict[Path, Lora]:
    """All LoRAs that prompts name, by file. Raises UsageError."""
    with file_errors("--lora_dir"):
        return {path: read_lora(model, path) for path in sorted({path for loras in chosen for path, *_ in loras})}


def batch_slices(chosen: Sequence[Weighted], size: int) -> Iterator[tuple[int, int]]:
    """Batches as (start, end): at most `size` consecutive images whose prompts name the same LoRAs."""
    for _, group in itertools.groupby(range(len(chosen)), lambda i: chosen[i]):
        indices = list(group)
        for i in range(0, len(indices), size):
            yield indices[i], indices[min(i + size, len(indices)) - 1] + 1
