"""The data of a run, from a config: training images, held-out images, and fingerprints of both."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdiff import stores
from jaxdiff.config import ConfigError
from jaxdiff.data.buckets import Buckets, assign, bucket_sizes
from jaxdiff.data.captioned import captioned_data, open_source, source_files
from jaxdiff.data.filters import scan, select
from jaxdiff.data.folder import BACKGROUNDS, NO_WARP, Warp
from jaxdiff.data.latents import LatentShards
from jaxdiff.data.listing import TABLES, NoCaptions, image_files
from jaxdiff.data.pipeline import CaptionedData
from jaxdiff.data.source import Source
from jaxdiff.text.tokenizer import Tokenizer, train_bpe
from jaxdiff.training import dreambooth
from jaxdiff.training.defaults import as_json, flat
from jaxdiff.training.options import OptionsError
from jaxdiff.training.ranges import naming
from jaxdiff.training.workdir import data_fingerprint

MAX_CAPTIONS = 1_000_000  # examples that a tokenizer is trained on
PHOTOGRAPH = ("a photograph",)  # caption of images whose captions are not used
SINGLE_HOST = {"host_index": 0, "host_count": 1}
# How to build this repository's data sets, by their usual paths.
BUILT = {
    "data/icons": "`python -m datasets.icons --out data/icons` builds it in about 10 minutes: it fetches drawings with "
    "npm and apt and writes 300 MB.",
}


def hosts() -> dict[str, Any]:
    """This host's index and the number of hosts, as keyword arguments of data readers."""
    return {"host_index": jax.process_index(), "host_count": jax.process_count()}


def columns(config: Any) -> dict[str, Any]:
    """The columns that the config names, as keyword arguments of `open_source`."""
    return {name: config.data[name] for name in ("image_column", "text_column")}


