"""Trackers of a run's metrics and images: lines of JSON, TensorBoard, Weights & Biases."""

import json
import math
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.files import write_text, writing
from jaxdiff.training.workdir import WorkdirError


class TrackedImages(NamedTuple):
    """Images sampled during training."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    captions: Sequence[str] = ()  # of each, or none


class Tracker(Protocol):
    """Takes values and images by name, at ascending steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def draw(self, step: int, name: str, images: TrackedImages) -> None: ...
    def close(self) -> None: ...


def write_errors(path: Path) -> AbstractContextManager[None]:
    """Turns errors of writing a file or folder of the workdir into WorkdirErrors of one sentence."""
    return writing(path, WorkdirError, "once it can, the same command goes on from the last checkpoint.")


class JsonLines:
    """A file with a line {"step": …, "loss": …} for each report. Values that are not finite are null.

    Args:
        start: step that the run resumes from. Lines after this step are removed, or all lines if it is 0.

    Raises:
        WorkdirError: it cannot be written, now or later.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        with write_errors(path):
            self._begin(path, start)

    def _begin(self, path: Path, start: int) -> None:
        earlier_lines = []
        if start and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= start:
                        earlier_lines.append(line + "\n")
                except (ValueError, LookupError, TypeError):
                    continue
        write_text(path, "".join(earlier_lines))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with write_errors(self._path):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()

    def draw(self, step: int, name: str, images: TrackedImages) -> None:
        """Images are not written."""

    def close(self) -> None:
        with write_errors(self._path):
            self._file.close()


def has_evaluation(path: Path, step: int) -> bool:
    """Whether `JsonLines` has written an evaluation after this step: a line without a training step's metrics."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return any(line["step"] == step and "grad_norm" not in line for line in lines)


class TensorBoard:
    """A folder of TensorBoard's event files. Events of an earlier run after step `start` (0: all events) are hidden.

    Events are on disk when a call returns. tensorboardX's own SummaryWriter writes in a thread, which dies at the first
    error; the run then goes on until the queue is full and blocks forever.

    Raises:
        WorkdirError: it cannot be written, now or later.
    """

    def __init__(self, folder: Path, start: int) -> None:
        # Imported here because it takes half a second, and only the first host needs it.
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._folder, self._event, self._summary = folder, Event, summary
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"  # ordered by time
            self._file = RecordWriter(str(folder / name))
            first = start + 1 if start else 0  # a new run evaluates step 0 anew
            self._put(first, file_version="brain.Event:2")
            self._put(first, session_log=SessionLog(status=SessionLog.START))

    def _put(self, step: int, **event: Any) -> None:
        self._file.write(self._event(step=step, wall_time=time.time(), **event).SerializeToString())

    def _add(self, step: int, summaries: Iterable[Any]) -> None:
        with write_errors(self._folder):
            for summary in summaries:
                self._put(step, summary=summary)
            self._file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [self._summary.scalar(name, value) for name, value in values.items() if math.isfinite(value)])

    def draw(self, step: int, name: str, images: TrackedImages) -> None:
        summaries = [self._summary.image(f"{name}/{i}", x, dataformats="HWC") for i, x in enumerate(images.images)]
        if images.captions:
            summaries.append(self._summary.text(name, "\n".join(f"{i}. {c}" for i, c in enumerate(images.captions))))
        self._add(step, summaries)

    def close(self) -> None:
        with write_errors(self._folder):
            self._file.close()


class WandB:
    """A run of Weights & Biases (`pip install ".[wandb]"`), continued when the workdir's run resumes.

    Args:
        project, name: of the run; with an empty name the service chooses one.
        config: shown beside the curves.
        folder: for its files and the run's id.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, project: str, name: str, config: Mapping[str, Any], folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "wandb.project is set but wandb is not installed: pip install wandb, or leave it empty."
            ) from None
        self._image, id_file = wandb.Image, folder / "wandb-id"
        id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        self._run = wandb.init(
            project=project, name=name or None, config=dict(config), dir=str(folder), id=id, resume="allow"
        )
        id_file.write_text(self._run.id, encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def draw(self, step: int, name: str, images: TrackedImages) -> None:
        captions: Sequence[str | None] = images.captions or [None] * len(images.images)
        wandb_images = [self._image(image, caption=c) for image, c in zip(images.images, captions, strict=True)]
        self._run.log({name: wandb_images}, step=step)

    def close(self) -> None:
        self._run.finish()
