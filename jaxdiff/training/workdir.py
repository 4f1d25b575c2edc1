"""The workdir of a run: locked by one process, and with its config in run.json, which checkpoints are tied to."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from jaxdiff import stores
from jaxdiff.data.captioned import source_files
from jaxdiff.data.listing import CAPTION_SUFFIXES, TABLES, uncaptioned
from jaxdiff.errors import JaxdiffError
from jaxdiff.files import make_writable, write_text, writing
from jaxdiff.training.defaults import flat, with_current_names
from jaxdiff.training.digests import SUMS
from jaxdiff.training.options import default_warmup
from jaxdiff.training.together import together

PACKAGES = ("jaxdiff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Settings that may change on resuming, as they do not affect what is learned. A name includes all settings below it.
FREE_SETTINGS = (
    "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "max_skipped", "eval", "wandb", "fsdp", "tensor",
    "accumulate", "remat", "data.threads", "data.workers", "data.eval_split", "latents.batch_size",
)  # fmt: skip
# Stages whose loss depends on which examples share a part of the batch, so that `accumulate` may not change: the
# negatives of "clip", the discriminator's batch norm and the adaptive weight of "vae_decoder".
MICROBATCH_STAGES = ("clip", "vae_decoder")
MAX_SIZES = 10_000  # files whose size is part of a fingerprint


class WorkdirError(JaxdiffError, ValueError):
    """A workdir that is in use, cannot be written to, or belongs to another config."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs for the duration of the block, however this process ends.

    Raises:
        WorkdirError: another run holds it, or the folder cannot be written to.
    """
    path = folder / "lock"
    with writing(path, WorkdirError, "choose another workdir."):
        file = path.open("a+", encoding="utf-8")
    with file:  # closing the file releases the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise WorkdirError(
                f"The workdir {folder} is in use by another run (process {holder}): wait for it, or choose another "
                "workdir."
            ) from None
        except OSError as e:  # file systems without locks, such as some network mounts
            logging.warning("%s cannot be locked (%s): let no second run use this workdir.", path, e.strerror)
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


@contextlib.contextmanager
def claimed(folder: Path, first: bool = True) -> Iterator[Callable[[], None]]:
    """Create and lock a run's folder for the duration of the block, which receives a function `keep`.

    If the block fails before it calls `keep`, everything that was written into the folder is removed.

    Args:
        first: whether this is the first host, which locks the folder and cleans up.

    Raises:
        WorkdirError: another run holds it, or the folder cannot be written to.
        HostError: another host failed for one of these reasons.
    """
    path = folder.absolute()
    missing_folders = [p for p in (path, *path.parents) if not p.exists()]  # deepest first
    had_lock, committed = (folder / "lock").exists(), False

    def keep() -> None:
        nonlocal committed
        committed = True

    def drop(paths: Iterable[Path]) -> None:
        for path in paths:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in missing_folders:
            with contextlib.suppress(OSError):
                path.rmdir()

    with contextlib.ExitStack() as stack:
        with together():
            try:
                make_writable(folder)
            except OSError as e:
                drop(())
                raise WorkdirError(
                    f"--workdir: {folder} cannot be written to ({e.strerror or e}): choose another place."
                ) from None
            if first:
                stack.enter_context(lock(folder))
        existing = {path for path in folder.iterdir() if had_lock or path.name != "lock"}
        try:
            yield keep
        except Exception:
            if not committed:
                drop(set(folder.iterdir()) - existing if first else ())
            raise


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results, by name."""
    by_package = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            by_package[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # used from its source folder
            continue
    return by_package


def data_fingerprint(path: str | Path, split: str = "train", captions: bool = False, **columns: str) -> dict[str, Any]:
    """A fingerprint of a data set: its files' names, some of their sizes, and the captions. No image is read.

    Only files that training reads count, not a workdir or other files beside them.

    Args:
        path, split, columns: see `jaxdiff.data.captioned.open_source`.
        captions: whether all images get the config's captions, so that the folder needs no metadata.

    Returns:
        {"files": their number, "digest": a hash of all names in order, the sizes of at most MAX_SIZES evenly spread
        files, and a folder's captions}.

    Raises:
        ConfigError: there are no such data.
    """
    path, digest = Path(path), hashlib.sha256()
    folder = path if path.is_dir() else path.parent
    root = path / split if (path / split).is_dir() else path
    files = uncaptioned(root) if captions else source_files(path, split, **columns)
    for file in files:
        digest.update(os.path.relpath(file, folder).encode() + b"\n")
        if file.name in TABLES or file.suffix.lower() in CAPTION_SUFFIXES:
            digest.update(file.read_bytes())
    for file in files[:: -(-len(files) // MAX_SIZES) or 1]:
        with contextlib.suppress(OSError):  # missing images are reported in training
            digest.update(str(file.stat().st_size).encode() + b"\n")
    return {"files": len(files), "digest": digest.hexdigest()[:16]}


def settle(
    folder: Path, config: Mapping[str, Any], data: Mapping[str, Any], defaults: Mapping[str, Any], write: bool = True
) -> None:
    """Compare a run with the workdir's `run.json`, then write the new one: {"config", "data", "versions"}.

    Args:
        folder: the workdir. As long as it holds no checkpoint, anything may still change.
        config: all settings, as JSON.
        data: the fingerprint of the data.
        defaults: values of settings that an older `run.json` lacks.
        write: False only compares, as all hosts but the first do.

    Raises:
        WorkdirError: the data have changed, or a setting that is not free ("steps" may grow). The sentence shows each
            change as old -> new. Changed package versions only cause a warning.
    """
    path = folder / "run.json"
    record = {"config": config, "data": dict(data), "versions": versions()}
    record = json.loads(json.dumps(record))
    if path.exists() and _has_checkpoints(folder):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            old_config = {**flat(json.loads(json.dumps(defaults))), **flat(with_current_names(stored["config"]))}
            refused = _refused_changes(old_config, flat(record["config"]))
            refused += _changes({"data": stored["data"]}, {"data": record["data"]})
            version_changes = _changes(stored["versions"], record["versions"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise WorkdirError(f"{path} cannot be read ({e}): choose another workdir.") from None
        if refused:
            raise WorkdirError(
                f"The workdir {folder} belongs to another config ({'; '.join(refused)}): go on with its own, or choose "
                f"another workdir; free to change are steps (upwards) and {', '.join(free_settings(record['config']))}."
            )
        if version_changes and write:
            logging.warning("The run goes on with other versions than before: %s.", "; ".join(version_changes))
    if not write:
        return
    with writing(path, WorkdirError, "choose another workdir."):
        write_text(path, json.dumps(record, indent=2) + "\n")


def _has_checkpoints(folder: Path) -> bool:
    if url := stores.behind(folder):
        return any(name.endswith(f"/{SUMS}") and name[0].isdigit() for name in stores.listing(f"{url}/checkpoints"))
    return any(p.name.isdigit() for p in (folder / "checkpoints").glob("*"))


def stored_config(folder: Path) -> dict[str, Any]:
    """The settings in a workdir's `run.json`, with lists as tuples.

    Raises:
        WorkdirError: the file is missing or damaged.
    """
    path = folder / "run.json"

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tuples(x) for name, x in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    try:
        return with_current_names(tuples(json.loads(path.read_text(encoding="utf-8"))["config"]))
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise WorkdirError(f"{path} cannot be read ({e}): name the workdir of a run, or its --config.") from None


def free_settings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of FREE_SETTINGS that may change in a run of this config."""
    return tuple(name for name in FREE_SETTINGS if name != "accumulate" or config.get("stage") not in MICROBATCH_STAGES)


def _refused_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Changes of settings that are not free."""

    def is_allowed(name: str) -> bool:
        grows = name == "steps" and new.get(name, 0) >= old.get(name, 0)
        if name == "warmup_steps" and all(x.get(name) == default_warmup(x.get("steps", 0)) for x in (old, new)):
            return True  # the default, which follows from the steps
        return grows or any(f"{name}.".startswith(f"{free_name}.") for free_name in free_settings(new))

    return _changes(*({k: v for k, v in settings.items() if not is_allowed(k)} for settings in (old, new)))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: {json.dumps(old.get(name))} -> {json.dumps(new.get(name))}" for name in names]