@dataclasses.dataclass(frozen=True)
class Images:
    """The images that a config names. Indexes and scans of them are cached in `workdir`."""

    config: Any
    workdir: Path

    def open(self, path: str | Path, split: str) -> Source:
        """A split with its own captions."""
        return open_source(path, split, cache=self.workdir / "data", **columns(self.config), **self._sharing())

    def captioned(self, path: Path, captions: Sequence[str], name: str) -> Source:
        """The images of a folder with captions from the config."""
        return open_source(dreambooth.write_captioned(path, captions, self.workdir / name), **self._sharing())

    def _sharing(self) -> dict[str, Any]:
        """The hosts that share the workdir. For a workdir in a store, each host has its own local folder."""
        return SINGLE_HOST if stores.behind(self.workdir) else hosts()

    def split(self, name: str) -> Source:
        """All images of a split of `data.path`, with the config's captions if it has any."""
        data, folder = self.config.data, Path(self.config.data.path)
        if not data.captions:
            return self.open(data.path, name)
        if name != data.split or (folder / name).is_dir():
            folder /= name
        captions = [c.replace("{}", self.config.textual_inversion.token) for c in data.captions]
        return self.captioned(folder, captions, f"captioned/{name}")

    def filtered(self, name: str) -> Source:
        """The images of a split that pass `data.filter`. Precomputed latents are filtered already."""
        config, data = self.config, self.config.data
        with naming("data.path" if name == data.split else "data.eval_split"):
            source = self.split(name)
            if config.latents.path:
                return source
            filters = data.filter.to_dict()
            if name != data.split:
                del filters["max_subjects"]  # other splits have other most common subjects
            return select(source, filters, cache=self.workdir / "data", **self._sharing())

    def tokenizer(self) -> Tokenizer:
        """A tokenizer trained on the captions of the unfiltered set, so that every subset has the same vocabulary."""
        source, sizes = self.open(self.config.data.path, self.config.data.split), self.config.tokenizer
        names = [f"on a {name} background" for name in BACKGROUNDS] * 2
        captions: list[str] = []
        for i in range(0, len(source), -(-len(source) // MAX_CAPTIONS)):
            with contextlib.suppress(ValueError, OSError):  # damaged examples are reported in training
                captions += source.read(i, image=False).captions
        return train_bpe([*captions, *names], sizes.vocab_size, sizes.max_length)

    def buckets(self, source: Source, image_size: int) -> Buckets | None:
        """The sizes that images are cropped to by aspect ratio; None if all become squares.

        Raises:
            ConfigError: no size is a multiple of `data.buckets`.
        """
        data = self.config.data
        if self.config.latents.path or not data.buckets:
            return None
        sizes = bucket_sizes(image_size, data.buckets, data.max_aspect)
        image_sizes = scan(source, sizes=True, cache=self.workdir / "data", **self._sharing())
        return Buckets(sizes, assign(sizes, image_sizes["width"], image_sizes["height"]))


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The filtered images of a run, read in batches."""

    images: Images
    source: Source  # what is trained on
    eval_source: Source  # held-out images, or `source` without a split of them
    image_size: int
    buckets: Buckets | None
    at_once: int  # images per device outside of training, as in a microbatch
    make_control_image: Any = None  # see `jaxdiff.training.trainables.Trainable`

    def batches(self, **changes: Any) -> CaptionedData:
        """Training batches of this host. `changes` override arguments of `captioned_data`."""
        config, data = self.images.config, self.images.config.data
        arguments = {
            "source": self.source, "batch_size": config.batch_size // jax.process_count(),
            "image_size": self.image_size, "seed": config.seed, "background": data.background,
            "flip": data.flip, "warp": Warp(**data.warp), "buckets": self.buckets,
            "threads": data.threads, "workers": data.workers, "make_control_image": self.make_control_image, **hosts(),
        }  # fmt: skip
        return captioned_data(**(arguments | changes))

    def with_class_images(self) -> CaptionedData:
        """Batches whose second half are class images, in the same order for any number of hosts."""
        prior = self.images.config.prior_preservation
        source = (
            self.images.captioned(Path(prior.path), prior.captions, "class")
            if prior.captions
            else self.images.open(prior.path, "train")
        )
        return self._half_from(source, prior.weight)

    def with_photographs(self, **changes: Any) -> CaptionedData:
        """Batches whose second half are photographs, which need no captions. `changes` as for `batches`."""
        photographs = Path(self.images.config.super_resolution.photographs)
        return self._half_from(self.images.captioned(photographs, PHOTOGRAPH, "photographs"), 1.0, **changes)

    def _half_from(self, source: Source, weight: float, **changes: Any) -> CaptionedData:
        """Batches whose second half comes from another source, with its loss multiplied by `weight`."""
        config, size = self.images.config, self.images.config.batch_size
        first_half = self.batches(batch_size=size - size // 2, **changes, **SINGLE_HOST)
        second_half = self.batches(batch_size=size // 2, source=source, seed=config.seed + 3, **changes, **SINGLE_HOST)
        return dreambooth.with_prior(first_half, second_half, weight, **hosts())

    def held_out(self) -> list[Mapping[str, Any]]:
        """Batches of held-out images, the same on every host and at every call; none if `eval.images` is 0."""
        config = self.images.config
        remaining, held_out = config.eval.images, list[Mapping[str, Any]]()
        if not remaining:
            return held_out
        sizes = {"batch_size": min(remaining, self.at_once), "epochs": 1, "drop_remainder": False, "workers": 0}
        # Another order than in training, background colours included.
        options = {"seed": config.seed + 1, "flip": False, "warp": NO_WARP, "buckets": None, **SINGLE_HOST}
        stream = iter(self.batches(source=self.eval_source, **sizes, **options))
        while remaining > 0 and (batch := next(stream, None)) is not None:
            held_out.append({name: values[:remaining] for name, values in batch.items()})
            remaining -= len(batch["text"])
        return held_out

    def to_measure(self, count: int = 512) -> Iterator[np.ndarray]:
        """About `count` training images, the same on every host, as batches uint8 [b, H, W, 3]."""
        seed = self.images.config.seed + 2
        stream = iter(self.batches(seed=seed, batch_size=self.at_once, workers=0, buckets=None, **SINGLE_HOST))
        return (next(stream)["image"] for _ in range(-(-count // self.at_once)))

    def settings(self) -> dict[str, Any]:
        """The config's data settings as JSON, with a digest of the data instead of its path, so that it may move."""
        data = as_json(self.images.config)["data"]
        captions = bool(data["captions"])
        digest = data_fingerprint(data.pop("path"), data["split"], captions, **columns(self.images.config))["digest"]
        for name in ("threads", "workers", "eval_split"):
            del data[name]
        return {**flat({"data": data | {"image_size": self.image_size}}), "digest of data.path": digest}


def fingerprints(config: Any) -> dict[str, Any]:
    """Fingerprints of a run's data: its images, class images, photographs, and precomputed latents.

    Raises:
        ConfigError, OptionsError: there are no such data, or they have no captions.
    """
    data, prior, latents = config.data, config.prior_preservation, config.latents.path
    with naming("data.path"):
        fingerprint = _fingerprint(config, data.path, data.split, data.captions, "data.captions", "a photo of sks dog")
    if data.eval_split not in ("", data.split) and config.eval.images and not latents:
        with naming("data.eval_split"):
            _check_disjoint(config)
    if prior.path:
        name = "prior_preservation.captions"
        with naming("prior_preservation.path"):
            fingerprint["prior"] = _fingerprint(config, prior.path, "train", prior.captions, name, "a photo of a dog")
    if config.super_resolution.photographs:
        path, name = config.super_resolution.photographs, "super_resolution.photographs"
        with naming(name):
            fingerprint["photographs"] = _fingerprint(config, path, "train", PHOTOGRAPH, name, PHOTOGRAPH[0])
    if latents:
        with naming("latents.path"):
            fingerprint["latents"] = LatentShards(Path(latents)).fingerprint
    return fingerprint


def _fingerprint(config: Any, path: str, split: str, captions: Any, setting: str, example: str) -> dict[str, Any]:
    try:
        fingerprint = data_fingerprint(path, split, bool(captions), **columns(config))
        if not fingerprint["files"]:  # with captions from the config; without, opening it raises
            folder = Path(path)
            problem = "holds no image" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
            raise ConfigError(f"{path} {problem}: give a folder of images.")
        return fingerprint
    except ConfigError as e:
        if isinstance(e, NoCaptions) and (image_files(Path(path), recursive=True) or image_files(Path(path) / split)):
            raise OptionsError(
                f"{setting} is missing: the images in {path} have no metadata.jsonl, metadata.csv or text files with "
                f"captions. Write them, or give one caption for all: --config.{setting}=\"('{example}',)\"."
            ) from None
        if path.rstrip("/") in BUILT and not Path(path).exists():
            raise ConfigError(f"{e} {BUILT[path.rstrip('/')]}") from None
        raise


def _check_disjoint(config: Any) -> None:
    """Raise OptionsError if held-out images are also trained on, ConfigError if there are none."""
    data = config.data
    if data.captions:  # the splits are separate folders
        return
    splits = (data.split, data.eval_split)
    train_files, eval_files = (set(source_files(data.path, split, **columns(config))) for split in splits)
    if both := sorted(p for p in train_files & eval_files if p.name not in TABLES):
        raise OptionsError(
            f"data.eval_split {data.eval_split}: {len(both)} of its files are trained on too, such as {both[0]}: move "
            f"the images to train on into a folder {data.split}."
        )
