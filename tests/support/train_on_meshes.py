"""Run with four simulated devices: a run that goes on on other devices than it began with.

Usage: python -m tests.support.train_on_meshes FOLDER, with XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from jaxdiff import parallel
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.loop import fit
from jaxdiff.training.optimizer import optimizer
from jaxdiff.training.train_step import init_state
from tests.support.batches import FromMemory
from tests.support.line import linear_stage
from tests.support.stages import options

PARAMS = {"line": {"w": np.zeros(8, np.float32)}, "offset": np.zeros((), np.float32)}
ROWS = 12


def main(folder: Path) -> None:
    x = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
    data = {"x": x, "y": x.sum(1), "index": np.arange(ROWS)}

    def train(name: str, steps: int, mesh) -> None:
        o = options(steps=steps, batch_size=4, schedule="constant", learning_rate=1e-2)
        fit(linear_stage(), PARAMS, FromMemory(data, 4, 7), o, folder / name, mesh=mesh)

    def losses(name: str) -> list[float]:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def restored(mesh):
        like = init_state({"line": PARAMS["line"]}, optimizer(options()), mesh)
        with Checkpoints(folder / "moving" / "checkpoints") as checkpoints:
            state, _ = checkpoints.restore(like)
        divided = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), state, like)
        return jax.device_get(state), all(jax.tree.leaves(divided))

    meshes = [
        parallel.mesh(devices=jax.devices()[:1]),
        parallel.mesh(fsdp=4, devices=jax.devices()),
        parallel.mesh(fsdp=2, devices=jax.devices()[:2]),
    ]
    train("unbroken", 9, meshes[0])
    checks = []
    for i, mesh in enumerate(meshes):
        if i:
            (before, _), (after, divided) = restored(meshes[i - 1]), restored(mesh)
            equal = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
            checks.append(divided and all(jax.tree.leaves(equal)))
        train("moving", 3 * (i + 1), mesh)
    report = {"devices": [m.size for m in meshes], "restored": checks}
    report |= {"losses": losses("moving"), "unbroken": losses("unbroken")}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
