"""Small additions to a model that are trained while the model stays as it is: LoRAs and textual inversions."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.io.lora import Factors, Lora, init_lora, merge_lora
from jaxdiff.io.textual_inversion import TABLE, TOKENIZERS, encoders, extend
from jaxdiff.models.model import Model
from jaxdiff.typing import Array, Key, Params

MergeParams = Callable[[Params], Params]  # parameters with the adapter -> those of the model's modules

# Captions for images without their own, {} standing for the word (after Gal et al. 2022, supplement B).
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
    """The trained params["lora"] in the form of `jaxdiff.io.lora`."""
    return {name: Factors(f["down"], f["up"], alpha) for name, f in params["lora"].items()}


def with_lora(
    model: Model, params: Params, rank: int, alpha: float, key: Key, **layer_options: Any
) -> tuple[Params, MergeParams]:
    """Parameters with a fresh LoRA to train, "lora": {layer: {"down", "up"}}, and the function that merges it.

    Args:
        rank, alpha: see `init_lora`.
        layer_options: `targets` and `endings` of `init_lora`.
    """
    lora = init_lora(model, params, rank, alpha, key=key, **layer_options)
    factors = {name: {"down": f.down, "up": f.up} for name, f in lora.items()}

    def merge_params(params: Params) -> Params:
        return merge_lora({k: v for k, v in params.items() if k != "lora"}, lora_of(params, alpha))

    return {**params, "lora": factors}, merge_params


# --- textual inversion (Gal et al. 2022)


def with_word(model: Model, params: Params, word: str, initial: str, vectors: int) -> tuple[Model, Params, MergeParams]:
    """A model that knows a new word, with the word's vectors to train, "words": {text encoder: [vectors, D]}.

    No other row of the embedding tables changes.

    Args:
        initial: words whose tokens' mean embedding the new word starts from.

    Returns:
        The model with a larger vocabulary, its parameters, and the function that puts the vectors into the tables.

    Raises:
        ConfigError: the tokenizer knows the word already, or there is nothing to start from.
    """
    params, words, token_ids = dict(params), {}, {}
    for encoder in encoders(model):
        tokenizer = getattr(model, TOKENIZERS[encoder])
        (ids,) = tokenizer.encode([initial])
        if not ids or vectors < 1:
            raise ConfigError(f"{vectors} vectors that start from {initial!r}: name a word, and 1 vector or more.")
        start = jnp.asarray(params[encoder][TABLE]["embedding"][np.asarray(ids)], jnp.float32).mean(0)
        words[encoder] = jnp.tile(start, (vectors, 1))
        model, params[encoder] = extend(model, params[encoder], encoder, word, words[encoder])
        token_ids[encoder] = np.asarray(getattr(model, TOKENIZERS[encoder]).added_ids(word))

    def merge_params(params: Params) -> Params:
        def with_rows(encoder: str, rows: Array) -> Params:
            table = jnp.asarray(params[encoder][TABLE]["embedding"])
            return {**params[encoder], TABLE: {"embedding": table.at[token_ids[encoder]].set(rows)}}

        merged = {k: v for k, v in params.items() if k != "words"}
        return merged | {encoder: with_rows(encoder, rows) for encoder, rows in params["words"].items()}

    return model, {**params, "words": words}, merge_params
