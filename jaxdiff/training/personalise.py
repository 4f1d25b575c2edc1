"""A model taught a subject or a style by a few pictures: low-rank changes, new words, and what keeps the rest."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.data.folder import IMAGE_SUFFIXES, image_files
from jaxdiff.data.pipeline import CaptionedData, GlobalStream
from jaxdiff.files import atomic_write, write_text
from jaxdiff.io.lora import Factors, Lora, init_lora, merge_lora
from jaxdiff.io.textual_inversion import TABLE, TOKENIZERS, encoders, extend
from jaxdiff.models.model import Model
from jaxdiff.typing import Array, Key, Params

Whole = Callable[[Params], Params]  # all parameters with what is trained -> those of the model's modules

# Of a folder of pictures without captions, {} the word; after Gal et al. 2022, supplement B.
TEMPLATES = (
    "a photo of {}",
    "a rendering of {}",
    "a cropped photo of {}",
    "a close-up photo of {}",
    "a bright photo of {}",
    "a dark photo of {}",
    "a good photo of {}",
    "a depiction of {}",
)


# --- LoRA (Hu et al. 2021)


def lora_of(params: Params, alpha: float) -> Lora:
    """What is trained, params["lora"], as `jaxdiff.io.lora` has it."""
    return {name: Factors(f["down"], f["up"], alpha) for name, f in params["lora"].items()}


def with_lora(model: Model, params: Params, rank: int, alpha: float, key: Key, **chosen: Any) -> tuple[Params, Whole]:
    """Parameters with a fresh LoRA to train, "lora": {layer: {"down", "up"}}, and the function that merges it.

    Args:
        rank, alpha: see `init_lora`.
        chosen: `targets` and `endings` of `init_lora`.
    """
    fresh = init_lora(model, params, rank, alpha, key=key, **chosen)
    factors = {name: {"down": f.down, "up": f.up} for name, f in fresh.items()}

    def whole(params: Params) -> Params:
        return merge_lora({k: v for k, v in params.items() if k != "lora"}, lora_of(params, alpha))

    return {**params, "lora": factors}, whole


# --- textual inversion (Gal et al. 2022)


def with_word(model: Model, params: Params, word: str, initial: str, vectors: int) -> tuple[Model, Params, Whole]:
    """A model that knows a new word, with the word's vectors to train, "words": {text encoder: [vectors, D]}.

    No other row of the tables of embeddings can move, since no other is trained.

    Args:
        initial: words that it starts from: the mean of their tokens' vectors.

    Returns:
        The model with a larger vocabulary, its parameters, and the function that puts the vectors into the tables.

    Raises:
        ConfigError: the tokenizer knows the word already, or there is nothing to start from.
    """
    params, words, places = dict(params), {}, {}
    for encoder in encoders(model):
        tokenizer = getattr(model, TOKENIZERS[encoder])
        (ids,) = tokenizer.encode([initial])
        if not ids or vectors < 1:
            raise ConfigError(f"{vectors} vectors that start from {initial!r}: name a word, and 1 vector or more.")
        start = jnp.asarray(params[encoder][TABLE]["embedding"][np.asarray(ids)], jnp.float32).mean(0)
        words[encoder] = jnp.tile(start, (vectors, 1))
        model, params[encoder] = extend(model, params[encoder], encoder, word, words[encoder])
        places[encoder] = np.asarray(getattr(model, TOKENIZERS[encoder]).added_ids(word))

    def whole(params: Params) -> Params:
        def replaced(encoder: str, rows: Array) -> Params:
            table = jnp.asarray(params[encoder][TABLE]["embedding"])
            return {**params[encoder], TABLE: {"embedding": table.at[places[encoder]].set(rows)}}

        kept = {k: v for k, v in params.items() if k != "words"}
        return {**kept, **{encoder: replaced(encoder, rows) for encoder, rows in params["words"].items()}}

    return model, {**params, "words": words}, whole


def captioned(path: str | Path, captions: Sequence[str], folder: Path) -> Path:
    """A captioned folder of all pictures that lie in `path`, which needs no metadata: one of `captions` at a time.

    Args:
        folder: made; its `metadata.jsonl` points at the pictures through a link. Several hosts may make the same one.

    Raises:
        ConfigError: there is no picture.
    """
    path = Path(path).absolute()
    names = [p.name for p in image_files(path)]
    if not names:
        raise ConfigError(f"The folder {path} holds no picture ({', '.join(IMAGE_SUFFIXES)}).")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"file_name": f"pictures/{name}", "text": list(captions)}) + "\n" for name in names]
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
    """Batches of one's own pictures followed by pictures of their class, whose loss counts `weight` times.

    (Ruiz et al. 2023, equation 2.) They also hold "weight" float32 [b], that of each example.

    Args:
        own, prior: endless batches of all hosts together, as for the only host.
        host_index, host_count: this host reads its rows of each whole batch.
    """
    rows = own.batch_size, prior.batch_size
    hosts = {"batch_size": sum(rows) // host_count, "host_index": host_index, "host_count": host_count}
    return _DataWithPrior(**{**vars(own), **hosts}, prior=prior, weight=weight, rows=rows)
