"""Loads the model with all adapters of the flags: at once, or the text encoders first and the other networks later."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

import jaxdiff
from jaxdiff.cli.adapters import Adapters
from jaxdiff.cli.errors import file_errors
from jaxdiff.io.lora import Lora, Weighted, load_bundled, merge_lora, merge_named
from jaxdiff.io.textual_inversion import with_words
from jaxdiff.io.upscaler import load_upscaler
from jaxdiff.sampling.encode_prompts import encode_prompts
from jaxdiff.sampling.resolve import Request


def load(
    f: flags.FlagValues,
    path: Path,
    adapters: Adapters,
    lora_files: Sequence[str | Path],
    mesh: Mesh | None = None,
    parts: Sequence[str] | None = None,
) -> tuple[jaxdiff.Model, Any]:
    """The model at a path with all adapters of the flags, and its parameters.

    Args:
        lora_files: files of all LoRAs, including those that prompts name; embeddings in them are loaded.
        mesh: to shard the parameters over.
        parts: the networks to read: the text encoders, or all others; None: all.
    """
    params: Any
    replacements = {"vae": f.vae, "transformer": f.transformer}
    path_flags = ["--model", *(f"--{name}" for name, file in replacements.items() if file is not None)]
    with file_errors(", ".join(path_flags)):
        options: dict[str, Any] = {"prediction_type": f.prediction_type, "mesh": mesh, "parts": parts, **replacements}
        model, params = jaxdiff.load(path, dtype=f.dtype, **options)
    has_text_encoders = any(name.startswith("text_encoder") for name in params)
    if has_text_encoders:
        with file_errors("--embedding"):
            model, params = with_words(model, params, adapters.words)
    with file_errors("--lora"):
        for file in lora_files if has_text_encoders else ():
            model, params = load_bundled(model, params, file)
        if adapters.loras:
            loras, weights = zip(*adapters.loras, strict=True)
            params = merge_lora(params, [loaded_part(lora, params) for lora in loras], list(weights))
    if parts is not None and has_text_encoders:
        return model, params
    if adapters.controlnets:
        model, params = jaxdiff.with_controlnets(model, params, *adapters.controlnets)
    if adapters.tiny_vae:
        tiny, tree = adapters.tiny_vae
        model, params = dataclasses.replace(model, tiny_vae=tiny), params | {"tiny_vae": tree}
    if "hires" in f and f.hires and f.hires_upscale == "network":  # a server's flags lack these
        with file_errors("--upscaler"):
            upscaler = load_upscaler(f.upscaler, dtype=f.dtype)
        model, params = jaxdiff.with_upscaler(model, params, upscaler)
    return model, params


def encode_batches(
    f: flags.FlagValues,
    model_and_params: tuple[jaxdiff.Model, Any],
    batches: list[Request] | None,
    plan: Callable[[jaxdiff.Model], list[Request]],
    loras: dict[Path, Lora],
    lora_choices: list[Weighted],
    slices: Sequence[tuple[int, int]],
) -> list[Request]:
    """The batches with their texts encoded; nothing refers to the text encoders afterwards."""
    model, params = model_and_params
    loras = {file: loaded_part(lora, params) for file, lora in loras.items()}
    devices = jax.local_devices()[: f.batch_size]
    requests = []
    for request, (start, _) in zip(batches or plan(model), slices, strict=True):
        merged = jaxdiff.replicate(merge_named(params, loras, lora_choices[start]), devices)
        requests.append(encode_prompts(model, merged, request))
    return requests


def loaded_part(lora: Lora, params: Any) -> Lora:
    """The part of a LoRA for the networks that are loaded."""
    return {name: factors for name, factors in lora.items() if name.partition(".")[0] in params}
