"""Where the numbers and pictures of a run are written: lines of JSON, TensorBoard, Weights & Biases."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.training.workdir import WorkdirError


class Pictures(NamedTuple):
    """What is drawn while training."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    captions: Sequence[str] = ()  # of each, or none


class Tracker(Protocol):
    """A place that takes values and pictures by name at a step, steps ascending."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def draw(self, step: int, name: str, pictures: Pictures) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """A file with a line {"step": …, "loss": …} for each report. What is not finite is null.

    Args:
        start: the run goes on from this step: later lines, and one that was being written when it was killed, go.

    Raises:
        WorkdirError: it cannot be written, now or later.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        with self._explained():
            self._begin(path, start)

    def _begin(self, path: Path, start: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= start:
                        kept.append(line + "\n")
                except (ValueError, LookupError, TypeError):
                    continue
        partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._explained():
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()

    def draw(self, step: int, name: str, pictures: Pictures) -> None:
        """Pictures have no place in lines of JSON."""

    def close(self) -> None:
        with self._explained():
            self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise WorkdirError(
                f"{self._path} cannot be written ({e.strerror or e}): once it can, the same command goes on from "
                "the last checkpoint."
            ) from None


class TensorBoard:
    """A folder of TensorBoard's event files; what an earlier run wrote after `start` is not shown any more."""

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboardX import SummaryWriter  # half a second, on the first host only

        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def draw(self, step: int, name: str, pictures: Pictures) -> None:
        for i, image in enumerate(pictures.images):
            self._writer.add_image(f"{name}/{i}", image, step, dataformats="HWC")
        if pictures.captions:
            self._writer.add_text(name, "\n".join(f"{i}. {c}" for i, c in enumerate(pictures.captions)), step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases (`pip install jaxdiff[wandb]`), the same one when the workdir's run goes on.

    Args:
        project, name: as in its web pages; an empty name lets the service choose one.
        config: what is shown beside the curves.
        folder: of its files, and of its run's id.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, project: str, name: str, config: Mapping[str, Any], folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "wandb.project is set but wandb is not installed: pip install jaxdiff[wandb], or leave it empty."
            ) from None
        self._image, stored = wandb.Image, folder / "wandb-id"
        id = stored.read_text(encoding="utf-8").strip() if stored.exists() else None
        self._run = wandb.init(
            project=project, name=name or None, config=dict(config), dir=str(folder), id=id, resume="allow"
        )
        stored.write_text(self._run.id, encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def draw(self, step: int, name: str, pictures: Pictures) -> None:
        captions: Sequence[str | None] = pictures.captions or [None] * len(pictures.images)
        shown = [self._image(image, caption=c) for image, c in zip(pictures.images, captions, strict=True)]
        self._run.log({name: shown}, step=step)

    def close(self) -> None:
        self._run.finish()
