"""Checkpoints of a run whose workdir is in an object store.

They are written locally and uploaded under the same names. A store cannot rename, so the first host uploads the file of
checksums last: a checkpoint without it is incomplete and is ignored. Several hosts share no local folder: each uploads
its own chunks, then their checksums, which the first host collects.
"""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from absl import logging

from jaxdiff import stores
from jaxdiff.errors import JaxdiffError
from jaxdiff.training import remote
from jaxdiff.training.digests import SUMS, UNCHECKED, damage
from jaxdiff.training.together import together

PATIENCE = 3600.0  # seconds that the first host waits for the others' uploads


class NoneIntact(JaxdiffError):
    """No checkpoint is intact; the message says what is wrong with each."""


def copy_newest(url: str, folder: Path) -> None:
    """Download the newest intact checkpoint into a folder, and remove everything else there. Call it on every host.

    The first host removes incomplete checkpoints from the store, and renames damaged ones that are newer.

    Raises:
        NoneIntact: there are checkpoints, but none is intact.
        StoreError: the store cannot be read.
        HostError: another host failed for one of these reasons.
    """
    newest = None
    with together():
        if jax.process_index() == 0:
            _remove_unfinished(url)
            newest = _set_damaged_aside(url, folder)
    with together():
        if jax.process_index() and (steps := complete_steps(url)):
            newest = steps[0]
            if problem := _copy(url, folder, newest):
                raise _none_intact(url, {newest: problem})
        _leave_only(folder, newest)


def _none_intact(url: str, damaged: Mapping[int, str]) -> NoneIntact:
    problems = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
    return NoneIntact(f"{url} holds no intact checkpoint ({problems}): choose another workdir.")


def complete_steps(url: str) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    names = (name.split("/") for name in stores.listing(url))
    return sorted((int(p[0]) for p in names if len(p) == 2 and p[0].isdigit() and p[1] == SUMS), reverse=True)


def commit(url: str, folder: Path, step: int, keep: int, sums: dict[str, str]) -> dict[str, str]:
    """Upload this host's files of a checkpoint. The first host waits for the others, then marks it as complete.

    Args:
        folder: the files that this host has written.
        keep: number of checkpoints to keep in the store; older ones are removed.
        sums: checksums of this host's files, by name.

    Returns:
        On the first host the checksums of all hosts, else those of this one.

    Raises:
        StoreError: the store cannot be written.
        WorkdirError: another run has taken over the workdir.
    """
    target, names = f"{url}/{step}", [*sums, *(name for name in UNCHECKED if name != SUMS and (folder / name).exists())]
    host, hosts = jax.process_index(), jax.process_count()
    if host:
        stores.upload(folder, target, names)
        stores.write(f"{target}/{SUMS}.{host}", json.dumps(sums).encode())
        return sums
    all_sums = dict[str, str]()
    for other in range(1, hosts):
        all_sums |= _sums_of(f"{target}/{SUMS}.{other}")
    all_sums |= sums  # of files that several hosts write, the version of this host, which uploads last
    stores.upload(folder, target, names)
    stores.remove(*(f"{target}/{SUMS}.{other}" for other in range(1, hosts)))
    remote.flush(url.rpartition("/")[0])
    remote.check_own(url.rpartition("/")[0])
    stores.write(f"{target}/{SUMS}", json.dumps(all_sums, indent=1).encode())
    for old in complete_steps(url)[keep:]:
        _remove(f"{url}/{old}")
    return all_sums


def _sums_of(url: str) -> dict[str, str]:
    start = time.monotonic()
    while (data := stores.read(url)) is None:
        if time.monotonic() - start > PATIENCE:
            raise stores.StoreError(f"{url} was not written by its host within {PATIENCE:.0f} s.")
        time.sleep(0.5)
    return json.loads(data)


def _remove(url: str) -> None:
    """Remove a checkpoint, first the file that marks it as complete."""
    stores.remove(f"{url}/{SUMS}")
    stores.remove(*(f"{url}/{name}" for name in stores.listing(url)))


def _remove_unfinished(url: str) -> None:
    complete = complete_steps(url)
    names = [name for name in stores.listing(url) if name.split("/")[0].isdigit()]
    stores.remove(*(f"{url}/{name}" for name in names if int(name.split("/")[0]) not in complete))


def _set_damaged_aside(url: str, folder: Path) -> int | None:
    """Copy the newest intact checkpoint to `folder` and return its step; None if there are no checkpoints."""
    damaged: dict[int, str] = {}
    for step in complete_steps(url):
        problem = _copy(url, folder, step)
        if problem is None:
            break
        damaged[step] = problem
    else:
        if damaged:
            raise _none_intact(url, damaged)
        return None
    for other, problem in damaged.items():
        target = next(u for i in range(10**6) if not stores.listing(u := f"{url}/damaged-{other}{f'-{i}' * bool(i)}"))
        stores.move(f"{url}/{other}", target, SUMS)
        logging.warning(
            "The checkpoint %s/%d is damaged (%s): renamed to %s, an older one is used.",
            url, other, problem, target.rpartition("/")[2],
        )  # fmt: skip
    return step


def _copy(url: str, folder: Path, step: int) -> str | None:
    """Copy a checkpoint to `folder`, unless it is there. Returns what is wrong with the copy; None if it is intact."""
    source, local = f"{url}/{step}", folder / str(step)
    sums = stores.read(f"{source}/{SUMS}")
    if local.is_dir() and (local / SUMS).is_file() and (local / SUMS).read_bytes() == sums and damage(local) is None:
        return None
    _leave_only(folder, None)
    logging.info("Copying the checkpoint %s to this machine.", source)
    stores.download(source, local, stores.listing(source))
    return damage(local)


def _leave_only(folder: Path, step: int | None) -> None:
    for path in folder.iterdir():
        if path.name != str(step):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
