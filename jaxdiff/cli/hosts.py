"""Runs on several hosts, one process each: starting, dividing the work, waiting for and collecting results."""

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.experimental.multihost_utils import ProcessFailureError, live_devices, process_allgather

from jaxdiff.cli.errors import Failure, UsageError

CONNECT_TIMEOUT = 300  # seconds for all processes to connect


def check(f: flags.FlagValues) -> None:
    """Raise UsageError unless the flags of several processes are complete."""
    process_flags = f.num_processes, f.process_id
    if f.coordinator_address and (None in process_flags or not 0 <= f.process_id < f.num_processes):
        raise UsageError("--coordinator_address needs --num_processes and a --process_id from 0 to one less.")
    if process_flags != (None, None) and not f.coordinator_address:
        raise UsageError("--num_processes and --process_id need --coordinator_address=host:port.")


class ProcessesGone(Failure):
    """Other processes have stopped, so that their part is missing."""


def start(f: flags.FlagValues) -> None:
    """Connect to the other processes; on a TPU pod, under Slurm or Open MPI the environment supplies missing flags.

    If some are still missing after CONNECT_TIMEOUT seconds, the process exits with a sentence and code 1. (JAX would
    abort.)
    """
    if not (f.distributed or f.coordinator_address):
        return

    def exit_unconnected() -> None:
        name, where = Path(sys.argv[0]).name, f" at {f.coordinator_address}" if f.coordinator_address else ""
        print(
            f"{name}: error: not all processes connected{where} within {CONNECT_TIMEOUT} s: start the same command on "
            "every host, each with its own process_id if that is given, and make the first one's port reachable.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(CONNECT_TIMEOUT, exit_unconnected)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            f.coordinator_address, f.num_processes, f.process_id, initialization_timeout=2 * CONNECT_TIMEOUT
        )
    finally:
        timer.cancel()


@contextlib.contextmanager
def independent(f: flags.FlagValues) -> Iterator[None]:
    """`start`, for a block in which each process does its own part even if others fail.

    The block must end with `wait_for_all`. After Ctrl-C a process does not wait for the others.
    """
    if not (f.distributed or f.coordinator_address):
        yield
        return
    jax.config.update("jax_enable_recoverability", True)
    start(f)
    try:
        yield
    except ProcessesGone:
        shutdown()
        raise
    except Exception:
        if jax.process_index() == 0:  # it must exit last: the others would report it as missing
            with contextlib.suppress(ProcessesGone):
                wait_for_all(failed=True)
        shutdown()
        raise
    shutdown()


def shutdown() -> None:
    """Disconnect, the first process last, since the others need it until they have left."""
    if jax.process_index() == 0:
        with contextlib.suppress(ProcessFailureError), live_devices(jax.devices()):
            pass  # leaving the context waits for all live processes
    jax.distributed.shutdown()


def wait_for_all(*, failed: bool = False) -> None:
    """Wait until every process has called this.

    Args:
        failed: whether this process failed.

    Raises:
        ProcessesGone: on all processes, naming those that failed or are missing.
    """
    if jax.process_count() == 1:
        return
    missing = set(range(jax.process_count()))
    try:
        with live_devices(jax.devices()) as alive:
            missing -= {device.process_index for device in alive}
    except ProcessFailureError as e:
        missing |= {device.process_index for device in e.failed_devices}
    if not missing:
        missing |= set(np.flatnonzero(process_allgather(np.array(failed))))
    if missing:
        names = ", ".join(map(str, sorted(missing)))
        raise ProcessesGone(
            f"Process {names} of {jax.process_count()} has stopped, and its images are missing: see its error, "
            "and run the same command again with --overwrite."
        )


def check_consistent(workdir: Path | None, data: Any) -> None:
    """Raise Failure on all processes unless each sees the first one's workdir and has the same data.

    Args:
        workdir: a folder that exists on each; None if they need not share one.
        data: a JSON value that identifies the data.
    """
    if jax.process_count() == 1:
        return
    first = jax.process_index() == 0
    token = multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(8), np.uint8))
    mark = (workdir or Path()) / f".host-{bytes(token).hex()}"
    with contextlib.ExitStack() as stack:
        if workdir and first:
            mark.touch()
            stack.callback(mark.unlink, missing_ok=True)
        multihost_utils.sync_global_devices("workdir")
        sees_mark = not workdir or mark.exists()
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).digest()
        rows = process_allgather(np.frombuffer(bytes([sees_mark]) + digest, np.uint8))
    if names := ", ".join(str(i) for i, row in enumerate(rows) if not row[0]):
        raise Failure(
            f"--workdir {workdir}: process {names} sees another folder than process 0: give one that all hosts share, "
            "or a path in a bucket."
        )
    if names := ", ".join(str(i) for i, row in enumerate(rows) if (row != rows[0]).any()):
        raise Failure(f"config.data: process {names} has other files or captions than process 0: give all the same.")


def local_share(parts: Sequence[Any]) -> list[Any]:
    """This process's share of `parts`: every n-th, for n processes."""
    return list(parts[jax.process_index() :: jax.process_count()])


def gather_images(images: Sequence[np.ndarray], slices: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """All images in order, on every process, from each process's images of its own slices (see `local_share`)."""
    if jax.process_count() == 1:
        return list(images)
    lengths = [end - start for start, end in slices]
    counts = [sum(lengths[i :: jax.process_count()]) for i in range(jax.process_count())]
    shape = np.max(process_allgather(np.array(images[0].shape if images else (0, 0, 0))), axis=0)
    padded = np.zeros((max(counts), *shape), np.uint8)
    padded[: len(images)] = images if images else 0
    iterators = [iter(rows) for rows in process_allgather(padded)]
    return [next(iterators[i % len(iterators)]) for i, length in enumerate(lengths) for _ in range(length)]
