"""Run with simulated devices: images drawn on all of them and on one, and the collectives in the compiled program.

Usage: python -m tests.support.draw_on_devices FOLDER, with XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import contextlib
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np

from jaxdiff import generate, mapping, parallel, replicate, save
from jaxdiff.cli import sample
from jaxdiff.io.images import read_image
from jaxdiff.models.model import with_controlnets
from jaxdiff.sampling.generate import sampler
from jaxdiff.sampling.resolve import resolve_images, resolve_settings
from jaxdiff.sampling.stepwise import draw_stepwise
from tests.support.tiny import SIDE, tiny_controlnet, tiny_model, tiny_params

COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter|ragged-all-to-all)"
    r"(?:-start)?\("
)


def collectives(text: str) -> list[str]:
    """The kinds of communication between devices in a compiled program."""
    return sorted(set(COLLECTIVE.findall(text)))


def partitions(texts: list[str]) -> list[int]:
    """Over how many devices each compiled program is divided."""
    return [int(re.search(r"num_partitions=(\d+)", text).group(1)) for text in texts]


@contextlib.contextmanager
def recorded_programs():
    """Texts of the compiled samplers that run meanwhile, in the order they run."""
    texts, pmap = [], mapping.pmap

    def recording(function, devices, shared=0):
        program = pmap(function, devices, shared).program
        return lambda *args, lookup: texts.append(program.lower(*args).compile().as_text()) or program(*args)

    sampler.cache_clear()
    mapping.pmap = recording
    yield texts
    mapping.pmap = pmap


def from_the_command_line(folder: Path, model, params, count: int) -> np.ndarray:
    """Images that sample.py draws; a mesh is laid out in another order than the devices', as on TPUs."""
    save(folder / "model", model, params)
    parallel._device_grid = lambda shape, devices: np.asarray(devices)[::-1].reshape(shape)
    flags = [f"--model={folder}/model", "--seed=3", "--steps=2", f"--batch_size={count}"]
    prompts = [f"--prompt=image {i}" for i in range(count)]
    assert sample.main(["sample.py", *flags, *prompts, f"--output={folder}/{{index}}.png"]) == 0
    return np.stack([read_image(folder / f"{i}.png") for i in range(count)])


def sum_program() -> str:
    mesh = parallel.mesh()
    x = parallel.put_global(np.ones(8), parallel.batch_sharding(mesh))
    return jax.jit(lambda x: x.sum()).lower(x).compile().as_text()


def main(folder: Path) -> None:
    model = tiny_model()
    params = tiny_params(model)

    def draw(count, devices, params=params):
        prompts = [f"image {i}" for i in range(count)]
        devices = devices and jax.devices()[:devices]
        return generate(model, params, prompts, seed=3, steps=2, devices=devices)

    with recorded_programs() as texts:
        sixteen = draw(16, 8)
    sampler.cache_clear()
    controlled = with_controlnets(model, params, tiny_controlnet(model))
    rng = np.random.default_rng(0)
    given = {
        "image": rng.random((3, SIDE, SIDE, 3)),
        "mask": rng.random((3, SIDE, SIDE)) > 0.5,
        "control_images": rng.random((3, SIDE, SIDE, 3)),
    }

    def draw_from_images(devices):
        return generate(*controlled, ["a castle"] * 3, steps=2, devices=jax.devices()[:devices], **given)

    images = {"from_images": draw_from_images(8), "from_images_one": draw_from_images(1)}
    images |= {"one": draw(9, 1), "sixteen": sixteen, "nine": draw(9, 8), "five": draw(5, 8)}
    images["five_replicated"] = draw(5, None, replicate(params, jax.devices()[::-1]))
    given = [f"image {i}" for i in range(5)]
    request = resolve_images(model, resolve_settings(model, steps=2), given, seed=3)
    images["five_stepwise"] = list(draw_stepwise(model, replicate(params), request))[-1].images()
    with recorded_programs() as commanded:
        images["commanded"] = from_the_command_line(folder, model, params, 16)
    np.savez(folder / "images.npz", **images)
    report = {
        "device_count": jax.device_count(),
        "partitions": partitions(texts),
        "partitions_commanded": partitions(commanded),
        "collectives": [collectives(text) for text in texts],
        "collectives_of_a_sum": collectives(sum_program()),
    }
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
