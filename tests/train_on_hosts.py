"""One of several processes that train together, each with its own examples.

Usage: python -m tests.train_on_hosts PORT PROCESS PROCESSES WORKDIR STEPS
"""

import sys
from pathlib import Path

import jax
import numpy as np


def main(port: int, process: int, processes: int, workdir: Path, steps: int) -> None:
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    from jaxdiff.training.latents import FromMemory
    from jaxdiff.training.loop import fit
    from tests.test_training import options
    from tests.test_training_loop import LINE, line_data, linear_stage

    data = {k: v[process::processes] for k, v in line_data(12).items()}
    chosen = options(steps=steps, batch_size=4 * processes, checkpoint_every=2, eval_every=3, fsdp=1)
    result = fit(linear_stage(), LINE, FromMemory(data, 4, seed=process), chosen, workdir)
    np.savez(workdir / f"result-{process}.npz", w=result.params["line"]["w"], step=result.step)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
