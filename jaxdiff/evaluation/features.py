"""Features of all images of a source, computed once and cached on disk in parts, so that interrupted work resumes.

A part holds, for the readable images among `PART` records, "index" int64 [n] (the record's number), "features"
float32 [n, D] (`encoder.image_features`) and "pixels" uint8 [n, 3 * SIDE²] (the image at `SIDE` pixels).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image

from jaxdiff.config import ConfigError
from jaxdiff.data import store
from jaxdiff.data.folder import FolderSource
from jaxdiff.data.images import on_background, open_image
from jaxdiff.data.source import Source, files_digest
from jaxdiff.evaluation.encoder import Encoder, check_finite, encode_images, encoder_digest, square
from jaxdiff.typing import Params

PART = 1024  # records of a part
SIDE = 32  # pixels along a side of the small images that are compared pixel by pixel
VERSION = 1  # of the cache's format; another version invalidates all cached features

Unread = Callable[[str, str], None]  # called with the name of an unreadable image, and the reason
Progress = Callable[[int], None]  # called with the number of images done since the last call


def read_rgb(file: str | bytes, min_side: int | None = None) -> Image.Image:
    """An image file or its bytes as RGB, on a white background. Raises like `open_image`."""
    return on_background(open_image(file, min_side))


def small(pixels: np.ndarray) -> np.ndarray:
    """An image uint8 [S, S, 3] as uint8 [3 * SIDE²]."""
    return square(Image.fromarray(pixels), SIDE).reshape(-1)


def pixel_values(pixels: np.ndarray) -> np.ndarray:
    """Small images uint8 [N, K] as float32, scaled so that L2 distances are RMS differences of values in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255 * np.sqrt(pixels.shape[1]))


def encode_records(
    source: Source,
    rows: range | Sequence[int],
    encoder: Encoder,
    params: Params,
    *,
    batch_size: int = 64,
    threads: int = 8,
    unread: Unread = lambda name, reason: None,
    progress: Progress = lambda count: None,
) -> dict[str, np.ndarray]:
    """The arrays of a part, for the records `rows` of a source.

    Args:
        batch_size: images encoded at once; the last batch is padded, so that one compiled program serves all.
        threads: number of threads that read images.
        unread: called for each image that is left out.
        progress: called after each batch.
    """

    def read(row: int) -> np.ndarray | None:
        name = f"{source.name}: example {row}"
        try:
            name, file, *_ = source.read(row)
            return square(read_rgb(file, encoder.size), encoder.size)
        except Exception as e:  # a damaged file makes Pillow raise almost anything
            unread(name, str(e) or type(e).__name__)
            return None

    index: list[int] = []
    features, pixels = [], []
    with ThreadPoolExecutor(threads) as pool:
        for i in range(0, len(rows), batch_size):
            batch = rows[i : i + batch_size]
            readable = [
                (row, image) for row, image in zip(batch, pool.map(read, batch), strict=True) if image is not None
            ]
            progress(len(batch))
            if readable:
                index += [row for row, _ in readable]
                images = np.stack([image for _, image in readable])
                pixels += [small(image) for image in images]
                padded = images[np.arange(batch_size) % len(images)]
                features.append(check_finite(encode_images(encoder, params, padded))[: len(images)])
    width = encoder.vision.config.projection_dim
    return {
        "index": np.asarray(index, np.int64),
        "features": np.concatenate(features) if features else np.zeros((0, width), np.float32),
        "pixels": np.stack(pixels) if pixels else np.zeros((0, 3 * SIDE**2), np.uint8),
    }


class Features:
    """Cached features, memory-mapped part by part."""

    def __init__(self, parts: Sequence[str], records: int) -> None:
        self._parts, self.records = list(parts), records
        self.index = np.concatenate([store.read_part(p)["index"] for p in self._parts])  # int64 [N], rising

    def __len__(self) -> int:
        """The number of readable images."""
        return len(self.index)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """The array "features" or "pixels", a part at a time."""
        for part in self._parts:
            yield np.asarray(store.read_part(part)[name])

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of an array by their indices, int [n] in 0 … N - 1, in that order."""
        rows, start, values = np.asarray(rows), 0, None
        for chunk in self.chunks(name):
            selected = np.flatnonzero((rows >= start) & (rows < start + len(chunk)))
            values = np.zeros((len(rows), *chunk.shape[1:]), chunk.dtype) if values is None else values
            values[selected] = chunk[rows[selected] - start]
            start += len(chunk)
        assert values is not None
        return values


def source_digest(source: Source) -> str:
    """The digest of a source; for a captioned folder it includes the sizes and times of its files."""
    if not isinstance(source, FolderSource):
        return source.digest
    paths = (str(source.read(i).image) for i in range(len(source)))
    return source.digest + files_digest(path for path in paths if os.path.exists(path))


def cached_features(
    source: Source,
    folder: Path,
    encoder: Encoder,
    params: Params,
    *,
    batch_size: int = 64,
    threads: int = 8,
    progress: Progress = lambda count: None,
    part: int = PART,
) -> Features:
    """The features of a source, cached in a subfolder of `folder`; missing ones are computed.

    Unreadable images are left out, and a warning names the first. Each combination of images and encoder has its own
    subfolder.

    Raises:
        ConfigError: the folder cannot be written, or none of the images can be read.
        WeightsError: features are not finite.
    """
    key = [VERSION, part, SIDE, source_digest(source), encoder_digest(encoder, params)]
    parts_folder = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    names = [f"{i:06d}" for i in range(-(-len(source) // part))]
    unreadable: list[str] = []

    def unread(name: str, reason: str) -> None:
        if not unreadable:
            logging.warning("%s cannot be read (%s): left out.", name, reason)
        unreadable.append(name)

    def compute_part(i: int) -> Mapping[str, np.ndarray]:
        rows = range(i * part, min((i + 1) * part, len(source)))
        return encode_records(
            source, rows, encoder, params,
            batch_size=batch_size, threads=threads, unread=unread, progress=progress,
        )  # fmt: skip

    num_cached = sum((parts_folder / name).is_dir() for name in names)
    progress(min(num_cached * part, len(source)))
    store.fill(parts_folder, names, compute_part)
    features = Features([str(parts_folder / name) for name in names], len(source))
    if not len(features):
        raise ConfigError(f"None of the {len(source)} images of {source.name} can be read: repair or replace them.")
    return features
