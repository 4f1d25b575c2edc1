"""Captioned images in any supported format, which is recognised by the path.

    images/                            a captioned folder: [split/]metadata.jsonl, .csv or .parquet, or text files
    shards/, shards-{00000..00099}.tar webdataset tar shards
    table/, table.parquet              Parquet files with the bytes of images
    records/, data.array_record        ArrayRecord files of tf.train.Example messages
    saved/                             what Hugging Face `datasets` wrote with save_to_disk
    latents/                           what `jaxdiff.training.precompute` wrote

In a folder of files, a split consists of the files in the subfolder `split`, or of those in the folder or its subfolder
`data` whose names begin with the split's name. If there are none, "train" consists of all files.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.data import pipeline
from jaxdiff.data.buckets import BucketOrder, Buckets
from jaxdiff.data.folder import NO_WARP, FolderSource, ImageDecoder, Warp
from jaxdiff.data.latents import LatentShards
from jaxdiff.data.listing import PARQUET, TABLES, has_text_files, image_files, listed_files
from jaxdiff.data.orders import BlockOrder, HostShards, Order
from jaxdiff.data.pipeline import CaptionedData
from jaxdiff.data.records import ArrayRecords
from jaxdiff.data.shards import TarShards
from jaxdiff.data.source import Source
from jaxdiff.data.tables import KEPT_GROUPS, ArrowTable, ParquetTable
from jaxdiff.errors import say_once

KINDS = {".tar": "tar", ".parquet": "parquet", ".array_record": "records", ".arrayrecord": "records"}
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_FILES = 2_000_000
STATE = "state.json"  # in folders written by save_to_disk


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
    """The captioned images at a path, as a source.

    Args:
        path: see above.
        split: "train", "validation", …
        cache: folder for results such as the index of tar shards, shared by all hosts; None keeps them in memory.
        image_column, text_column: of tables, records and the metadata of folders; "" looks for a usual name.
        host_index, host_count: hosts that share `cache` divide the work.

    Raises:
        ConfigError: the path is missing, damaged, empty or of an unknown kind.
    """
    kind, files = _resolve(path, split)
    columns = {"image_column": image_column, "text_column": text_column}
    if kind == "folder":
        return FolderSource(path, split, **columns)
    if kind == "arrow":
        return ArrowTable(files[0].parent, **columns)
    if kind == "tar":
        return TarShards(str(path), files, cache, host_index, host_count)
    return (ParquetTable if kind == "parquet" else ArrayRecords)(str(path), files, **columns)


def source_files(path: str | Path, split: str = "train", **columns: str) -> list[Path]:
    """The files that `open_source` reads, including those listed in a folder's metadata, whether they exist or not.

    Raises:
        ConfigError: the path or its metadata are missing, empty or damaged.
    """
    kind, files = _resolve(path, split)
    return listed_files(path, split, **columns) if kind == "folder" else files


def _resolve(path: str | Path, split: str) -> tuple[str, list[Path]]:
    """(the kind of data at a path, its files). The default is "folder", without files."""
    name, path = str(path), Path(path)
    if (path / STATE).is_file():
        return "arrow", _arrow_files(path)
    if (path / "dataset_dict.json").is_file():
        if not (path / split / STATE).is_file():
            splits = ", ".join(sorted(p.parent.name for p in path.glob(f"*/{STATE}"))) or "none"
            raise ConfigError(f"{path} has no split {split!r}; its splits are {splits}.")
        return "arrow", _arrow_files(path / split)
    files = _files(name, split)
    if any((path / p / name).is_file() for p in ("", split) for name in TABLES):
        if files:
            say_once(f"{path} holds {_describe(files)} beside the captions of images: the images alone are read.")
        return "folder", []
    kinds = {KINDS[p.suffix] for p in files}
    if len(kinds) > 1:
        raise ConfigError(f"{name} holds files of several kinds ({', '.join(sorted(kinds))}): give the path of one.")
    roots = (path, path / split) if split == "train" else (path / split,)
    if files and (beside := [root for root in roots if _has_images(root)]):
        shown = _describe(files)
        say_once(f"{beside[0]} holds images beside {shown}, and these alone are read: move one of them away.")
    return (kinds.pop() if kinds else "folder"), files


def _has_images(root: Path) -> bool:
    """Whether a folder holds images that the user may have meant as data."""
    try:
        return bool(image_files(root)) or has_text_files(root)
    except ConfigError:  # a folder that cannot be read
        return False


def _describe(files: list[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{len(files)} files such as {files[0].name}"


def _arrow_files(folder: Path) -> list[Path]:
    return [folder / STATE, *sorted(p for p in folder.glob("*.arrow") if not p.name.startswith("."))]


def _files(name: str, split: str) -> list[Path]:
    """The files of known kinds at a path, sorted by name."""
    path = Path(name)
    if braces := BRACES.search(name):
        first, last = braces.groups()
        if int(last) - int(first) >= MAX_FILES:
            raise ConfigError(f"{name} stands for more than {MAX_FILES} files.")
        numbers = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
        files = [Path(name[: braces.start()] + number + name[braces.end() :]) for number in numbers]
        if missing := [p for p in files if not p.is_file()]:
            raise ConfigError(f"{name}: the file {missing[0]} does not exist.")
        return [p for p in files if p.suffix in KINDS]
    if path.is_file():
        if path.suffix not in KINDS:
            raise ConfigError(f"{name} is of an unknown kind: give a folder, or a file {', '.join(KINDS)}.")
        return [path]
    in_split = [*_data_files(path / split), *_data_files(path / "data" / split)]
    unsplit = [*_data_files(path), *_data_files(path / "data")]
    with_prefix = [p for p in unsplit if re.match(rf"{re.escape(split)}[-_.0-9]", p.name)]
    return sorted(in_split or with_prefix or (unsplit if split == "train" else []))


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    # Files with a leading dot belong to other programs, such as those that macOS puts beside each file.
    known = (p for p in folder.iterdir() if p.suffix in KINDS and p.name != PARQUET)
    return [p for p in known if not p.name.startswith(".") and p.is_file()]


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
    warp: Warp = NO_WARP,
    background: str = "random",
    make_control_image: Callable[[np.ndarray], np.ndarray] | None = None,
    drop_remainder: bool = True,
    host_index: int = 0,
    host_count: int = 1,
    workers: int = 0,
    threads: int = 8,
) -> CaptionedData:
    """Batches {"image": uint8 [b, H, W, 3], "text": list of b strings} of captioned images of any kind.

    Args:
        source: a path, see `open_source`, also for `split`; or an open source. Batches of precomputed latents hold
            "latents" etc. instead of images, and the arguments about images are not used.
        batch_size: images in a batch on this host, b.
        image_size: pixels that the shorter side is resized to (Lanczos).
        seed: of the order and of every random choice, 0 <= seed < 2**32. The same seed gives the same batches.
        shuffle: whether each epoch has another order; otherwise it is that of the data.
        epochs: passes over the data; None is endless. Batches span the border between epochs.
        buckets: sizes to crop images to, one for each batch, and each example's size; None crops squares. Parquet files
            may then have at most `tables.KEPT_GROUPS` row groups.
        crop: pixels of a square cropped at random, H = W = crop; None takes the centre, H = W = image_size.
        flip: whether to mirror left and right at random. Captions are not changed.
        warp: how far to rotate, stretch and shift at random. Captions are not changed.
        background: "random" puts transparent images on white half of the time, otherwise on a colour of
            `folder.BACKGROUNDS`, and adds ", on a blue background" to the caption; images that would not show on their
            colour get white, or black. "white" is white for all.
        make_control_image: image uint8 [H, W, 3] -> "hint" uint8 [H, W, 3], a ControlNet's input, for each image whose
            metadata name none. It runs where images are decoded, and is pickled for worker processes.
        drop_remainder: whether to leave out the last batch of the last epoch if it is not full.
        host_index, host_count: this host reads its rows of each batch of host_count * b positions of the global stream.
        workers: processes that decode; 0 decodes in threads of this process. They import the package anew: scripts need
            `if __name__ == "__main__":`.
        threads: threads that decode, in each process.

    Raises:
        ConfigError: see `open_source`; an argument is wrong; while iterating, no image at all can be read. Single
            images that are unreadable, too large or missing are left out (with `epochs`) or replaced by the next ones
            (without), see `CaptionedData.skipped`.
    """
    _check_arguments(
        batch_size=batch_size, image_size=image_size, seed=seed, epochs=epochs, crop=crop, background=background,
        host_index=host_index, host_count=host_count, workers=workers, threads=threads,
    )  # fmt: skip
    if isinstance(source, str | Path):
        is_latents = (Path(source) / "latents.json").is_file()
        source = LatentShards(Path(source)) if is_latents else open_source(source, split)
    if buckets is not None and crop:
        raise ConfigError("crop and buckets cannot be combined: leave one of them out.")
    decode: pipeline.Decoder
    if isinstance(source, LatentShards):
        decode, buckets = source, source.buckets
    else:
        decode = ImageDecoder(source, image_size, crop, flip, background, make_control_image, warp)
    passes: dict[str, Any] = {"shuffle": shuffle, "epochs": epochs}
    return pipeline.batches(
        source.name, len(source), decode, batch_size, seed=seed, replace=buckets is not None,
        order=_order(source, buckets, batch_size * host_count, **passes),
        host_shards=host_count if _blocks(source) is not None and epochs is None else 1, drop_remainder=drop_remainder,
        host_index=host_index, host_count=host_count, workers=workers, threads=threads, **passes,
    )  # fmt: skip


def _blocks(source: Source | LatentShards) -> np.ndarray | None:
    """Records in each block of a source that is read by blocks; None for other sources."""
    return None if isinstance(source, LatentShards) else source.blocks


def _order(
    source: Source | LatentShards, buckets: Buckets | None, global_batch: int, *, shuffle: bool, epochs: int | None
) -> Callable[[int, int], Order] | None:
    """A function (seed, host shards) -> order of a source; None where it is read one example at a time."""
    blocks = _blocks(source)
    if buckets is not None:
        _check_buckets(source)
        return lambda seed, _: BucketOrder(buckets, global_batch, seed=seed, shuffle=shuffle, epochs=epochs)
    if blocks is None:
        return None

    def of_blocks(seed: int, host_shards: int) -> Order:
        options: dict[str, Any] = {"seed": seed, "shuffle": shuffle, "epochs": epochs, "host_shards": host_shards}
        return HostShards([BlockOrder(blocks, host_shard=i, **options) for i in range(host_shards)], global_batch)

    return of_blocks


def _check_arguments(**arguments: Any) -> None:
    """Raise ConfigError if an argument of `captioned_data` is out of range."""
    for name in ("batch_size", "image_size", "host_count"):
        if arguments[name] < 1:
            raise ConfigError(f"{name} must be 1 or more, not {arguments[name]}.")
    for name in ("workers", "threads"):
        if arguments[name] < 0:
            raise ConfigError(f"{name} must be 0 or more, not {arguments[name]}.")
    if not 0 <= arguments["seed"] < 2**32:
        raise ConfigError(f"seed must be from 0 to 2**32 - 1, not {arguments['seed']}.")
    if arguments["epochs"] is not None and arguments["epochs"] < 1:
        raise ConfigError(f"epochs must be 1 or more, or None for no end, not {arguments['epochs']}.")
    if arguments["crop"] is not None and not 1 <= arguments["crop"] <= arguments["image_size"]:
        raise ConfigError(f"crop must be from 1 to image_size ({arguments['image_size']}), not {arguments['crop']}.")
    if arguments["background"] not in ("random", "white"):
        raise ConfigError(f"background must be random or white, not {arguments['background']!r}.")
    if not 0 <= arguments["host_index"] < arguments["host_count"]:
        raise ConfigError(f"host_index must be from 0 to host_count - 1, not {arguments['host_index']}.")


def _check_buckets(source: Source | LatentShards) -> None:
    """Raise ConfigError if bucketing would read a whole row group for almost every image."""
    blocks = _blocks(source)
    if blocks is not None and len(blocks) > KEPT_GROUPS:
        raise ConfigError(
            f"buckets would read a whole row group of {source.name} for almost every image: write its latents first "
            "(train.py --precompute, then latents.path; or cache_latents), or use tar shards or an Arrow folder."
        )
