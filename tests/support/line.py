"""A stage that compiles in no time, for tests of what surrounds the training step."""

import jax
import numpy as np

from jaxdiff import parallel
from jaxdiff.training.loop import Stage


def same(a, b) -> bool:
    """Whether two trees are equal bit for bit."""
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)))


def linear_stage() -> Stage:
    """A stage that is quick to compile: fit w to noisy targets, through each kind of state that there is."""

    def loss(params, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)
        error = batch["x"] @ params["line"]["w"] + params["offset"] - batch["y"] + 0.1 * noise
        return (error**2).mean(), {"bias": params["offset"]}

    return Stage("line", ("line",), loss, lambda batch: batch)


def line_data(count: int = 10) -> dict:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.asarray([1.0, -2.0, 0.5], np.float32), "index": np.arange(count)}


OFFSET = {"offset": np.zeros((), np.float32)}


LINE = {"line": {"w": np.zeros(3, np.float32)}, **OFFSET}


def one_device():
    return parallel.mesh(devices=jax.devices()[:1])
