"""Images of a subject, captioned by the config, and images of its class beside them (DreamBooth, Ruiz et al. 2023)."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.data.listing import IMAGE_SUFFIXES, REPEATS, repeated, uncaptioned
from jaxdiff.data.pipeline import CaptionedData, GlobalStream
from jaxdiff.files import atomic_write, write_text


def captioned(path: str | Path, captions: Sequence[str], folder: Path) -> Path:
    """A captioned folder of all images that lie in `path`, which needs no metadata: one of `captions` at a time.

    Args:
        folder: made; its `metadata.jsonl` points at the images through a link. Several hosts may make the same one.

    Raises:
        ConfigError: there is no image.
    """
    path = Path(path).absolute()
    images = uncaptioned(path)
    if not images:
        raise ConfigError(f"The folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    folder.mkdir(parents=True, exist_ok=True)
    shown = [({REPEATS: n} if (n := repeated(path, p)[0]) > 1 else {}, p.relative_to(path).as_posix()) for p in images]
    lines = [json.dumps({"file_name": f"pictures/{p}", "text": list(captions), **n}) + "\n" for n, p in shown]
    with atomic_write(folder / "pictures") as link:
        link.symlink_to(path)
    write_text(folder / "metadata.jsonl", "".join(lines))
    return folder


# --- prior preservation (DreamBooth, Ruiz et al. 2023)


@dataclasses.dataclass(frozen=True)
class _Both(GlobalStream):
    """Of each batch the first rows from this stream, the others from `prior`; see `with_prior`."""

    prior: GlobalStream
    rows: tuple[int, int]  # of each in a batch
    weight: float

    def __getitem__(self, position: int) -> dict[str, Any]:
        own, others = self.rows
        batch, row = divmod(position, own + others)
        if row < own:
            found, weight = super().__getitem__(batch * own + row), 1.0
        else:
            found, weight = self.prior[batch * others + row - own], self.weight
        return {**found, "weight": np.float32(weight)} if "text" in found else found


@dataclasses.dataclass(frozen=True)
class _DataWithPrior(CaptionedData):
    prior: CaptionedData
    weight: float
    rows: tuple[int, int]

    def stream(self, host_shards: int) -> GlobalStream:
        own = super().stream(host_shards)
        return _Both(**vars(own), prior=self.prior.stream(self.prior.host_shards), rows=self.rows, weight=self.weight)


def with_prior(
    own: CaptionedData, prior: CaptionedData, weight: float, *, host_index: int = 0, host_count: int = 1
) -> CaptionedData:
    """Batches of one's own images followed by images of their class, whose loss counts `weight` times.

    (Ruiz et al. 2023, equation 2.) They also hold "weight" float32 [b], that of each example.

    Args:
        own, prior: endless batches of all hosts together, as for the only host.
        host_index, host_count: this host reads its rows of each whole batch.
    """
    rows = own.batch_size, prior.batch_size
    hosts = {"batch_size": sum(rows) // host_count, "host_index": host_index, "host_count": host_count}
    return _DataWithPrior(**{**vars(own), **hosts}, prior=prior, weight=weight, rows=rows)
