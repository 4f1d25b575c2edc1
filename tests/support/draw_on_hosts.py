"""Run as one of two processes with two simulated devices each: images drawn on the devices of both.

Usage: python -m tests.support.draw_on_hosts FILE PORT PROCESS, with XLA_FLAGS=--xla_force_host_platform_device_count=2.
"""

import sys

import jax
import numpy as np

from jaxdiff import generate, parallel, replicate, shard
from tests.support.draw_sharded import HOW, PROMPTS
from tests.support.tiny import tiny_model, tiny_params


def main(file: str, port: str, process: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    assert jax.device_count() == 4
    model = tiny_model()
    params = tiny_params(model)

    def draw(params, count: int, **more) -> np.ndarray:
        return generate(model, params, PROMPTS[:count], **HOW, **more)

    images = {"divided": draw(shard(params, parallel.mesh(fsdp=4)), 8)}
    images["copied"] = draw(replicate(params, jax.devices()), 3)  # which do not divide
    images["devices"] = draw(params, 1, devices=jax.devices())
    np.savez(file, **images)


if __name__ == "__main__":
    main(*sys.argv[1:])
