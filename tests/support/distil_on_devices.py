"""Run with simulated devices: the losses of some updates of a student on one device, and divided over all.

Usage: python -m tests.support.distil_on_devices FOLDER, with as many devices as XLA_FLAGS simulates.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from jaxdiff import parallel
from jaxdiff.training.loop import fit
from jaxdiff.training.trainables import make
from tests.support.batches import FromMemory
from tests.support.distillation import FIXED, ZERO_SNR, eight
from tests.support.stages import options, settings, whole_model
from tests.support.tiny import tiny_params


def main(folder: Path) -> None:
    model = whole_model(ZERO_SNR)
    report: dict = {"devices": jax.device_count()}
    for stage in ("scm", "lcm"):
        target = make(settings(stage, distillation=FIXED), model, tiny_params(model))
        for name, devices, fsdp in (("one", jax.devices()[:1], 1), ("fsdp", jax.devices(), 2)):
            where = folder / f"{stage}-{name}"
            o = options(steps=3, batch_size=8, learning_rate=1e-4, ema_decay=0.5, fsdp=fsdp)
            mesh = parallel.mesh(fsdp, devices=devices)
            result = fit(target.stage, target.params, FromMemory(eight(), 8, 7), o, where, mesh=mesh)
            lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
            norm = sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(result.params["unet"]))
            report[f"{stage} {name}"] = {"losses": [line["loss"] for line in lines], "norm": norm}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
