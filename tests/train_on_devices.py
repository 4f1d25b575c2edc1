"""Run with simulated devices: a few updates on one device, on all, and with every parameter split.

Usage: python -m tests.train_on_devices FILE, with XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from jaxdiff import parallel
from jaxdiff.training.stages import clip_params, clip_stage, vae_stage
from jaxdiff.training.state import Options, init_state, make_train_step, optimizer
from tests.test_training import pairs, whole_model
from tests.tiny import tiny_params


def losses(stage, params, mesh, options) -> tuple[list[float], set[str]]:
    """Of some updates; and how parameters, averages and moments are divided, before and after."""
    state = init_state({k: params[k] for k in stage.trainable}, optimizer(options), mesh)
    step = make_train_step(stage.loss, options, mesh, state)
    found, before = [], specs(state)
    for i in range(3):
        batch = {k: np.roll(v, i, axis=0) for k, v in pairs(8).items()}
        state, metrics = step(state, params, parallel.global_batch(mesh, batch))
        found.append(float(metrics["loss"]))
    assert specs(state) == before
    return found, set(before)


def specs(state) -> list[str]:
    return [str(x.sharding.spec) for x in jax.tree.leaves(state)]


def main(file: Path) -> None:
    model = whole_model()
    params = clip_params(tiny_params(model))
    options = Options(steps=3, batch_size=8, learning_rate=1e-2)
    meshes = {"one": parallel.mesh(devices=jax.devices()[:1]), "eight": parallel.mesh(), "split": parallel.mesh(fsdp=4)}
    report: dict = {"devices": jax.device_count()}
    for stage in (clip_stage(model), vae_stage(model)):
        for name, mesh in meshes.items():
            values, divisions = losses(stage, params, mesh, options)
            report[f"{stage.name} {name}"] = {"losses": values, "specs": sorted(divisions)}
    file.write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
