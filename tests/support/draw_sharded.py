"""Run with eight simulated devices: images drawn with parameters divided over them, and what the programs send.

Usage: python -m tests.support.draw_sharded FOLDER [all], with XLA_FLAGS=--xla_force_host_platform_device_count=8.
Without "all" it draws only with the two programs that the report is about.
"""

import contextlib
import json
import re
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxdiff import generate, load, mapping, parallel, replicate, save, shard
from jaxdiff.cli import sample
from jaxdiff.io.controlnet import load_controlnet, save_controlnet
from jaxdiff.io.images import read_image
from jaxdiff.sampling.generate import sampler
from jaxdiff.sampling.resolve import resolve_images, resolve_settings
from jaxdiff.sampling.stepwise import draw_stepwise
from jaxdiff.training.collectives import collectives
from tests.support.tiny import tiny_controlnet, tiny_model, tiny_params

PROMPTS = [f"image {i}" for i in range(8)]
ONE_AND_EIGHT = {"one": 1, "eight": 8}
HOW = {"seed": 3, "steps": 3, "scheduler": "euler"}


@contextlib.contextmanager
def programs():
    """Texts of the compiled samplers that run meanwhile, in the order they run."""
    texts, pmap = [], mapping.pmap

    def recording(function, devices, shared=0):
        program = pmap(function, devices, shared).program

        def run(*args, lookup):
            compiled = program.lower(*args).compile()
            texts.append(compiled.as_text())
            return compiled(*args)

        return run

    sampler.cache_clear()
    with mock.patch.object(mapping, "pmap", recording):
        yield texts
    sampler.cache_clear()


def told(text: str, params, mesh) -> dict:
    """What a program sends, by kind and axes in bytes, a step's once; and the arrays that it gathers in each step."""
    drawn = {name: x for name, x in params.items() if name != "vae"}
    drawn["vae"] = {name: x for name, x in params["vae"].items() if name not in ("encoder", "quant_conv")}

    def divided(tree) -> list:
        return [x for x in jax.tree.leaves(tree) if "fsdp" in tuple(x.sharding.spec)]

    gathers = [line for line in text.splitlines() if re.search(r"\ball-gather(-start)?\(", line)]

    def gathered(x) -> int:
        return x.nbytes // (mesh.shape["tensor"] if "tensor" in tuple(x.sharding.spec) else 1)

    return {
        "sent": {f"{r.kind} {','.join(r.axes)}": r.size for r in collectives(text, mesh.shape)},
        "divided": sum(map(gathered, divided(drawn))),
        "gathered_each_step": sum("/while/body/" in line for line in gathers),
        "of_the_unet": len(divided(params["unet"])),
    }


def held(params) -> dict[str, list[int]]:
    """For each network, the bytes of its parameters and the most that a device has of them."""
    found = {}
    for name, tree in params.items():
        each = dict.fromkeys(jax.devices(), 0)
        for x in jax.tree.leaves(tree):
            for part in x.addressable_shards:
                each[part.device] += part.data.nbytes
        found[name] = [sum(x.nbytes for x in jax.tree.leaves(tree)), max(each.values())]
    return found


def opened_divided(folder: Path, model, params, mesh) -> dict:
    """What a device has of each network where they are opened over a mesh, and whether any was put down whole."""
    save(folder / "one.safetensors", model, params)
    save_controlnet(folder / "control", *tiny_controlnet(model))
    with mock.patch.object(jax, "device_put", wraps=jax.device_put) as put:
        one = load(folder / "one.safetensors", vae=folder / "model" / "vae", mesh=mesh)[1]
        one["controlnet"] = load_controlnet(folder / "control", mesh=mesh)[1]
    places = [place for call in put.call_args_list for place in jax.tree.leaves(call.args[1:])]
    over = all(isinstance(place, NamedSharding) and place.mesh == mesh for place in places)
    return {"held": held(one), "all_over_the_mesh": over and len(places) >= len(jax.tree.leaves(one))}


def main(folder: Path, images_too: bool) -> None:
    model = tiny_model()
    params = tiny_params(model)
    save(folder / "model", model, params)
    images = {}
    fsdp, both = parallel.mesh(fsdp=8), parallel.mesh(fsdp=4, tensor=2)
    placed = load(folder / "model", mesh=fsdp)[1]
    with programs() as texts:
        images["fsdp"] = generate(model, placed, PROMPTS, **HOW)
        flags = [f"--model={folder}/model", "--fsdp=4", "--tensor=2", f"--output={folder}/{{index}}.png"]
        flags += [f"--{name}={value}" for name, value in HOW.items()] + [f"--prompt={p}" for p in PROMPTS]
        assert sample.main(["sample.py", *flags]) == 0
    images["commanded"] = np.stack([read_image(folder / f"{i}.png") for i in range(len(PROMPTS))])
    if images_too:
        for name, n in ONE_AND_EIGHT.items():
            images[name] = generate(model, replicate(params, jax.devices()[:n]), PROMPTS, **HOW)
        images["three"] = generate(model, placed, PROMPTS[:3], **HOW)  # padded to the eight that are compiled
        request = resolve_images(model, resolve_settings(model, steps=3, scheduler="euler"), PROMPTS[:3], seed=3)
        images["three_stepwise"] = list(draw_stepwise(model, shard(params, both), request))[-1].images()
    report = {
        "fsdp": told(texts[0], placed, fsdp),
        "both": told(texts[-1], shard(params, both), both),
        "held": held(placed),
        "opened": opened_divided(folder, model, params, fsdp),
    }
    np.savez(folder / "images.npz", **images)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), images_too="all" in sys.argv[2:])
