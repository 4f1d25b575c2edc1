"""What the loop costs beside the compiled step: input, numbers, TensorBoard and asynchronous checkpoints.

    python -m benchmarks.bench_loop [--blocks 16] [--block 20] [--checkpoint_every 1000] [--side 32] [--channels 64]

One run of `fit`, as train.py calls it, of a small UNet on images read from a folder: it reads and decodes each
batch, logs every 10 steps, and writes a checkpoint in every fourth block of steps. Between two blocks the run stands
still while the same compiled step is made as many times on one batch that stays on the device, so that each block has a
bare one right before and right after it, and a machine that is slower for a while slows both:

    overhead of a block = (its time - the mean of the bare blocks around it) / its time

A block ends when the devices are done and no checkpoint is being written any more; so what a checkpoint costs, blocking
or not, counts. It prints the median of blocks without a checkpoint, what a checkpoint adds, and both together for one
checkpoint in `checkpoint_every` steps. Then `fit` runs with a step that computes nothing: what is left is the loop.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxdiff import parallel
from jaxdiff.config import UNetConfig
from jaxdiff.data.captioned import captioned_data
from jaxdiff.models.model import Model, build
from jaxdiff.training import loop
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.loop import Stage, fit
from jaxdiff.training.optimizer import optimizer
from jaxdiff.training.options import Options
from jaxdiff.training.stages import diffusion_stage
from jaxdiff.training.train_step import TrainState, init_state, make_train_step
from tests.support.tiny import SCHEDULER, VAE, text_config, tiny_params, tokenizer

FIRST = 3  # steps before the first block; compilation is not the loop's


def write_images(folder: Path, side: int, count: int = 64) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (side, side, 3)).astype(np.uint8)).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": "a castle"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def model_of(side: int, channels: int) -> Model:
    unet = UNetConfig(
        sample_size=side // 2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(channels, 2 * channels),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=16,
    )
    return build(text_config(), unet, dataclasses.replace(VAE, sample_size=side), tokenizer(), SCHEDULER)


class RecordingStep:
    """A compiled step that keeps its latest metrics."""

    def __init__(self, step: Any) -> None:
        self._step, self.lower, self.metrics = step, step.lower, None

    def __call__(self, *args: Any) -> Any:
        state, self.metrics = self._step(*args)
        return state, self.metrics


class Blocks:
    """Times blocks of steps of `fit` from within the stage's `prepare`, and calls `between` after each block.

    Attributes:
        stage: the stage to train.
        times: (first step, seconds) of each block.
    """

    def __init__(self, stage: Stage, step: RecordingStep, size: int, between: Callable[[], None]) -> None:
        self.times: list[tuple[int, float]] = []
        self.stage = stage._replace(prepare=self._prepare)
        self._prepare_batch, self._step, self._size, self._between = stage.prepare, step, size, between
        self._num_batches, self._block_start = 0, 0.0
        self.checkpoints: Checkpoints | None = None

    def _prepare(self, batch: Any) -> Any:
        """Called by `fit` with each batch that it has read."""
        if self._num_batches >= FIRST and (self._num_batches - FIRST) % self._size == 0:
            jax.block_until_ready(self._step.metrics)
            if self.checkpoints is not None:
                self.checkpoints.wait()
            if self._num_batches > FIRST:
                self.times.append((self._num_batches - self._size, time.perf_counter() - self._block_start))
            self._between()
            self._block_start = time.perf_counter()
        self._num_batches += 1
        return self._prepare_batch(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = {"blocks": 16, "block": 20, "checkpoint_every": 1000, "side": 32, "channels": 64, "batch": 16}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    model = model_of(args.side, args.channels)
    params, stage, mesh = tiny_params(model), diffusion_stage(model), parallel.mesh()
    every = 4 * args.block
    options = Options(
        steps=FIRST + args.blocks * args.block + 1, batch_size=args.batch, log_every=10, eval_every=0,
        checkpoint_every=every,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = write_images(work, args.side)

        def training_data() -> Any:
            return captioned_data(data, args.batch, args.side, seed=0, threads=2)

        trained = {k: params[k] for k in stage.trainable}
        frozen = parallel.put_global({k: v for k, v in params.items() if k not in trained}, parallel.replicated(mesh))
        state = init_state(trained, optimizer(options), mesh)
        step = make_train_step(stage.loss, options, mesh, state)
        batch = parallel.global_batch(mesh, stage.prepare(next(iter(training_data()))))
        bare: list[float] = []

        def run_bare_block() -> None:
            nonlocal state
            start = time.perf_counter()
            for _ in range(args.block):
                state, _ = step(state, frozen, batch)
            jax.block_until_ready(state)
            bare.append(time.perf_counter() - start)

        def run(name: str, step: RecordingStep, between: Callable[[], None]) -> Blocks:
            loop.make_train_step = lambda *_: step  # type: ignore[attr-defined]
            blocks = Blocks(stage, step, args.block, between)
            save = Checkpoints.save

            def save_and_record(self: Checkpoints, *args: Any) -> None:
                blocks.checkpoints = self
                save(self, *args)

            Checkpoints.save = save_and_record  # type: ignore[method-assign]
            try:
                fit(blocks.stage, params, training_data(), options, work / name, mesh=mesh)
            finally:
                Checkpoints.save = save  # type: ignore[method-assign]
            return blocks

        run_bare_block()  # compiles
        bare.clear()
        times = run("run", RecordingStep(step), run_bare_block).times
        idle_times = run("idle", RecordingStep(idle_step), lambda: None).times
        size = sum(p.stat().st_size for p in (work / "run" / "checkpoints").rglob("*") if p.is_file()) / 2**20

    bare_means = [(a + b) / 2 for a, b in itertools.pairwise(bare)]
    timings = [(any(s % every == 0 for s in range(first + 1, first + args.block + 1)), t, b)
             for (first, t), b in zip(times, bare_means, strict=True)]  # fmt: skip
    overheads = [(t - b) / t for saved, t, b in timings if not saved]
    step_time = statistics.median(bare) / args.block
    share = statistics.median(overheads)
    checkpoint_cost = statistics.median(t - b for saved, t, b in timings if saved) - share * statistics.median(
        t for saved, t, _ in timings if not saved
    )
    checkpoint_share = checkpoint_cost / (args.checkpoint_every * step_time)
    count = sum(x.size for x in jax.tree.leaves(trained))
    print(f"{count / 1e6:.1f} million parameters, {size / 2:.0f} MB a checkpoint, batch {args.batch}")
    print(f"bare step {1e3 * step_time:.2f} ms; slowest block of them / fastest {max(bare) / min(bare):.2f}")
    print(f"overhead without checkpoints: {100 * share:+.2f}% (median; each block: ", end="")
    print(", ".join(f"{100 * x:+.1f}" for x in overheads) + ")")
    print(f"a checkpoint adds {1e3 * checkpoint_cost:.0f} ms, written in the background until done")
    print(f"overhead with a checkpoint every {args.checkpoint_every} steps: {100 * (share + checkpoint_share):+.2f}%")
    idle_step_time = statistics.median(t for _, t in idle_times) / args.block
    idle_share = idle_step_time / step_time
    print(
        f"fit with a step that computes nothing: {1e3 * idle_step_time:.2f} ms a step = {100 * idle_share:.1f}% of one"
    )


@functools.partial(jax.jit, donate_argnums=0)
def idle_step(state: TrainState, frozen: Any, batch: Any) -> Any:
    metrics = {name: jnp.zeros(()) for name in ("loss", "grad_norm", "learning_rate", "skipped")}
    return state._replace(step=state.step + 1), metrics


if __name__ == "__main__":
    main()
