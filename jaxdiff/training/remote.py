"""Runs whose workdir is in an object store: they write to a local folder, which is uploaded.

When a run starts, it downloads what it needs to resume, so that it can resume on any machine. A lock object keeps other
runs out: it is created only if it does not exist, and renewed while its process lives. Only one other process removes
that of a dead one. `remote_checkpoints` handles checkpoints. Exports and latents are uploaded when they are complete.
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
CLAIMS = "takeover"  # a folder of locks on locks, by the token of their holder
BEAT, LEASE = 20.0, 70.0  # seconds between renewals of the lock, and without a renewal until it counts as dead
UPLOAD_EVERY = 30.0  # seconds
TRIES = 5  # of an upload during which other programs remove files
TREES = ("tb", "samples", "profile", "wandb", "ema")  # folders uploaded as they grow, as are the files beside them
NOT_READ = TREES[1:]  # by a run that resumes
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
        HostError: either is so for another host.
    """
    if (url := stores.behind(folder)) is None:
        yield lambda: None
        return
    with contextlib.ExitStack() as stack:
        with together():
            if first:
                stack.enter_context(_locked(url))
            pull(folder)
        uploads = _Uploads(folder, url)
        try:
            yield uploads.begin if first else lambda: None
        except BaseException:
            with contextlib.suppress(stores.StoreError):  # what ended the block counts
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
    objects = stores.listing(url)
    latents = [name.removesuffix(INFO) for name in objects if name.endswith(f"/{INFO}")]
    skipped = tuple(f"{tree}/" for tree in NOT_READ if not (snapshots and tree == "ema"))
    grown = [name for name in objects if _grows(name) and not name.startswith(skipped)]
    stores.download(url, folder, [*grown, *(name for name in objects if name.startswith(tuple(latents)))])


def publish(folder: Path) -> None:
    """Upload a complete folder of the run, such as an export. Does nothing for local folders."""
    if url := stores.behind(folder):
        names = stores.files(folder)
        stores.publish(folder, url, next((name for name in (INDEX, INFO) if name in names), names[-1]))


def _grows(name: str) -> bool:
    top, *below = name.split("/")
    return top in TREES if below else top != LOCK


class _Uploads:
    """Uploads files of a run that have changed, periodically in the background and once at the end."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url
        self._uploaded = self._found()
        self._one = threading.Lock()
        self._every: _Every | None = None

    def begin(self) -> None:
        self.flush()
        _begun[self._url] = self
        self._every = _Every(UPLOAD_EVERY, self.flush)

    def end(self) -> None:
        if self._every is not None:
            del _begun[self._url]
            self._every.stop()
            self.flush()

    def flush(self) -> None:
        with self._one:
            for _ in range(TRIES):
                changed = {name: state for name, state in self._found().items() if self._uploaded.get(name) != state}
                try:
                    stores.upload(self._folder, self._url, changed)
                except FileNotFoundError:
                    if all((self._folder / name).exists() for name in changed):
                        raise  # no such bucket
                    continue  # another program, such as wandb, has just removed a file of its own
                self._uploaded |= changed
                return

    def _found(self) -> dict[str, tuple[int, int]]:
        """Bytes and time of each file that is uploaded as it grows."""
        names = [path.name for path in self._folder.iterdir() if path.is_file() and path.name[0] != "."]
        names += [f"{tree}/{name}" for tree in TREES for name in stores.files(self._folder / tree)]
        found = dict[str, tuple[int, int]]()
        for name in filter(_grows, names):
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                info = (self._folder / name).stat()
                found[name] = info.st_size, info.st_mtime_ns
        return found


_begun: dict[str, _Uploads] = {}  # by the run's path


def flush(url: str) -> None:
    """Upload now, so that the store has everything that was written before a checkpoint."""
    if url in _begun:
        _begun[url].flush()


class _Every:
    """Calls a function at a fixed interval, on a thread of its own."""

    def __init__(self, seconds: float, run: Callable[[], None]) -> None:
        self._seconds, self._run, self._stopped = seconds, run, threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self._run()
            except Exception as e:  # tried again next time; the last try, at the end of the run, raises
                say_once(str(e))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


# --- one run at a time


@contextlib.contextmanager
def _locked(url: str) -> Iterator[None]:
    lock, beats = f"{url}/{LOCK}", 0

    def renew() -> None:
        nonlocal beats
        check_own(url)
        beats += 1
        stores.write(lock, _mark(beats))

    _acquire(url, lock)
    every = _Every(BEAT, renew)
    try:
        yield
    finally:
        every.stop()
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
            stores.write(lock, _mark(0), new=True)
        except FileExistsError:
            pass
        except FileNotFoundError:
            raise WorkdirError(f"The workdir {url} cannot be written: there is no such bucket.") from None
        # Read in any case: a store without conditions lets two write, and the answer to the try before may be lost.
        if (holder := _holder(lock)).get("token") == TOKEN:
            return
        if not holder and not stores.exists(lock):  # gone meanwhile
            continue
        if not _dead(lock, holder):
            raise WorkdirError(
                f"The workdir {url} is in use by another run (process {holder.get('pid', 'unknown')} on "
                f"{holder.get('host', 'unknown')}): wait for it, or choose another workdir."
            )
        _take_over(url, lock, holder)


def _take_over(url: str, lock: str, holder: dict[str, Any]) -> None:
    """Remove the lock of a process that is gone.

    Of several that find it dead only one does, which holds a claim meanwhile: another, who would remove it later,
    might remove the lock that a third has made since. Whoever is not the one returns, and looks at the lock anew.
    """
    claim = f"{url}/{CLAIMS}/{holder.get('token')}"
    try:
        stores.write(claim, _mark(0), new=True)
    except FileExistsError:
        other = _holder(claim)
        if other.get("token") != TOKEN:
            if other and _dead(claim, other):
                _take_over(url, claim, other)
            return
    if _holder(lock) == holder:
        stores.remove(lock)
    stores.remove(claim)


def _dead(lock: str, holder: dict[str, Any]) -> bool:
    """Whether the process that holds a lock is gone: look for it on this machine, else wait for a renewal."""
    if holder.get("machine") == _machine():
        return _started(holder.get("pid")) != holder.get("started")
    logging.info("Waiting up to %g s to see whether the run that holds %s still lives.", LEASE, lock)
    since = time.monotonic()
    while time.monotonic() - since < LEASE:
        time.sleep(min(BEAT / 10, LEASE / 10))
        if _holder(lock) != holder:
            return False
    return True


def _mark(beats: int) -> bytes:
    pid = os.getpid()
    where = {"pid": pid, "started": _started(pid), "host": platform.node(), "machine": _machine()}
    return json.dumps({"token": TOKEN, "beats": beats, **where}).encode()


def _machine() -> list[str]:
    """Host, boot and PID namespace: process ids are comparable where these are equal (on Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [platform.node(), boot, os.readlink("/proc/self/ns/pid")]
    except OSError:
        return [uuid.uuid4().hex]  # none


def _started(pid: object) -> str:
    """The start time of a process in clock ticks since boot; "" if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _holder(lock: str) -> dict[str, Any]:
    try:
        found = json.loads(stores.read(lock) or b"{}")
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}
