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

    Saving finishes in the background, and an incomplete checkpoint never counts as one. Damaged checkpoints that are
    newer than the newest intact one are renamed to damaged-<step>, with a warning.

    Raises:
        CheckpointError: the folder cannot be written to, or holds checkpoints of which none is intact.
        HostError: so it is for another host.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self._folder = Path(folder).absolute()
        self._saving: int | None = None
        self._url, self._keep = stores.behind(self._folder), keep
        with self._explained():
            with together():  # the others look at what is left
                self._folder.mkdir(parents=True, exist_ok=True)
                if not self._url and jax.process_index() == 0:
                    set_damaged_aside(self._folder)
            if self._url:
                remote_checkpoints.copy_newest(self._url, self._folder)
            seal = ocp.AsyncOptions(post_finalization_callback=self._seal)  # just before it is renamed
            if self._url:
                seal.timeout_secs = TIMEOUT
            common: dict[str, Any] = {
                "max_to_keep": 1 if self._url else keep, "cleanup_tmp_directories": True,
                "enable_async_checkpointing": True, "async_options": seal,
            }  # fmt: skip
            apart = bool(self._url) and jax.process_count() > 1
            self._manager = (
                _apart(self._folder, common)
                if apart
                else ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(**common))
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *exception: object) -> None:
        try:
            with self._explained():
                self._manager.close()  # waits for what is being written
        except CheckpointError as e:
            if kind is None:
                raise
            logging.error("%s", e)  # and what led here goes on

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Any) -> None:
        """Write the state (a tree of arrays) and this host's position in the data (what JSON holds).

        Raises:
            CheckpointError: this one or the one before cannot be written.
        """
        if step == self.latest:
            return
        items = {STATE: ocp.args.StandardSave(state), DATA: ocp.args.JsonSave({"hosts": gather(position)})}
        self.wait()
        with self._explained():
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises CheckpointError if it cannot be."""
        with self._explained():
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[Any, Any]:
        """The newest checkpoint as (state, this host's position in the data).

        Args:
            like: a state of the same shapes and types, as arrays or `jax.ShapeDtypeStruct`s; its shardings are those
                restored to, whatever they were when the checkpoint was written.

        Raises:
            CheckpointError: the checkpoint does not fit `like`, or was written by another number of hosts whose
                positions in the data differ.
        """
        step = self.latest
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
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

    def _seal(self) -> None:
        """Once all hosts have written: on the first, or on each where they share no folder."""
        for folder in self._folder.glob(f"{self._saving}.*tmp*"):
            sums = digests(folder)
            if self._url and self._saving is not None:
                sums = remote_checkpoints.commit(self._url, folder, self._saving, self._keep, sums)
            (folder / SUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn whatever orbax raises while writing into a CheckpointError of one sentence."""
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
            what = self._folder if self._saving is None else f"The checkpoint {self._folder}/{self._saving}"
            raise CheckpointError(
                f"{what} cannot be written ({reason(e)}): free space there and the same command goes on from the last "
                "checkpoint, or choose another workdir."
            ) from None


def _apart(folder: Path, options: dict[str, Any]) -> ocp.CheckpointManager:
    """A manager for hosts that share no folder: each writes its shards to files of its own."""
    alone = ocp.options.MultiprocessingOptions(primary_host=None)
    chosen = ocp.CheckpointManagerOptions(
        **options, multiprocessing_options=alone, enable_per_process_directory_creation=True
    )
    handlers: Any = {
        STATE: ocp.StandardCheckpointHandler(multiprocessing_options=alone, use_ocdbt=False),
        DATA: ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    return ocp.CheckpointManager(folder, options=chosen, item_handlers=handlers)


def set_damaged_aside(folder: Path) -> None:
    """Rename the checkpoints that are newer than the newest intact one.

    Raises:
        CheckpointError: there are some, and none is intact.
    """
    damaged: dict[Path, str] = {}
    for path in sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name), reverse=True):
        wrong = damage(path)
        if wrong is None:
            break
        damaged[path] = wrong
    else:
        if damaged:
            found = "; ".join(f"{path.name}: {wrong}" for path, wrong in damaged.items())
            raise CheckpointError(f"{folder} holds no intact checkpoint ({found}): choose another workdir.")
    for path, wrong in damaged.items():
        aside = next(p for i in range(10**6) if not (p := folder / f"damaged-{path.name}{f'-{i}' * bool(i)}").exists())
        path.rename(aside)
        logging.warning(
            "The checkpoint %s is damaged (%s): renamed to %s, an older one is used.", path, wrong, aside.name
        )
