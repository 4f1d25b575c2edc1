"""Captioned pictures of any kind that is read here: the path says which.

    pictures/                          a captioned folder: [split/]metadata.jsonl beside the pictures
    shards/, shards-{00000..00099}.tar webdataset tar shards
    table/, table.parquet              Parquet files with the bytes of pictures
    records/, data.array_record        ArrayRecord files of tf.train.Example messages
    saved/                             what Hugging Face `datasets` wrote with save_to_disk
    latents/                           what `jaxdiff.training.precompute` wrote

Of a folder of files the split's are those in its subfolder `split`, or whose names begin with the split's, there or in
a subfolder `data`; "train" takes all where no file is named so.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.data import pipeline
from jaxdiff.data.buckets import BucketOrder, Buckets
from jaxdiff.data.folder import HINT, METADATA, Decode, FolderSource, check_arguments, examples, find_metadata
from jaxdiff.data.latents import LatentShards
from jaxdiff.data.pipeline import BlockOrder, CaptionedData, Lanes
from jaxdiff.data.records import ArrayRecords
from jaxdiff.data.shards import TarShards
from jaxdiff.data.source import Source
from jaxdiff.data.tables import KEPT_GROUPS, ArrowTable, ParquetTable

KINDS = {".tar": "tar", ".parquet": "parquet", ".array_record": "records", ".arrayrecord": "records"}
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_FILES = 2_000_000
STATE = "state.json"  # of what save_to_disk wrote


def open_source(
    path: str | Path,
    split: str = "train",
    *,
    cache: Path | None = None,
    image_column: str = "",
    text_column: str = "",
    host_index: int = 0,
    host_count: int = 1,
) -> Source:
    """What lies at a path as a source of captioned pictures.

    Args:
      path: see above.
      split: "train", "validation", …
      cache: folder for what is made once, such as the index of tar shards, shared by all hosts; None keeps it in
        memory.
      image_column, text_column: of tables and records; "" looks for a usual name.
      host_index, host_count: hosts that share `cache` divide that work.

    Raises:
      ConfigError: it is of no kind known, missing, damaged or empty; one sentence.
    """
    kind, files = _resolved(path, split)
    columns = {"image_column": image_column, "text_column": text_column}
    if kind == "folder":
        return FolderSource(path, split)
    if kind == "arrow":
        return ArrowTable(files[0].parent, **columns)
    if kind == "tar":
        return TarShards(str(path), files, cache, host_index, host_count)
    return (ParquetTable if kind == "parquet" else ArrayRecords)(str(path), files, **columns)


def source_files(path: str | Path, split: str = "train") -> list[Path]:
    """The files that `open_source` reads, those that a folder's metadata name among them, whether they exist or not.

    Raises:
      ConfigError: the path or its metadata are missing, empty or damaged; one sentence.
    """
    kind, files = _resolved(path, split)
    if kind != "folder":
        return files
    found = examples(path, split)
    hints = [e.extras[HINT] for e in found if HINT in e.extras]
    return [find_metadata(Path(path), split), *(Path(p) for p in (*(e.path for e in found), *hints))]


def _resolved(path: str | Path, split: str) -> tuple[str, list[Path]]:
    """The kind of what lies at a path, and its files; none of a captioned folder, the default."""
    name, path = str(path), Path(path)
    if (path / STATE).is_file():
        return "arrow", _saved(path)
    if (path / "dataset_dict.json").is_file():
        if not (path / split / STATE).is_file():
            splits = ", ".join(sorted(p.parent.name for p in path.glob(f"*/{STATE}"))) or "none"
            raise ConfigError(f"{path} has no split {split!r}; its splits are {splits}.")
        return "arrow", _saved(path / split)
    if any((path / p).is_file() for p in (METADATA, f"{split}/{METADATA}")):
        return "folder", []
    files = _files(name, split)
    kinds = {KINDS[p.suffix] for p in files}
    if len(kinds) > 1:
        raise ConfigError(f"{name} holds files of several kinds ({', '.join(sorted(kinds))}): give one of them.")
    return (kinds.pop() if kinds else "folder"), files


def _saved(folder: Path) -> list[Path]:
    return [folder / STATE, *sorted(p for p in folder.glob("*.arrow") if not p.name.startswith("."))]


def _files(name: str, split: str) -> list[Path]:
    """The files of known kinds that a path stands for, sorted by name."""
    path = Path(name)
    if braces := BRACES.search(name):
        first, last = braces.groups()
        if int(last) - int(first) >= MAX_FILES:
            raise ConfigError(f"{name} stands for more than {MAX_FILES} files.")
        numbers = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
        found = [Path(name[: braces.start()] + n + name[braces.end() :]) for n in numbers]
        if missing := [p for p in found if not p.is_file()]:
            raise ConfigError(f"{name}: the file {missing[0]} does not exist.")
        return [p for p in found if p.suffix in KINDS]
    if path.is_file():
        if path.suffix not in KINDS:
            raise ConfigError(f"{name} is of no kind that is read: {', '.join(KINDS)}, or a folder.")
        return [path]
    own = [p for f in (path / split, path / "data" / split) for p in _known(f)]
    named = [p for f in (path, path / "data") for p in _known(f) if re.match(rf"{re.escape(split)}[-_.0-9]", p.name)]
    rest = [p for f in (path, path / "data") for p in _known(f)] if split == "train" else []
    return sorted(own or named or rest)


def _known(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    # Names with a dot in front are other programs' own, such as macOS's beside each file.
    return [p for p in folder.iterdir() if p.suffix in KINDS and not p.name.startswith(".") and p.is_file()]


def captioned_data(
    source: str | Path | Source | LatentShards,
    batch_size: int,
    image_size: int,
    *,
    seed: int,
    split: str = "train",
    shuffle: bool = True,
    epochs: int | None = None,
    buckets: Buckets | None = None,
    crop: int | None = None,
    flip: bool = False,
    background: str = "random",
    steer: Callable[[np.ndarray], np.ndarray] | None = None,
    drop_remainder: bool = True,
    host_index: int = 0,
    host_count: int = 1,
    workers: int = 0,
    threads: int = 8,
) -> CaptionedData:
    """Batches {"image": uint8 [b, H, W, 3], "text": list of b strings} of captioned pictures of any kind.

    Args:
      source: a path, see `open_source`, also for `split`; or what is open already. Of precomputed latents the batches
        hold "latents" and the like instead, and what concerns pictures has no meaning.
      batch_size: pictures of a batch on this host, b.
      image_size: pixels that the shorter side is resized to (Lanczos).
      seed: of the order and of every random choice, 0 <= seed < 2**32. The same seed gives the same batches.
      shuffle: a new order each epoch; otherwise that of the data.
      epochs: passes over the data; None goes on for ever. Batches span the border between epochs.
      buckets: sizes to cut pictures to, a batch at one size, and which of them each example has; None cuts squares.
        Of Parquet files at most `tables.KEPT_GROUPS` row groups can be read so.
      crop: pixels of a square cut out at random, H = W = crop; None takes the centre, H = W = image_size.
      flip: mirror left and right at random. Captions are not changed.
      background: "random" lays transparent pictures on white half of the time, else on a colour of
        `folder.BACKGROUNDS`, and adds ", on a blue background" to the caption; what would vanish on its colour gets
        white, or black. "white" is white for all.
      steer: makes "hint" uint8 [H, W, 3], what steers a ControlNet, out of each picture whose metadata name none. It
        runs where pictures are decoded, and is pickled for worker processes.
      drop_remainder: leave out the last batch of the last epoch unless it is full.
      host_index, host_count: this host reads its rows of each batch of host_count * b positions of the common stream.
      workers: processes that decode; 0 decodes in threads of this process. They import the package anew: scripts need
        `if __name__ == "__main__":`.
      threads: that decode, in each process.

    Raises:
      ConfigError: see `open_source`; an argument is wrong; while iterating, when no picture at all can be read. Single
        pictures that cannot be read, are too large or missing are left out (with `epochs`) or replaced by the next
        (without), see `CaptionedData.skipped`.
    """
    check_arguments(
        batch_size=batch_size, image_size=image_size, seed=seed, epochs=epochs, crop=crop, background=background,
        host_index=host_index, host_count=host_count, workers=workers, threads=threads,
    )  # fmt: skip
    if isinstance(source, str | Path):
        is_latents = (Path(source) / "latents.json").is_file()
        source = LatentShards(Path(source)) if is_latents else open_source(source, split)
    if buckets is not None and crop:
        raise ConfigError("crop and buckets do not go together: leave one of them out.")
    decode: pipeline.Decode
    if isinstance(source, LatentShards):
        decode, buckets = source, source.buckets
    else:
        decode = Decode(source, image_size, crop, flip, background, steer)
    how: dict[str, Any] = {"shuffle": shuffle, "epochs": epochs}
    blocks, whole = getattr(source, "blocks", None), batch_size * host_count
    order: Callable[[int, int], pipeline.Order] | None = None
    if buckets is not None:
        _check_buckets(source)
        chosen = buckets
        order = lambda seed, _: BucketOrder(chosen, whole, seed=seed, **how)  # noqa: E731
    elif blocks is not None:
        order = lambda seed, n: Lanes(  # noqa: E731
            [BlockOrder(blocks, seed=seed, lane=i, lanes=n, **how) for i in range(n)], whole
        )
    return pipeline.batches(
        source.name, len(source), decode, batch_size, seed=seed, order=order, replace=buckets is not None,
        lanes=host_count if blocks is not None and epochs is None else 1, drop_remainder=drop_remainder,
        host_index=host_index, host_count=host_count, workers=workers, threads=threads, **how,
    )  # fmt: skip


def _check_buckets(source: Source | LatentShards) -> None:
    """Raise ConfigError where pictures cannot be read in the order of buckets: each would cost a block of its own."""
    blocks = getattr(source, "blocks", None)
    if blocks is not None and len(blocks) > KEPT_GROUPS:
        raise ConfigError(
            f"buckets would read a whole row group of {source.name} for almost every picture: write its latents first "
            "(train.py --precompute, then latents.path; or cache_latents), or take tar shards or an Arrow folder."
        )
