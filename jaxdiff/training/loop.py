"""The one loop that every stage is trained by."""

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxdiff import parallel
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.training.report import Report
from jaxdiff.training.state import Batch, Loss, Options, TrainState, init_state, make_train_step, optimizer
from jaxdiff.typing import Params


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Stage(NamedTuple):
    """What is trained, and by which loss."""

    name: str
    trainable: tuple[str, ...]  # keys of `params`; the others stay as they are
    loss: Loss  # (all parameters, batch, keys [B]) -> (mean loss, metrics)
    prepare: Callable[[Mapping[str, Any]], Batch] = lambda batch: batch  # on the host: what is read -> arrays [b, ...]


class BatchIterator(Protocol):
    """Examples without end, by name [b, ...], and the position among them as what JSON holds."""

    def __next__(self) -> Mapping[str, Any]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any, /) -> None: ...


class Batches(Protocol):
    def __iter__(self) -> BatchIterator: ...


class Result(NamedTuple):
    params: Params  # all of them; those trained as their moving average, numpy arrays
    step: int  # updates made; fewer than asked for when the run was stopped


class Stop:
    """Turns SIGTERM and the first Ctrl-C into a wish to stop after the step at hand. A context manager."""

    def __init__(self, every: int) -> None:
        self._wished, self._every = False, every
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._wished = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    def wished(self, step: int) -> bool:
        """The same answer on every host, else some would wait for ever for the others; they agree `every` steps."""
        if jax.process_count() == 1:
            return self._wished
        if step % self._every:
            return False
        return bool(multihost_utils.process_allgather(np.asarray(self._wished)).any())


def fit(
    stage: Stage,
    params: Params,
    batches: Batches,
    options: Options,
    workdir: str | Path,
    *,
    mesh: Mesh | None = None,
    on_eval: Callable[[int, Params], Mapping[str, float]] | None = None,
) -> Result:
    """Train one stage, going on from the last checkpoint in `workdir` where there is one.

    Args:
        stage: what is trained and how.
        params: all parameters that the loss needs, by module, held in full by every host.
        batches: of this host, batch_size / hosts examples each.
        options: optimisation.
        workdir: checkpoints go to its folder `checkpoints`, TensorBoard files to `tb`.
        mesh: devices over ("data", "fsdp"); None takes all.
        on_eval: called as on_eval(step, params) every `eval_every` steps and at the end, with the moving average of
            the parameters as numpy arrays; the numbers it returns are reported. On every host.

    Returns:
        The parameters with the moving average of those trained. SIGTERM and Ctrl-C save a checkpoint and return early.

    Raises:
        OptionsError: options that do not fit each other or the devices.
        CheckpointError: a checkpoint that cannot be written or is of another model.
        TrainingError: the loss is no longer a number.
    """
    options.check(jax.device_count() if mesh is None else mesh.size)
    mesh = parallel.mesh(options.fsdp) if mesh is None else mesh
    workdir, iterator = Path(workdir), iter(batches)
    trained = {k: params[k] for k in stage.trainable}
    frozen = parallel.place({k: v for k, v in params.items() if k not in trained}, parallel.replicated(mesh))
    state = init_state(trained, optimizer(options), mesh)

    def whole(state: TrainState) -> Params:
        return {**params, **jax.device_get(parallel.place(state.ema, parallel.replicated(mesh)))}

    with Checkpoints(workdir / "checkpoints", options.keep_checkpoints) as checkpoints, Stop(options.log_every) as stop:
        if checkpoints.latest is not None:
            state, position = checkpoints.restore(state)
            iterator.set_state(position)
        start = step = int(state.step)
        train_step = make_train_step(stage.loss, options, mesh, state)
        with Report(workdir / "tb", stage.name, start, options.steps, options.batch_size, options.log_every) as report:
            if start:
                report.say(f"goes on from step {start}.")
            while step < options.steps and not stop.wished(step):
                batch = parallel.global_batch(mesh, stage.prepare(next(iterator)))
                # The host runs one step ahead: while the devices compute one, the next batch is read.
                jax.block_until_ready(state.step)
                state, metrics = train_step(state, frozen, batch)
                step += 1
                means = report.step(step, metrics)
                if means is not None and not np.isfinite(means["loss"]):
                    raise TrainingError(
                        f"The loss is {means['loss']} at step {step}: lower learning_rate, or go on from the last "
                        "checkpoint with another seed."
                    )
                last = step == options.steps
                if last or step % options.checkpoint_every == 0:
                    checkpoints.save(step, state, iterator.get_state())
                if on_eval is not None and (last or (options.eval_every and step % options.eval_every == 0)):
                    if values := on_eval(step, whole(state)):
                        report.show(step, values)
                    report.restart_clock()
            if step < options.steps:
                checkpoints.save(step, state, iterator.get_state())
                report.say(f"stopped at step {step} of {options.steps}; the same command goes on from there.")
        return Result(whole(state), step)
