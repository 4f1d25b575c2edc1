"""Latents and text embeddings of a data set, computed once, so that training decodes and encodes no images.

They are written in parts, each of one image size. Hosts share the parts. A part is renamed when it is complete, so that
the same call resumes after a kill. `jaxdiff.data.captioned` reads the folder.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from jaxdiff import mapping, parallel
from jaxdiff.config import ConfigError
from jaxdiff.data import pipeline, store
from jaxdiff.data.buckets import Buckets
from jaxdiff.data.folder import NO_WARP, ImageDecoder, Warp
from jaxdiff.data.latents import INFO, LatentShards
from jaxdiff.data.source import Source
from jaxdiff.files import write_text, writing
from jaxdiff.models.model import Model, encode
from jaxdiff.models.text_encoding import encode_text
from jaxdiff.training.stages import as_tokens, prepare_pairs
from jaxdiff.typing import Params

PART = 2048  # examples in a part


def fingerprint(model: Model, params: Params, description: Any) -> str:
    """A digest of everything that latents depend on: autoencoder, tokenizers, and `description` (JSON)."""
    words = "".join(t.digest for t in (model.tokenizer, model.tokenizer_2) if t is not None)
    digest = hashlib.sha256(json.dumps([str(model.vae.config), words, description]).encode())
    for leaf in jax.tree.leaves(params["vae"]):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


class _Views:
    """The order of examples: all views of all images of one bucket, then of the next. Entries are for a `Decoder`."""

    def __init__(self, buckets: Buckets, views: int) -> None:
        members = [np.flatnonzero(buckets.numbers == b) for b in range(len(buckets.sizes))]
        self.indices = np.concatenate([np.tile(m, views) for m in members])
        self.counts = [len(m) * views for m in members]
        self._ends, self._sizes, self.size = np.cumsum(self.counts), buckets.sizes, len(self.indices)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> tuple[int, tuple[int, int]]:
        return int(self.indices[position]), self._sizes[int(np.searchsorted(self._ends, position, "right"))]


def precompute(
    model: Model,
    params: Params,
    source: Source,
    folder: Path,
    *,
    image_size: int,
    seed: int,
    views: int = 1,
    buckets: Buckets | None = None,
    flip: bool = False,
    warp: Warp = NO_WARP,
    background: str = "random",
    embeddings: bool = False,
    batch_size: int = 8,
    part: int = PART,
    host_index: int = 0,
    host_count: int = 1,
    threads: int = 8,
    made: Mapping[str, Any] | None = None,
) -> None:
    """Write the latents (means), tokens and optionally text embeddings of every image, as in its first epochs.

    Args:
        folder: created if missing; all hosts must share it.
        views: of each image, with other backgrounds, mirrored or not, and under other captions.
        embeddings: those of the captions as well, float16, for training without the text encoder; at length 77 and
            width 768 they are four times as large as the latents of 512 x 512 pixels.
        batch_size: images that each device of this host encodes at a time.
        made: settings as JSON, by name, for `open_latents` to compare.

    Other arguments are those of `captioned_data`. Unreadable images are left out.

    Raises:
        ConfigError: the folder holds latents of something else, or cannot be written; or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"latents.batch_size {batch_size} must be at least 1.")
    buckets = buckets or Buckets(((image_size, image_size),), np.zeros(len(source), np.int16))
    description = [source.digest, image_size, seed, views, flip, background, embeddings, part, buckets.sizes]
    if any(warp):
        description.append(list(warp))
    bucket_digest = hashlib.sha256(np.ascontiguousarray(buckets.numbers).data).hexdigest()
    digest = fingerprint(model, params, [*description, bucket_digest])
    order = _Views(buckets, views)
    decode = ImageDecoder(source, image_size, None, flip, background, warp=warp)
    reading: dict[str, Any] = {"seed": seed, "epochs": 1, "drop_remainder": False, "threads": threads}
    global_batch = batch_size * jax.local_device_count()
    data = pipeline.batches(source.name, len(source), decode, global_batch, order=lambda *_: order, **reading)
    spans = _spans(order.counts, part)
    names = [f"{i:06d}" for i in range(len(spans))]
    _check_digest(folder, digest)
    encode_examples = encoder(model, params, embeddings, batch_size)

    def encode_part(i: int) -> Mapping[str, np.ndarray]:
        arrays = encode_examples(filter(data.skipped.keep, pipeline.read_range(data, *spans[i])))
        arrays = arrays or {"latents": np.zeros((0, 1, 1, 1), np.float16)}
        logging.info("Part %d of %d: %d images encoded.", i + 1, len(spans), len(arrays["latents"]))
        return arrays

    if host_index == 0:
        _write_json(folder / f".{INFO}", {"fingerprint": digest})
    store.fill(folder, names, encode_part, host_index=host_index, host_count=host_count)
    if host_index == 0:
        shapes = {name: np.load(folder / name / "latents.npy", mmap_mode="r").shape for name in names}
        nonempty = [name for name in names if shapes[name][0]]
        if not nonempty:
            raise ConfigError(f"No image of {source.name} could be encoded.")
        sizes = [list(shapes[name][1:3]) for name in nonempty]
        fingerprints = {"fingerprint": digest, "model": fingerprint(model, params, None)}
        _write_json(folder / INFO, {**fingerprints, "parts": nonempty, "sizes": sizes, "made": dict(made or {})})


