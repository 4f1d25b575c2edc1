"""Runs whose workdir is in an object store: they write to a local folder, which is uploaded.

When a run starts, it downloads what it needs to resume, so that it can resume on any machine. A lock object keeps other
runs out: it is created only if it does not exist, and renewed while its process lives. The lock of a dead process is
removed by one other process. `remote_checkpoints` handles checkpoints. Exports and latents are uploaded when they are
complete.
"""

import contextlib
import json
import os
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from jaxdiff import stores
from jaxdiff.data.latents import INFO
from jaxdiff.errors import say_once
from jaxdiff.io.diffusers_folder import INDEX
from jaxdiff.training.together import together
from jaxdiff.training.workdir import WorkdirError

LOCK = "lock"
CLAIMS = "takeover"  # folder of claims to remove a dead process's lock, by the token of that process
BEAT, LEASE = 20.0, 70.0  # seconds between renewals of the lock, and until a lock without renewals counts as dead
UPLOAD_EVERY = 30.0  # seconds
TRIES = 5  # of an upload during which other programs remove files
TREES = ("tb", "samples", "profile", "wandb", "ema")  # folders uploaded as they grow, like files of the workdir itself
NOT_READ = TREES[1:]  # folders that resuming does not need
TOKEN = uuid.uuid4().hex  # of this process


def workdir(path: str) -> Path:
    """A run's folder on this machine; each process has its own for a store's path."""
    return stores.place(path, f"workdir-{jax.process_index()}") if stores.is_store(path) else Path(path)


@contextlib.contextmanager
def held(folder: Path, first: bool = True) -> Iterator[Callable[[], None]]:
    """Lock a workdir in a store for the duration of the block, which receives a function that starts the uploads.

    Does nothing for local folders.

    Args:
        first: whether this is the first host, which locks and uploads.

    Raises:
        WorkdirError: another run holds it.
        StoreError: it cannot be read or written.
        HostError: another host failed for one of these reasons.
    """
    if (url := stores.behind(folder)) is None:
        yield lambda: None
        return
    with contextlib.ExitStack() as stack:
        with together():
            if first:
                stack.enter_context(_lock(url))
            pull(folder)
        uploads = _Uploads(folder, url)
        try:
            yield uploads.begin if first else lambda: None
        except BaseException:
            with contextlib.suppress(stores.StoreError):  # keep the original error
                uploads.end()
            raise
        uploads.end()


def pull(folder: Path, *, snapshots: bool = False) -> None:
    """Download what a run needs to resume, and remove what an earlier run left on this machine.

    Args:
        snapshots: whether to download snapshots of averages too.
    """
    if (url := stores.behind(folder)) is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.iterdir()]:
        if path.name in TREES or path.name.startswith("export"):
            shutil.rmtree(path)
        elif path.is_file() and path.name != LOCK:
            path.unlink()
    names = stores.listing(url)
    latents_folders = [name.removesuffix(INFO) for name in names if name.endswith(f"/{INFO}")]
    skipped_prefixes = tuple(f"{tree}/" for tree in NOT_READ if not (snapshots and tree == "ema"))
    growing = [name for name in names if _is_growing(name) and not name.startswith(skipped_prefixes)]
    stores.download(url, folder, [*growing, *(name for name in names if name.startswith(tuple(latents_folders)))])


def publish(folder: Path) -> None:
    """Upload a complete folder of the run, such as an export. Does nothing for local folders."""
    if url := stores.behind(folder):
        names = stores.files(folder)
        stores.publish(folder, url, next((name for name in (INDEX, INFO) if name in names), names[-1]))


def _is_growing(name: str) -> bool:
    top, *below = name.split("/")
    return top in TREES if below else top != LOCK


