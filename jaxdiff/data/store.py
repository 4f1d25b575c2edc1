"""Arrays in parts on disk. Each part is written once, by one of the hosts, and mapped into memory by all.

A part is a folder of .npy files, one for each array, all of the same length [n, ...]. It is written under a temporary
name, then renamed: a killed process loses at most the parts in progress, and hosts that share the folder divide the
work.
"""

import functools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging

from jaxdiff.config import ConfigError
from jaxdiff.files import writing

Arrays = Mapping[str, np.ndarray]
OPEN_PARTS = 256  # mapped at a time by a process; systems allow tens of thousands
PATIENCE = 3600.0  # seconds without a new part after which other hosts count as dead
LONGEST_PAUSE = 5.0  # seconds between two listings of what other hosts have written


def fill(
    folder: Path,
    names: Sequence[str],
    make: Callable[[int], Arrays],
    *,
    host_index: int = 0,
    host_count: int = 1,
    threads: int = 1,
) -> None:
    """Write this host's share of the missing parts `names`, then wait for the other hosts.

    Args:
        make: i -> the arrays of part i; must be deterministic.

    Raises:
        ConfigError: the folder cannot be written, or the other hosts wrote nothing for `PATIENCE` seconds.
    """
    existing = _list_names(folder)
    own_parts = {names[i]: i for i in range(host_index, len(names), host_count) if names[i] not in existing}
    for partial in existing:  # of a process that was killed: its name is .PART.PROCESS
        if partial.startswith(".") and partial[1:].rpartition(".")[0] in own_parts:
            shutil.rmtree(folder / partial, ignore_errors=True)
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda name: write_part(folder / name, make(own_parts[name])), own_parts):
            pass
    missing, last_progress, pause = set(names), time.monotonic(), 0.1
    while still_missing := missing - _list_names(folder):
        if len(still_missing) < len(missing):
            missing, last_progress = still_missing, time.monotonic()
        if time.monotonic() - last_progress > PATIENCE:
            raise ConfigError(f"{folder / min(missing)} was not written by its host within {PATIENCE:.0f} s.")
        logging.log_every_n_seconds(logging.INFO, "Waiting for other hosts: %d parts of %s.", 60, len(missing), folder)
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE)


def _list_names(folder: Path) -> set[str]:
    """The names in a folder, by a single call to the file system."""
    try:
        return set(os.listdir(folder))
    except OSError:  # no part is written yet, or writing one will raise what is wrong
        return set()


def write_part(path: Path, arrays: Arrays) -> None:
    """Write a part unless it exists.

    Raises:
        ConfigError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path, ConfigError, "free it or choose another place."):
        try:
            partial.mkdir(parents=True)
            for name, array in arrays.items():
                np.save(partial / f"{name}.npy", array, allow_pickle=False)
            partial.rename(path)
        except OSError:
            if not path.is_dir():  # otherwise another host was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_part(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a part, mapped into memory.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        arrays = {p.stem: np.load(p, mmap_mode="r") for p in sorted(Path(path).glob("*.npy"))}
    except (OSError, ValueError, EOFError) as e:
        raise ConfigError(f"{path} is damaged ({e}): delete that folder, and it is written anew.") from None
    if not arrays or len({len(a) for a in arrays.values()}) != 1:
        raise ConfigError(f"{path} holds no arrays of one length: delete that folder, and it is written anew.")
    return arrays


_mapped = functools.lru_cache(OPEN_PARTS)(read_part)


class Rows:
    """The concatenated rows of all parts. A pickle holds paths of parts on disk, and arrays of those in memory.

    Args:
        parts: folders, or arrays in memory.
    """

    def __init__(self, parts: Sequence[str | Arrays]) -> None:
        self._parts = list(parts)
        with ThreadPoolExecutor(16) as pool:  # network file systems have a high latency
            self.counts = np.asarray(list(pool.map(lambda p: len(next(iter(self._open(p).values()))), self._parts)))
        self._ends = np.cumsum(self.counts)

    @staticmethod
    def _open(part: str | Arrays) -> Arrays:
        return _mapped(part) if isinstance(part, str) else part

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> tuple[int, dict[str, np.ndarray]]:
        """(number of the part, row `index` of each of its arrays)."""
        part = int(np.searchsorted(self._ends, index, "right"))
        row = index - int(self._ends[part]) + int(self.counts[part])
        return part, {name: array[row] for name, array in self._open(self._parts[part]).items()}
