"""`fit` of the quick stage as a program, to be killed: python -m tests.support.fit_line WORKDIR STEPS."""

import sys
from pathlib import Path

import numpy as np

from jaxdiff.training.loop import fit
from tests.support.batches import FromMemory
from tests.support.line import LINE, line_data, linear_stage, one_device
from tests.support.stages import options


def run(workdir: Path, steps: int) -> bytes:
    """Train, or go on, to the end; what was learned."""
    o = options(steps=steps, batch_size=3, checkpoint_every=3, learning_rate=0.1)
    result = fit(linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, workdir, mesh=one_device())
    return np.asarray(result.params["line"]["w"]).tobytes()


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
