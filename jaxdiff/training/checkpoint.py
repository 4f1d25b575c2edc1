"""Checkpoints of training: the state of the optimization and the position in the data, through orbax.

A checkpoint is written under a temporary name and renamed when it is complete. It includes the SHA-256 of each of its
files, which is verified before it is read. With an object store, its files are uploaded before it is renamed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from jaxdiff import stores
from jaxdiff.errors import JaxdiffError
from jaxdiff.training import remote_checkpoints
from jaxdiff.training.digests import SUMS, damage, digests, reason
from jaxdiff.training.together import HostError, gather, together
from jaxdiff.training.workdir import WorkdirError

STATE, DATA = "state", "data"
TIMEOUT = 4 * 3600  # seconds that hosts wait for each other; includes uploads


class CheckpointError(JaxdiffError, RuntimeError):
    """A checkpoint that cannot be written or does not fit what is trained."""


class Checkpoints:
    """The checkpoints of one run, in `folder`/<step>; the last `keep` are kept. A context manager.

    Checkpoints are written in the background; incomplete ones are ignored. Damaged checkpoints that are newer than the
    newest intact one are renamed to damaged-<step>, with a warning.

    Raises:
        CheckpointError: the folder cannot be written to, or holds checkpoints of which none is intact.
        HostError: another host failed for one of these reasons.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self._folder = Path(folder).absolute()
        self._saving: int | None = None
        self._url, self._keep = stores.behind(self._folder), keep
        with self._orbax_errors():
            with together():  # the other hosts then see only intact checkpoints
                self._folder.mkdir(parents=True, exist_ok=True)
                if not self._url and jax.process_index() == 0:
                    set_damaged_aside(self._folder)
            if self._url:
                remote_checkpoints.copy_newest(self._url, self._folder)
            # The callback runs just before a checkpoint gets its final name.
            async_options = ocp.AsyncOptions(post_finalization_callback=self._write_checksums)
            if self._url:
                async_options.timeout_secs = TIMEOUT
            manager_options: dict[str, Any] = {
                "max_to_keep": 1 if self._url else keep, "cleanup_tmp_directories": True,
                "enable_async_checkpointing": True, "async_options": async_options,
            }  # fmt: skip
            separate_folders = bool(self._url) and jax.process_count() > 1
            self._manager = (
                _per_host_manager(self._folder, manager_options)
                if separate_folders
                else ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(**manager_options))
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *exception: object) -> None:
        try:
            with self._orbax_errors():
                self._manager.close()  # waits for the checkpoint in progress
        except CheckpointError as e:
            if kind is None:
                raise
            logging.error("%s", e)  # the exception that ends the block is raised instead

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Any) -> None:
        """Write the state (a tree of arrays) and this host's position in the data (a JSON value).

        Raises:
            CheckpointError: this checkpoint or the previous one cannot be written.
        """
        if step == self.latest:
            return
        items = {STATE: ocp.args.StandardSave(state), DATA: ocp.args.JsonSave({"hosts": gather(position)})}
        self.wait()
        with self._orbax_errors():
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises CheckpointError if it cannot be."""
        with self._orbax_errors():
            self._manager.wait_until_finished()

    def restore(self, target: Any) -> tuple[Any, Any]:
        """The newest checkpoint as (state, this host's position in the data).

        Args:
            target: a state of the same shapes and types, as arrays or `jax.ShapeDtypeStruct`s. The restored arrays get
                its shardings, whatever those of the checkpoint were.

        Raises:
            CheckpointError: the checkpoint does not fit `target`, or was written by another number of hosts whose
                positions in the data differ.
        """
        step = self.latest
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
        items = {STATE: ocp.args.StandardRestore(abstract), DATA: ocp.args.JsonRestore()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, TypeError, KeyError) as e:
            raise CheckpointError(
                f"The checkpoint {self._folder}/{step} does not fit this config ({reason(e)}): "
                "go on with the config it was begun with, or choose another workdir."
            ) from None
        hosts = restored[DATA]["hosts"]
        if len(hosts) == jax.process_count():
            return restored[STATE], hosts[jax.process_index()]
        if any(position != hosts[0] for position in hosts):
            raise CheckpointError(
                f"The checkpoint {self._folder}/{step} was written by {len(hosts)} hosts, each at its own position "
                f"in the data, which the {jax.process_count()} of this run cannot share: go on with {len(hosts)}."
            )
        return restored[STATE], hosts[0]

    def _write_checksums(self) -> None:
        """Runs when all hosts have written: on the first host, or on each of them where they share no folder."""
        for folder in self._folder.glob(f"{self._saving}.*tmp*"):
            sums = digests(folder)
            if self._url and self._saving is not None:
                sums = remote_checkpoints.commit(self._url, folder, self._saving, self._keep, sums)
            (folder / SUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")

    @contextmanager
    def _orbax_errors(self) -> Iterator[None]:
        """Turn errors of orbax and of the store into a CheckpointError of one sentence."""
        try:
            yield
        except (CheckpointError, WorkdirError, HostError):
            raise
        except remote_checkpoints.NoneIntact as e:
            raise CheckpointError(str(e)) from None
        except stores.StoreError as e:
            text = f"{str(e).rstrip('.')}; the same command goes on from the last checkpoint."
            raise CheckpointError(text) from None
        except (OSError, ValueError, RuntimeError) as e:
            place = self._folder if self._saving is None else f"The checkpoint {self._folder}/{self._saving}"
            raise CheckpointError(
                f"{place} cannot be written ({reason(e)}): free space there and the same command goes on from the last "
                "checkpoint, or choose another workdir."
            ) from None


def _per_host_manager(folder: Path, options: dict[str, Any]) -> ocp.CheckpointManager:
    """A manager for hosts that share no folder: each writes its shards to its own files."""
    multiprocessing = ocp.options.MultiprocessingOptions(primary_host=None)
    manager_options = ocp.CheckpointManagerOptions(
        **options, multiprocessing_options=multiprocessing, enable_per_process_directory_creation=True
    )
    handlers: Any = {
        STATE: ocp.StandardCheckpointHandler(multiprocessing_options=multiprocessing, use_ocdbt=False),
        DATA: ocp.JsonCheckpointHandler(multiprocessing_options=multiprocessing),
    }
    return ocp.CheckpointManager(folder, options=manager_options, item_handlers=handlers)


def set_damaged_aside(folder: Path) -> None:
    """Rename the damaged checkpoints that are newer than the newest intact one.

    Raises:
        CheckpointError: there are checkpoints, and none is intact.
    """
    damaged: dict[Path, str] = {}
    for path in sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name), reverse=True):
        problem = damage(path)
        if problem is None:
            break
        damaged[path] = problem
    else:
        if damaged:
            problems = "; ".join(f"{path.name}: {problem}" for path, problem in damaged.items())
            raise CheckpointError(f"{folder} holds no intact checkpoint ({problems}): choose another workdir.")
    for path, problem in damaged.items():
        aside = next(p for i in range(10**6) if not (p := folder / f"damaged-{path.name}{f'-{i}' * bool(i)}").exists())
        path.rename(aside)
        logging.warning(
            "The checkpoint %s is damaged (%s): renamed to %s, an older one is used.", path, problem, aside.name
        )
