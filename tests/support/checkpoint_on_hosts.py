"""One of several processes that keep checkpoints in a store, each with a folder of its own.

Usage: python -m tests.support.checkpoint_on_hosts PORT PROCESS PROCESSES URL

Goes on from the checkpoint that is there, adds one to all numbers, and writes two more.
"""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

SHAPES = {"split": (8, 6), "whole": (300, 200), "step": ()}


def state(step: int) -> dict[str, jax.Array]:
    """Numbers of a step, on all devices of all processes, one of them divided."""
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
    spec = {"split": PartitionSpec("fsdp"), "whole": PartitionSpec(), "step": PartitionSpec()}
    values = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + step for name, shape in SHAPES.items()}
    return {
        name: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec[name]), lambda i, x=x: x[i])
        for name, x in values.items()
    }


def main(port: int, process: int, processes: int, url: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    from jaxdiff.training import remote
    from jaxdiff.training.checkpoint import Checkpoints

    with Checkpoints(remote.workdir(url) / "checkpoints", keep=2) as checkpoints:
        step = checkpoints.latest or 0
        if step:
            found, position = checkpoints.restore(state(0))
            assert position == {"host": process}
            for name, value in state(step).items():
                for own, wanted in zip(found[name].addressable_shards, value.addressable_shards, strict=True):
                    np.testing.assert_array_equal(own.data, wanted.data)
        for i in (step + 1, step + 2):
            checkpoints.save(i, state(i), {"host": process})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
