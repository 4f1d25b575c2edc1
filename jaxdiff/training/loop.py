"""The training loop, one for all stages."""

import dataclasses
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxdiff import parallel
from jaxdiff.errors import JaxdiffError
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.ema import Snapshots
from jaxdiff.training.mfu import Speed, flops, peak_flops
from jaxdiff.training.optimizer import check_multipliers, optimizer
from jaxdiff.training.options import Options
from jaxdiff.training.progress import Report
from jaxdiff.training.trackers import JsonLines, TensorBoard, TrackedImages, Tracker, has_evaluation
from jaxdiff.training.train_step import (
    NO_CAST,
    Batch,
    Dtypes,
    Loss,
    TrainState,
    abstract_state,
    cast_frozen,
    init_state,
    make_train_step,
)
from jaxdiff.typing import Array, Params


class TrainingError(JaxdiffError, RuntimeError):
    """Training cannot continue."""


class Stage(NamedTuple):
    """What is trained, and by which loss."""

    name: str
    trainable: tuple[str, ...]  # keys of `params`; the others are frozen
    loss: Loss  # (all parameters, batch, keys [B]) -> (mean loss, metrics)
    prepare: Callable[[Mapping[str, Any]], Batch] = lambda batch: batch  # on the host: batch as read -> arrays [b, ...]
    dtypes: Dtypes = NO_CAST  # compute dtypes of networks whose matrices, kernels and tables nothing else reads
    reads_state: bool = False  # whether the loss also reads the step and the moving average: `train_step.with_state`


class BatchIterator(Protocol):
    """Endless batches, arrays [b, ...] by name, and the position in the data as a JSON value."""

    def __next__(self) -> Mapping[str, Any]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any, /) -> None: ...


class TrainingBatches(Protocol):
    def __iter__(self) -> BatchIterator: ...


class Result(NamedTuple):
    params: Params  # all of them, trained ones as their moving average; numpy arrays
    step: int  # updates made; fewer than asked for when the run was stopped


class Stop:
    """Turns SIGTERM (a preemption notice, for example) and the first Ctrl-C into a request to stop. A context manager.

    With several hosts JAX handles SIGTERM: it notifies all of them and agrees on a step.
    """

    def __init__(self) -> None:
        self._requested = False
        self._multihost = jax.process_count() > 1
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            signals = (signal.SIGINT,) if self._multihost else (signal.SIGTERM, signal.SIGINT)
            self._previous = {s: signal.signal(s, self._handle) for s in signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once
        if self._multihost:
            os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self, step: int) -> bool:
        """Whether to stop before `step`. Call it before each step; every host gets the same answer."""
        return multihost_utils.reached_preemption_sync_point(step) if self._multihost else self._requested


class NonFiniteGuard:
    """Counts consecutive skipped updates."""

    def __init__(self, limit: int) -> None:
        self._limit, self.length = limit, 0

    def update(self, step: int, metrics: Mapping[str, Any], checkpoint: int | None) -> None:
        """Count the step if it was skipped, waiting for its metrics.

        Raises:
            TrainingError: too many in a row were skipped. `checkpoint` is the step of the last checkpoint, if any.
        """
        self.length = self.length + 1 if int(metrics["skipped"]) else 0
        if self.length >= self._limit:
            saved = (
                "there is no checkpoint yet" if checkpoint is None else f"the last checkpoint is of step {checkpoint}"
            )
            raise TrainingError(
                f"Loss or gradient was not finite in {self.length} updates in a row, up to step {step} (loss "
                f"{float(metrics['loss']):.4g}, grad_norm {float(metrics['grad_norm']):.4g}); {saved}: start again in "
                "another workdir with a lower learning_rate, or look for what is wrong in the data."
            )


