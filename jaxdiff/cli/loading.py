"""Loads the model with all adapters of the flags: as a whole, or the text encoders first and the rest afterwards."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

import jaxdiff
from jaxdiff.cli.adapters import Adapters, naming
from jaxdiff.io.lora import Lora, Weighted, load_bundled, merge_lora, merge_named
from jaxdiff.io.textual_inversion import with_words
from jaxdiff.io.upscaler import load_upscaler
from jaxdiff.sampling.encode_prompts import encode_prompts
from jaxdiff.sampling.resolve import Request


def load(
    f: flags.FlagValues,
    path: Path,
    laid: Adapters,
    lora_files: Sequence[str | Path],
    mesh: Mesh | None = None,
    parts: Sequence[str] | None = None,
) -> tuple[jaxdiff.Model, Any]:
    """The model at a path with all adapters of the flags, and its parameters.

    Args:
        laid: the adapters.
        lora_files: files of all LoRAs, including those that prompts name; embeddings in them are loaded.
        mesh: to shard the parameters over.
        parts: the networks to read: the text encoders, or all others; None: all.
    """
    params: Any
    others = {"vae": f.vae, "transformer": f.transformer}
    with naming(", ".join(["--model", *(f"--{name}" for name, file in others.items() if file is not None)])):
        given: dict[str, Any] = {"prediction_type": f.prediction_type, "mesh": mesh, "parts": parts, **others}
        model, params = jaxdiff.load(path, dtype=f.dtype, **given)
    reads = any(name.startswith("text_encoder") for name in params)
    if reads:
        with naming("--embedding"):
            model, params = with_words(model, params, laid.words)
    with naming("--lora"):
        for file in lora_files if reads else ():
            model, params = load_bundled(model, params, file)
        if laid.loras:
            params = merge_lora(params, [own(lora, params) for lora, _ in laid.loras], [x for _, x in laid.loras])
    if parts is not None and reads:
        return model, params
    if laid.controlnets:
        model, params = jaxdiff.with_controlnets(model, params, *laid.controlnets)
    if laid.tiny_vae:
        tiny, tree = laid.tiny_vae
        model, params = dataclasses.replace(model, tiny_vae=tiny), params | {"tiny_vae": tree}
    if "hires" in f and f.hires and f.hires_upscale == "network":  # a server's flags lack these
        with naming("--upscaler"):
            upscaler = load_upscaler(f.upscaler, dtype=f.dtype)
        model, params = jaxdiff.with_upscaler(model, params, upscaler)
    return model, params


def encoded(
    f: flags.FlagValues,
    loaded: tuple[jaxdiff.Model, Any],
    parts: list[Request] | None,
    plan: Callable[[jaxdiff.Model], list[Request]],
    loras: dict[Path, Lora],
    chosen: list[Weighted],
    slices: Sequence[tuple[int, int]],
) -> list[Request]:
    """The batches with their texts encoded; nothing refers to the text encoders afterwards."""
    model, params = loaded
    loras = {file: own(lora, params) for file, lora in loras.items()}
    devices = jax.local_devices()[: f.batch_size]
    found = []
    for request, (start, _) in zip(parts or plan(model), slices, strict=True):
        merged = jaxdiff.replicate(merge_named(params, loras, chosen[start]), devices)
        found.append(encode_prompts(model, merged, request))
    return found


def own(lora: Lora, params: Any) -> Lora:
    """The part of a LoRA for the networks that are loaded."""
    return {name: factors for name, factors in lora.items() if name.partition(".")[0] in params}
