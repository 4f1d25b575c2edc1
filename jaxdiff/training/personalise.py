"""A model taught a subject or a style by a few pictures: low-rank changes, new words, and what keeps the rest."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.data.folder import PICTURES, pictures
from jaxdiff.io.lora import Factors, Lora, init_lora, merge_lora
from jaxdiff.io.textual_inversion import TABLE, TOKENIZERS, encoders, extend
from jaxdiff.models.model import Model
from jaxdiff.training.loop import Batches, BatchIterator
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
        folder: made; its `metadata.jsonl` points at the pictures through a link.

    Raises:
        ConfigError: there is no picture.
    """
    path = Path(path).absolute()
    names = [p.name for p in pictures(path)]
    if not names:
        raise ConfigError(f"The folder {path} holds no picture ({', '.join(PICTURES)}).")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pictures").is_symlink():
        (folder / "pictures").symlink_to(path)
    lines = [json.dumps({"file_name": f"pictures/{name}", "text": list(captions)}) + "\n" for name in names]
    partial = folder / f"metadata.jsonl.tmp-{os.getpid()}"
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(folder / "metadata.jsonl")
    return folder


# --- prior preservation (DreamBooth, Ruiz et al. 2023)


@dataclasses.dataclass
class WithPrior:
    """Batches of one's own pictures followed by pictures of their class, whose loss counts `weight` times.

    (Ruiz et al. 2023, equation 2.) Iterates as its two sources do; "weight" float32 [b] is the weight of each example.
    """

    own: Batches
    prior: Batches
    weight: float

    def __iter__(self) -> "PriorIterator":
        return PriorIterator(iter(self.own), iter(self.prior), self.weight)


@dataclasses.dataclass
class PriorIterator:
    own: BatchIterator
    prior: BatchIterator
    weight: float

    def __next__(self) -> Mapping[str, Any]:
        own, prior = next(self.own), next(self.prior)
        sizes = [len(next(iter(batch.values()))) for batch in (own, prior)]
        joined = {
            k: [*own[k], *prior[k]] if isinstance(own[k], list) else np.concatenate([own[k], prior[k]]) for k in own
        }
        return {**joined, "weight": np.repeat(np.asarray([1.0, self.weight], np.float32), sizes)}

    def get_state(self) -> dict[str, Any]:
        return {"own": self.own.get_state(), "prior": self.prior.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.own.set_state(state["own"])
        self.prior.set_state(state["prior"])
