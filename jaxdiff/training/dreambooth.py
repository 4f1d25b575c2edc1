"""Images of a subject, captioned by the config, and images of its class beside them (DreamBooth, Ruiz et al. 2023)."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.data.listing import IMAGE_SUFFIXES, REPEATS, folder_label, uncaptioned
from jaxdiff.data.pipeline import CaptionedData, GlobalStream
from jaxdiff.files import atomic_write, write_text


def write_captioned(path: str | Path, captions: Sequence[str], folder: Path) -> Path:
    """Create a captioned folder with all images of `path`, which needs no metadata; each image gets all `captions`.

    Args:
        folder: the new folder; its `metadata.jsonl` refers to the images through a link. Several hosts may create it.

    Raises:
        ConfigError: there is no image.
    """
    path = Path(path).absolute()
    images = uncaptioned(path)
    if not images:
        raise ConfigError(f"The folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for image in images:
        name, (repeats, _) = image.relative_to(path).as_posix(), folder_label(path, image)
        entry = {"file_name": f"pictures/{name}", "text": list(captions), **({REPEATS: repeats} if repeats > 1 else {})}
        lines.append(json.dumps(entry) + "\n")
    with atomic_write(folder / "pictures") as link:
        link.symlink_to(path)
    write_text(folder / "metadata.jsonl", "".join(lines))
    return folder


# --- prior preservation (DreamBooth, Ruiz et al. 2023)


@dataclasses.dataclass(frozen=True)
class _StreamWithPrior(GlobalStream):
    """The first rows of each batch from this stream, the others from `prior`; see `with_prior`."""

    prior: GlobalStream
    rows: tuple[int, int]  # rows of each stream in a batch
    weight: float

    def __getitem__(self, position: int) -> dict[str, Any]:
        num_subject, num_prior = self.rows
        batch, row = divmod(position, num_subject + num_prior)
        if row < num_subject:
            example, weight = super().__getitem__(batch * num_subject + row), 1.0
        else:
            example, weight = self.prior[batch * num_prior + row - num_subject], self.weight
        return {**example, "weight": np.float32(weight)} if "text" in example else example


@dataclasses.dataclass(frozen=True)
class _DataWithPrior(CaptionedData):
    prior: CaptionedData
    weight: float
    rows: tuple[int, int]

    def stream(self, host_shards: int) -> GlobalStream:
        subject, prior = super().stream(host_shards), self.prior.stream(self.prior.host_shards)
        return _StreamWithPrior(**vars(subject), prior=prior, rows=self.rows, weight=self.weight)


def with_prior(
    subject: CaptionedData, prior: CaptionedData, weight: float, *, host_index: int = 0, host_count: int = 1
) -> CaptionedData:
    """Batches of a subject's images followed by images of its class, whose loss counts `weight` times.

    (Ruiz et al. 2023, equation 2.) They also hold "weight" float32 [b], that of each example.

    Args:
        subject, prior: endless batches of all hosts together, as for a single host.
        host_index, host_count: this host reads its rows of each whole batch.
    """
    rows = subject.batch_size, prior.batch_size
    hosts = {"batch_size": sum(rows) // host_count, "host_index": host_index, "host_count": host_count}
    return _DataWithPrior(**{**vars(subject), **hosts}, prior=prior, weight=weight, rows=rows)
