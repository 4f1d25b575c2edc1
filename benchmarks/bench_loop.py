"""What the loop costs beside the compiled step: input, numbers, TensorBoard and asynchronous checkpoints.

    python -m benchmarks.bench_loop [--steps 40] [--repeats 5] [--side 32] [--channels 64]

Times `fit`, as train.py calls it, against the bare compiled step on one batch that stays on the device, for a small
UNet on pictures read from a folder. `fit` reads and decodes each batch, logs every 10 steps and writes a checkpoint in
the middle and at the end. The two take turns, so that a busy machine slows both; the median of the repeats is told.
Steps are timed from the fourth on (compilation is not the loop's). Then `fit` again with a step that computes nothing:
what is left is the loop itself, a figure that other work on the machine hardly moves.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxdiff import parallel
from jaxdiff.config import UNetConfig
from jaxdiff.data.folder import captioned_folder
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.models.model import Model, build
from jaxdiff.training import loop
from jaxdiff.training.loop import Stage, fit
from jaxdiff.training.stages import diffusion_stage
from jaxdiff.training.state import Options, TrainState, init_state, make_train_step, optimizer
from tests.tiny import SCHEDULER, VAE, text_config, tiny_params, tokenizer

FIRST = 3  # the step from which is timed


def pictures(folder: Path, side: int, count: int = 64) -> Path:
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


class Times:
    """When each step of `fit` began, seen through the stage's `prepare`."""

    def __init__(self, stage: Stage) -> None:
        self.began: list[float] = []
        self.stage = stage._replace(prepare=self._prepare)
        self._real = stage.prepare

    def _prepare(self, batch):
        self.began.append(time.perf_counter())
        return self._real(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in {"steps": 40, "repeats": 5, "side": 32, "channels": 64, "batch": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    model = model_of(args.side, args.channels)
    params, stage, mesh = tiny_params(model), diffusion_stage(model), parallel.mesh()
    options = Options(
        steps=args.steps, batch_size=args.batch, log_every=10, eval_every=0, checkpoint_every=args.steps // 2
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = pictures(work, args.side)

        def batches():
            return captioned_folder(data, args.batch, args.side, seed=0, threads=2)

        trained = {k: params[k] for k in stage.trainable}
        frozen = parallel.place({k: v for k, v in params.items() if k not in trained}, parallel.replicated(mesh))
        state = init_state(trained, optimizer(options), mesh)
        step = make_train_step(stage.loss, options, mesh, state)
        batch = parallel.global_batch(mesh, stage.prepare(next(iter(batches()))))

        def bare() -> float:
            nonlocal state
            for i in range(args.steps):
                if i == FIRST:
                    jax.block_until_ready(state)
                    start = time.perf_counter()
                state, _ = step(state, frozen, batch)
            jax.block_until_ready(state)
            return (time.perf_counter() - start) / (args.steps - FIRST)

        def whole(name: str, compiled) -> float:
            """Seconds from the beginning of one step of `fit` to that of the next, with all that lies between."""
            loop.make_train_step = lambda *_: compiled  # type: ignore[attr-defined]
            times = Times(stage)
            fit(times.stage, params, batches(), options, work / name, mesh=mesh)
            return (times.began[-1] - times.began[FIRST]) / (len(times.began) - 1 - FIRST)

        bare()
        found = [(bare(), whole(f"run-{i}", step), bare()) for i in range(args.repeats)]
        blocked: list[float] = []
        save = Checkpoints.save

        def timed_save(*args):
            start = time.perf_counter()
            save(*args)
            blocked.append(time.perf_counter() - start)

        Checkpoints.save = timed_save  # type: ignore[method-assign]
        alone = [whole(f"idle-{i}", idle_step) for i in range(args.repeats)]
        step_time = statistics.median([x for row in found for x in (row[0], row[2])])
        ratios = [row[1] / ((row[0] + row[2]) / 2) for row in found]
        size = sum(p.stat().st_size for p in (work / "run-0" / "checkpoints").rglob("*") if p.is_file()) / 2**20
        count = sum(x.size for x in jax.tree.leaves(trained))
        own, saving = statistics.median(alone), statistics.median(blocked)
        print(f"{count / 1e6:.1f} million parameters, {size / 2:.0f} MB a checkpoint, batch {args.batch}")
        print(f"bare step {1e3 * step_time:.1f} ms, step of fit {1e3 * statistics.median(r[1] for r in found):.1f} ms")
        print(f"cost of the loop {100 * (statistics.median(ratios) - 1):+.1f}% of a step; each repeat:", end=" ")
        print(", ".join(f"{100 * (r - 1):+.1f}%" for r in ratios))
        share = 100 * own / step_time
        print(f"fit with a step that computes nothing: {1e3 * own:.1f} ms a step = {share:.1f}% of a step,")
        print(f"in which a checkpoint blocks it for {1e3 * saving:.0f} ms every {args.steps // 2} steps")


@functools.partial(jax.jit, donate_argnums=0)
def idle_step(state: TrainState, frozen, batch):
    metrics = {name: jnp.zeros(()) for name in ("loss", "grad_norm", "learning_rate", "skipped")}
    return state._replace(step=state.step + 1), metrics


if __name__ == "__main__":
    main()
