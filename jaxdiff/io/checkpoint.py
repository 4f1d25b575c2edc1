"""Checkpoints of training: the state of the optimisation and the position in the data, through orbax."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

STATE, DATA = "state", "data"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or does not fit what is trained."""


class Checkpoints:
    """The checkpoints of one run, in `folder`/<step>; the last `keep` are kept. A context manager.

    Saving returns at once and is finished in the background; a half-written checkpoint never counts as one.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        try:
            self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
        except OSError as e:
            raise CheckpointError(f"{folder} cannot be written ({e.strerror or e}): choose another workdir.") from None
        self._folder = folder

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()  # waits for what is being written

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Any) -> None:
        """Write the state (a tree of arrays) and this host's position in the data (what JSON holds)."""
        if step == self.latest:
            return
        items = {STATE: ocp.args.StandardSave(state), DATA: ocp.args.JsonSave({"hosts": _gather(position)})}
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: Any) -> tuple[Any, Any]:
        """The newest checkpoint as (state, this host's position in the data).

        Args:
            like: a state of the same shapes, types and shardings; its values are not read.

        Raises:
            CheckpointError: the checkpoint is of another model or number of hosts.
        """
        step = self.latest
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = {STATE: ocp.args.StandardRestore(abstract), DATA: ocp.args.JsonRestore()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, TypeError, KeyError) as e:
            reason = str(e).strip().split("\n")[0][:200]
            raise CheckpointError(
                f"The checkpoint {self._folder}/{step} does not fit this config ({reason}): "
                "go on with the config it was begun with, or choose another workdir."
            ) from None
        hosts = restored[DATA]["hosts"]
        if len(hosts) != jax.process_count():
            raise CheckpointError(
                f"The checkpoint {self._folder}/{step} was written by {len(hosts)} hosts, this run has "
                f"{jax.process_count()}: the position in the data cannot be divided anew."
            )
        return restored[STATE], hosts[jax.process_index()]


def _gather(position: Any) -> list[Any]:
    """What each host passed in, by the number of the host."""
    if jax.process_count() == 1:
        return [position]
    text = np.frombuffer(json.dumps(position).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
    return [json.loads(bytes(row)) for row in np.asarray(multihost_utils.process_allgather(padded))]