def open_latents(
    path: Path, model: Model, params: Params, trainable: Sequence[str], settings: Mapping[str, Any] | None = None
) -> LatentShards:
    """Open what `precompute` wrote.

    Args:
        settings: as `made` of `precompute`; None compares nothing.

    Raises:
        ConfigError: it was written with another autoencoder or tokenizer or with other settings, or holds embeddings of
            what is to learn.
    """
    shards = LatentShards(path)
    if shards.model != fingerprint(model, params, None):
        raise ConfigError(f"{path} was written with another autoencoder or tokenizer: run train.py --precompute again.")
    stored = shards.made
    current = settings if settings is not None and stored else stored
    # Settings that are off may be missing: older latents do not record newer settings.
    values = {name: (stored.get(name), current.get(name)) for name in {**stored, **current}}
    changes = [
        f"{n}: {json.dumps(a)}, now {json.dumps(b)}" for n, (a, b) in values.items() if (a or None) != (b or None)
    ]
    if changes:
        raise ConfigError(
            f"{path} was written with other settings ({'; '.join(changes)}): give the same, or another latents.path."
        )
    if "embeddings" in shards.names and any(name.startswith("text_encoder") for name in trainable):
        raise ConfigError(f"{path} holds text embeddings, but the text encoder is to learn: write it without them.")
    return shards


def encoder(
    model: Model, params: Params, embeddings: bool, batch_size: int
) -> Callable[[Iterable[dict[str, Any]]], dict[str, np.ndarray]]:
    """A function from examples {"image", "text"} of one size to {"latents": float16 [n, h, w, C], "tokens", …}.

    Without examples it returns nothing, {}.

    Args:
        batch_size: examples that each device of this process takes at a time.
    """
    prepare, at_once = prepare_pairs(model), batch_size * jax.local_device_count()
    names = [name for name in params if name == "vae" or (embeddings and name.startswith("text_encoder"))]
    frozen = parallel.replicate({name: params[name] for name in names})

    def encode_batch(params: Params, batch: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {"latents": encode(model, params, batch["image"].astype(np.float32) / 255.0)}
        if embeddings:
            cond = encode_text(model, params, as_tokens(batch))
            arrays |= {"embeddings": cond.embeddings} | ({} if cond.pooled is None else {"pooled": cond.pooled})
        return {name: x.astype(np.float16) for name, x in arrays.items()}

    parallel_encode = mapping.pmap(encode_batch, jax.local_devices(), shared=1)

    def encode_all(examples: Iterable[dict[str, Any]]) -> dict[str, np.ndarray]:
        parts, remaining = [], iter(examples)
        while chunk := list(itertools.islice(remaining, at_once)):
            padded = [chunk[i % len(chunk)] for i in range(at_once)]  # one shape, compiled once
            batch = dict(prepare(pipeline.collate(padded)))
            arrays = {k: v for k, v in batch.items() if k != "image"} | jax.device_get(parallel_encode(frozen, batch))
            parts.append({k: np.asarray(v)[: len(chunk)] for k, v in arrays.items()})
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]} if parts else {}

    return encode_all


def _spans(counts: list[int], part: int) -> list[tuple[int, int]]:
    """Spans of at most `part` positions, none of which crosses a bucket boundary."""
    spans, start = [], 0
    for count in counts:
        spans += [(start + i, start + min(i + part, count)) for i in range(0, count, part)]
        start += count
    return spans


def _check_digest(folder: Path, digest: str) -> None:
    for name in (INFO, f".{INFO}"):
        try:
            same = json.loads((folder / name).read_bytes()).get("fingerprint") == digest
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError):
            same = False
        if not same:
            raise ConfigError(
                f"{folder} holds latents of other images, settings or models: choose another folder, or delete it."
            )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with writing(path, ConfigError, "free it or choose another place."):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(values))