class _Uploads:
    """Uploads files of a run that have changed, periodically in the background and once at the end."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url
        self._uploaded = self._file_states()
        self._lock = threading.Lock()
        self._timer: _RepeatingTimer | None = None

    def begin(self) -> None:
        self.flush()
        _active_uploads[self._url] = self
        self._timer = _RepeatingTimer(UPLOAD_EVERY, self.flush)

    def end(self) -> None:
        if self._timer is not None:
            del _active_uploads[self._url]
            self._timer.stop()
            self.flush()

    def flush(self) -> None:
        with self._lock:
            for _ in range(TRIES):
                states = self._file_states()
                changed = {name: state for name, state in states.items() if self._uploaded.get(name) != state}
                try:
                    stores.upload(self._folder, self._url, changed)
                except FileNotFoundError:
                    if all((self._folder / name).exists() for name in changed):
                        raise  # no such bucket
                    continue  # another program, such as wandb, has just removed one of its files
                self._uploaded |= changed
                return

    def _file_states(self) -> dict[str, tuple[int, int]]:
        """Bytes and time of each file that is uploaded as it grows."""
        names = [path.name for path in self._folder.iterdir() if path.is_file() and path.name[0] != "."]
        names += [f"{tree}/{name}" for tree in TREES for name in stores.files(self._folder / tree)]
        states = dict[str, tuple[int, int]]()
        for name in filter(_is_growing, names):
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                stat = (self._folder / name).stat()
                states[name] = stat.st_size, stat.st_mtime_ns
        return states


_active_uploads: dict[str, _Uploads] = {}  # by the run's path


def flush(url: str) -> None:
    """Upload now, so that the store has everything that was written before a checkpoint."""
    if url in _active_uploads:
        _active_uploads[url].flush()


class _RepeatingTimer:
    """Calls a function at a fixed interval, on a thread of its own."""

    def __init__(self, seconds: float, run: Callable[[], None]) -> None:
        self._seconds, self._run, self._stopped = seconds, run, threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self._run()
            except Exception as e:  # retried next time; the last upload, at the end of the run, raises
                say_once(str(e))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


# --- one run at a time


@contextlib.contextmanager
def _lock(url: str) -> Iterator[None]:
    lock, beats = f"{url}/{LOCK}", 0

    def renew() -> None:
        nonlocal beats
        check_own(url)
        beats += 1
        stores.write(lock, _lock_content(beats))

    _acquire(url, lock)
    timer = _RepeatingTimer(BEAT, renew)
    try:
        yield
    finally:
        timer.stop()
        with contextlib.suppress(stores.StoreError):
            if _holder(lock).get("token") == TOKEN:
                stores.remove(lock)


def check_own(url: str) -> None:
    """Raise WorkdirError if another run has taken over the folder because this one seemed dead."""
    if _holder(f"{url}/{LOCK}").get("token", TOKEN) != TOKEN:
        raise WorkdirError(f"The workdir {url} has been taken over by another run, since this one did not renew its "
                           f"lock for {LEASE:.0f} s: this run ends.")  # fmt: skip


def _acquire(url: str, lock: str) -> None:
    while True:
        try:
            stores.write(lock, _lock_content(0), new=True)
        except FileExistsError:
            pass
        except FileNotFoundError:
            raise WorkdirError(f"The workdir {url} cannot be written: there is no such bucket.") from None
        # Read it even after a successful write: stores without conditional writes accept both of two writers. Read it
        # after FileExistsError too, as the response to an earlier successful write may have been lost.
        if (holder := _holder(lock)).get("token") == TOKEN:
            return
        if not holder and not stores.exists(lock):  # removed meanwhile
            continue
        if not _is_dead(lock, holder):
            raise WorkdirError(
                f"The workdir {url} is in use by another run (process {holder.get('pid', 'unknown')} on "
                f"{holder.get('host', 'unknown')}): wait for it, or choose another workdir."
            )
        _take_over(url, lock, holder)


def _take_over(url: str, lock: str, holder: dict[str, Any]) -> None:
    """Remove the lock of a dead process.

    Only the process that holds a claim removes it: a second one might otherwise remove the new lock of a third. A
    process without the claim returns, and its caller reads the lock again.
    """
    claim = f"{url}/{CLAIMS}/{holder.get('token')}"
    try:
        stores.write(claim, _lock_content(0), new=True)
    except FileExistsError:
        claimant = _holder(claim)
        if claimant.get("token") != TOKEN:
            if claimant and _is_dead(claim, claimant):
                _take_over(url, claim, claimant)
            return
    if _holder(lock) == holder:
        stores.remove(lock)
    stores.remove(claim)


def _is_dead(lock: str, holder: dict[str, Any]) -> bool:
    """Whether a lock's holder is dead: looks for the process if it is of this machine, else waits for a renewal."""
    if holder.get("machine") == _machine():
        return _started(holder.get("pid")) != holder.get("started")
    logging.info("Waiting up to %g s to see whether the run that holds %s still lives.", LEASE, lock)
    start = time.monotonic()
    while time.monotonic() - start < LEASE:
        time.sleep(min(BEAT / 10, LEASE / 10))
        if _holder(lock) != holder:
            return False
    return True


def _lock_content(beats: int) -> bytes:
    pid = os.getpid()
    process = {"pid": pid, "started": _started(pid), "host": platform.node(), "machine": _machine()}
    return json.dumps({"token": TOKEN, "beats": beats, **process}).encode()


def _machine() -> list[str]:
    """Host, boot and PID namespace: process ids are comparable where these are equal (on Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [platform.node(), boot, os.readlink("/proc/self/ns/pid")]
    except OSError:
        return [uuid.uuid4().hex]  # equal to no other


def _started(pid: object) -> str:
    """The start time of a process in clock ticks since boot; "" if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _holder(lock: str) -> dict[str, Any]:
    try:
        content = json.loads(stores.read(lock) or b"{}")
    except ValueError:
        content = {}
    return content if isinstance(content, dict) else {}
