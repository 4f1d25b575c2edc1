"""Adapters that flags and prompts add to a model. Their files are read before the model's own weights."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from jax.sharding import Mesh

import jaxdiff
from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.flags import named, weighted
from jaxdiff.cli.requests import ImageRequest
from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
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


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Turn errors of a file into errors of the flag that names it."""
    try:
        yield
    except (ConfigError, WeightsError) as e:
        raise UsageError(f"{flag}: {e}") from None


def read_adapters(f: flags.FlagValues, model: jaxdiff.Model, mesh: Mesh | None = None) -> Adapters:
    """The files of --embedding, --lora, --controlnet and --preview_vae. Raises UsageError.

    Args:
        mesh: to shard ControlNets over.
    """
    with naming("--embedding"):
        words = read_textual_inversion(model, [named(given) for given in f.embedding])
    with naming("--lora"):
        loras = [(read_lora(model, path), weight) for path, weight in map(weighted, f.lora)]
    with naming("--controlnet"):
        like = None if model.unet is None else model.unet.config
        more: Any = {"dtype": f.dtype, "like": like, "mesh": mesh}
        nets = [load_controlnet(path, **more) for path in f.controlnet]
        jaxdiff.with_controlnets(model, {}, *nets)  # checks them
    with naming("--preview_vae"):
        return Adapters(words, loras, nets, load_tiny_vae(f.preview_vae, dtype=f.dtype) if f.preview_vae else None)


def named_loras(f: flags.FlagValues, requests: Sequence[ImageRequest]) -> list[Weighted]:
    """The LoRAs of --lora_dir that each image's prompt names, with their weights. Raises UsageError."""
    if f.lora_dir is None:
        return [()] * len(requests)
    files = lora_folders.files_below(f.lora_dir)

    @functools.cache
    def find(name: str) -> Path:
        found = lora_folders.named(files, name)
        if len(found) == 1:
            return found[0]
        if found:
            both = f"{found[0]} and {found[1]}"
            raise UsageError(f"--lora_dir: <lora:{name}> may be {both}: write <lora:{files[found[0]]}>.")
        there = ", ".join(path.stem for path in list(files)[:10]) or "no LoRA"
        raise UsageError(f"--lora_dir {f.lora_dir} has no {name}.safetensors for <lora:{name}>: it has {there}.")

    def of(tag: LoraTag) -> tuple[Path, float, float]:
        return find(tag.name), tag.text_encoder, tag.unet

    try:
        return [tuple(map(of, split_tags(request["prompt"])[1])) for request in requests]
    except PromptError as e:
        raise UsageError(f"--prompt: {e}") from None


def without_tags(f: flags.FlagValues, request: ImageRequest) -> ImageRequest:
    """An image's flags without the LoRA tags in its prompt, which --lora_dir applies to the model."""
    if f.lora_dir is None:
        return request
    words, own = split_tags(request["prompt"])
    blended = request.get("blend_prompt")
    if blended is not None and split_tags(blended)[1] == own:  # other tags are left out later, with a warning
        request = request | {"blend_prompt": split_tags(blended)[0]}
    return request | {"prompt": words}


def read_named(model: jaxdiff.Model, chosen: Sequence[Weighted]) -> dict[Path, Lora]:
    """All LoRAs that prompts name, by file. Raises UsageError."""
    with naming("--lora_dir"):
        return {path: read_lora(model, path) for path in sorted({path for each in chosen for path, *_ in each})}


def runs(chosen: Sequence[Weighted], size: int) -> Iterator[tuple[int, int]]:
    """Batches as (start, end): at most `size` consecutive images whose prompts name the same LoRAs."""
    for _, group in itertools.groupby(range(len(chosen)), lambda i: chosen[i]):
        same = list(group)
        for i in range(0, len(same), size):
            yield same[i], same[min(i + size, len(same)) - 1] + 1
