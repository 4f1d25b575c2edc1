"""Checkpoints of training: the state of the optimisation and the position in the data, through orbax.

A checkpoint is written under another name and renamed when it is whole, with the SHA-256 of each of its files among
them. Orbax itself does not notice every flipped byte, so that the sums are compared before a checkpoint is read.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from jaxdiff.errors import JaxdiffError

STATE, DATA = "state", "data"
SUMS = "sha256.json"
UNCHECKED = (SUMS, "_CHECKPOINT_METADATA", "commit_success.txt")  # orbax writes these last, and reads nothing from them


class CheckpointError(JaxdiffError, RuntimeError):
    """A checkpoint that cannot be written or does not fit what is trained."""


class Checkpoints:
    """The checkpoints of one run, in `folder`/<step>; the last `keep` are kept. A context manager.

    Saving returns at once and is finished in the background; a half-written checkpoint never counts as one. Those newer
    than the newest intact one are named in a warning and renamed to damaged-<step>.

    Raises:
        CheckpointError: the folder cannot be written to, or holds checkpoints of which none is intact.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self._folder = Path(folder).absolute()
        self._saving: int | None = None
        with self._explained():
            self._folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                set_damaged_aside(self._folder)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("checkpoints")  # the others look at what is left
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),  # just before it is renamed
            )
            self._manager = ocp.CheckpointManager(self._folder, options=options)

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
        items = {STATE: ocp.args.StandardSave(state), DATA: ocp.args.JsonSave({"hosts": _gather(position)})}
        self.wait()
        with self._explained():
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Until the last one is written. Raises CheckpointError: it cannot be."""
        with self._explained():
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[Any, Any]:
        """The newest checkpoint as (state, this host's position in the data).

        Args:
            like: a state of the same shapes and types, as arrays or `jax.ShapeDtypeStruct`s; its shardings are those
                restored to, whatever they were when the checkpoint was written.

        Raises:
            CheckpointError: the checkpoint is of another model; or of another number of hosts, whose positions differ.
        """
        step = self.latest
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = {STATE: ocp.args.StandardRestore(abstract), DATA: ocp.args.JsonRestore()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, TypeError, KeyError) as e:
            raise CheckpointError(
                f"The checkpoint {self._folder}/{step} does not fit this config ({_reason(e)}): "
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
        """On the first host, once all have written."""
        for folder in self._folder.glob(f"{self._saving}.*tmp*"):
            (folder / SUMS).write_text(json.dumps(digests(folder), indent=1), encoding="utf-8")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever orbax raises while it writes, in one sentence."""
        try:
            yield
        except CheckpointError:
            raise
        except (OSError, ValueError, RuntimeError) as e:
            what = self._folder if self._saving is None else f"The checkpoint {self._folder}/{self._saving}"
            raise CheckpointError(
                f"{what} cannot be written ({_reason(e)}): free space there and the same command goes on from the last "
                "checkpoint, or choose another workdir."
            ) from None


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a checkpoint's folder, by its path in there."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in UNCHECKED)

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # the sums are computed without Python's lock
        return dict(zip((p.relative_to(folder).as_posix() for p in files), pool.map(digest, files), strict=True))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing: a file that is missing, of other bytes, or one too many."""
    try:
        wanted = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        found = digests(folder)
    except (OSError, ValueError) as e:
        return f"{SUMS} cannot be read: {_reason(e)}"
    if not isinstance(wanted, dict):
        return f"{SUMS} holds no sums"
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing, which {SUMS} lists"
        if wanted.get(name) != found[name]:
            return f"{name} holds other bytes than {SUMS} says"
    return None


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


def _reason(error: BaseException) -> str:
    """What an error says, without what follows its first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for known in ("No space left on device", "File too large", "Disk quota exceeded", "Permission denied"):
        if known.lower() in str(error).lower():
            return known
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def _gather(position: Any) -> list[Any]:
    """What each host passed in, by the number of the host."""
    if jax.process_count() == 1:
        return [position]
    text = np.frombuffer(json.dumps(position).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
    return [json.loads(bytes(row)) for row in np.asarray(multihost_utils.process_allgather(padded))]