class Trace:
    """Writes a profile of some steps, for TensorBoard or Perfetto, starting with the third step of this process."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder, self._first, self._last, self._steps_done = folder, 2, 2 + steps, 0
        self._on = False

    def step(self, metrics: Any) -> None:
        """Called after every step."""
        self._steps_done += 1
        if self._first == self._steps_done < self._last:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        elif self._steps_done == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False


def fit(
    stage: Stage,
    params: Params,
    batches: TrainingBatches,
    options: Options,
    workdir: str | Path,
    *,
    mesh: Mesh | None = None,
    on_eval: Callable[[int, Params], Mapping[str, float | TrackedImages]] | None = None,
    trackers: Sequence[Tracker] = (),
    profile: int = 0,
) -> Result:
    """Train one stage, resuming from the last intact checkpoint in `workdir` if there is one.

    Args:
        stage: what is trained and how.
        params: all parameters that the loss needs, by module, held in full by every host.
        batches: of this host, batch_size / hosts examples each.
        options: of the optimization.
        workdir: checkpoints go to its folder `checkpoints`, numbers to `metrics.jsonl` and TensorBoard files to `tb`.
        mesh: devices over ("data", "fsdp", "tensor"); None takes all.
        on_eval: called as on_eval(step, params) before the first step, every `eval_every` steps and at the end (0: only
            there), with the moving average of the parameters as numpy arrays; the numbers and images it returns are
            reported. On every host.
        trackers: further trackers of these values, on the first host; `fit` closes them.
        profile: steps of which a trace is written to the folder `profile`.

    Returns:
        The parameters with the moving average of those trained. SIGTERM and Ctrl-C save a checkpoint and return early.

    Raises:
        OptionsError: options that do not fit each other or the devices.
        CheckpointError: a checkpoint cannot be written or does not fit the model, or none is intact.
        TrainingError: the initial parameters are not finite, or `max_skipped` updates in a row were not.
    """
    options.check(jax.device_count() if mesh is None else mesh.size)
    check_multipliers(options.lr_multipliers, params, stage.trainable)
    for sentence in options.too_long() if jax.process_index() == 0 else ():
        logging.warning("%s", sentence)
    mesh = parallel.mesh(options.fsdp, options.tensor) if mesh is None else mesh
    workdir, iterator = Path(workdir), iter(batches)
    trained = {k: params[k] for k in stage.trainable}
    frozen = cast_frozen({k: v for k, v in params.items() if k not in trained}, options)
    frozen = parallel.put_global(frozen, parallel.param_sharding(mesh, frozen))

    def averaged_params(state: TrainState) -> Params:
        return {**params, **parallel.fetch(state.ema)}

    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", options.keep_checkpoints))
        sigmas = options.ema_sigmas
        snapshots = stack.enter_context(Snapshots(workdir / "ema", sigmas)) if sigmas else None
        stop = stack.enter_context(Stop())
        state = starting_state(checkpoints, iterator, trained, options, mesh)
        start = step = int(state.step)
        train_step = make_train_step(stage.loss, options, mesh, state, stage.dtypes, stage.reads_state)
        report = stack.enter_context(open_report(workdir, stage.name, start, options, trackers))
        trace = stack.enter_context(closing(Trace(workdir / "profile", profile)))
        missing_snapshot, missing_evaluation = (
            missing_outputs(start, options, snapshots, state, workdir) if start else (False, False)
        )
        if start:
            report.say(f"goes on from step {start}.")
        if snapshots and missing_snapshot:
            snapshots.save(state.opt_state)

        def evaluate(step: int) -> None:
            if on_eval is not None and (values := on_eval(step, averaged_params(state))):
                report.show(step, values)

        if start < options.steps:
            report.say("compiling the training step, which may take some minutes.")
        if missing_evaluation or (options.eval_every and not start):  # at step 0, so that mistakes show early
            evaluate(start)
        guard, due = NonFiniteGuard(options.max_skipped), False
        in_flight: deque[tuple[int, Any]] = deque()  # steps and their metrics, not yet waited for

        def drain(keep: int) -> None:
            """Wait for and report all steps in flight but the last `keep`."""
            while len(in_flight) > keep:
                finished, metrics = in_flight.popleft()
                guard.update(finished, metrics, checkpoints.latest)
                report.step(finished, metrics)

        while step < options.steps and not stop.should_stop(step):
            batch = parallel.global_batch(mesh, stage.prepare(next(iterator)))
            state, metrics = train_step(state, frozen, batch)
            step += 1
            first = report.speed is None
            if first:
                report.speed = step_speed(train_step, stage, options, mesh, state, frozen, batch)
            in_flight.append((step, metrics))
            trace.step(metrics)
            last = step == options.steps
            evaluates = last or (options.eval_every and step % options.eval_every == 0)
            due = due or step % options.checkpoint_every == 0
            # While the devices compute this step, the host reports the one before and reads the next batch. No step is
            # in flight when the clock starts or stops.
            drain(0 if first or last or due or evaluates or report.ends_interval(step) else 1)
            if last or (due and not guard.length):  # while updates are skipped, keep the last good one
                checkpoints.save(step, state, iterator.get_state())
                due = False
            if snapshots and (last or step % options.snapshot_every == 0):
                snapshots.save(state.opt_state)
            if evaluates:
                evaluate(step)
            if first or evaluates:
                report.start_clock()
        drain(0)
        if step < options.steps:
            checkpoints.save(step, state, iterator.get_state())
            report.say(f"stopped at step {step} of {options.steps}; the same command goes on from there.")
        return Result(averaged_params(state), step)


def starting_state(
    checkpoints: Checkpoints, iterator: BatchIterator, trained: Params, options: Options, mesh: Mesh
) -> TrainState:
    """The state of the newest checkpoint, with the iterator set to its position in the data; else a fresh one.

    Args:
        trained: the parameters to train.

    Raises:
        CheckpointError: the checkpoint is of another model.
        TrainingError: parameters are not finite.
    """
    if checkpoints.latest is None:
        state = init_state(trained, optimizer(options), mesh)
    else:  # without a second state, for which the devices may lack memory
        state, position = checkpoints.restore(abstract_state(trained, options, mesh))
        iterator.set_state(position)
    if not all_finite(state):
        raise TrainingError(f"The parameters of {', '.join(trained)} to start from are not all finite.")
    return state


def missing_outputs(
    start: int, options: Options, snapshots: Snapshots | None, state: TrainState, workdir: Path
) -> tuple[bool, bool]:
    """Whether the snapshot and the evaluation of step `start` are missing; the same on every host.

    They are if the run was killed right after that step's checkpoint.
    """

    def due(interval: int) -> bool:
        return start == options.steps or (interval > 0 and start % interval == 0)

    missing = (False, False)
    if jax.process_index() == 0:
        missing = (
            snapshots is not None and due(options.snapshot_every) and snapshots.lacks(state.opt_state),
            due(options.eval_every) and not has_evaluation(workdir / "metrics.jsonl", start),
        )
    if jax.process_count() > 1:
        missing = multihost_utils.broadcast_one_to_all(np.asarray(missing))
    snapshot, evaluation = missing
    return bool(snapshot), bool(evaluation)


@jax.jit
def _finite(tree: Any) -> Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.asarray([jnp.isfinite(x).all() for x in floats]))


def all_finite(tree: Any) -> bool:
    """Whether every floating-point number of a tree of arrays is finite."""
    return bool(_finite(tree))


def open_report(workdir: Path, name: str, start: int, options: Options, trackers: Sequence[Tracker]) -> Report:
    """A report to the workdir and to further trackers on the first host, and one without output on the others."""
    if jax.process_index():
        trackers = ()
    else:
        trackers = (JsonLines(workdir / "metrics.jsonl", start), TensorBoard(workdir / "tb", start), *trackers)
    return Report(trackers, name, start, options.steps, options.batch_size, options.log_every)


def step_speed(
    train_step: Callable, stage: Stage, options: Options, mesh: Mesh, state: TrainState, frozen: Params, batch: Batch
) -> Speed:
    """The FLOPs of a step and the devices' peak, from which the report computes FLOP/s and MFU."""
    if options.accumulate > 1:  # XLA counts a loop's body once: count a step without microbatches
        options = dataclasses.replace(options, accumulate=1)
        train_step = make_train_step(stage.loss, options, mesh, state, stage.dtypes, stage.reads_state)
    devices = tuple(mesh.devices.flat)
    local_devices = tuple(d for d in devices if d.process_index == jax.process_index())
    return Speed(flops(train_step, state, frozen, batch), peak_flops(devices), local_devices)
