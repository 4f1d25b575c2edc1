"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): tokens with learned embeddings, in and out of files.

A file holds one vector or several for each word. The tokenizer learns a new token a vector (`<cat>`, `<cat>_1`, …),
the text encoder's table gets the vectors as new rows, and `<cat>` in a prompt stands for all of them.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.io.configs import replace_config
from jaxdiff.io.tensor_files import TensorSource, open_tensors, write_tensors
from jaxdiff.models.model import Model
from jaxdiff.typing import Array, Params

TABLE = "embeddings_token_embedding"
SDXL_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

Vectors = dict[str, dict[str, np.ndarray]]  # token -> text encoder -> [vectors, width]


def encoders(model: Model) -> list[str]:
    return [name for name in TOKENIZERS if getattr(model, name) is not None]


def read_textual_inversion(model: Model, path: str | Path, token: str | None = None) -> Vectors:
    """The words in a file.

    Args:
        path: safetensors, .pt or .bin; either {"<token>": [n, D] or [D]} as diffusers writes it, or the AUTOMATIC1111
            web UI's `emb_params` or `string_to_param`, or for SDXL `clip_l` and `clip_g`.
        token: the word to use; needed only to have another one than the file's, which is the file's name where the
            file says none.

    Returns:
        For every token, the vectors [n, D] of each text encoder.

    Raises:
        WeightsError: the file is no textual inversion, or one for text encoders of other widths.
    """
    path = Path(path)
    source = open_tensors(path)
    names = [name for name in source.shapes if not re.fullmatch(r"\w+:\d+:(up|down)", name)]  # a LoRA beside them
    wanted = encoders(model)
    if not names:
        raise WeightsError(f"{path} holds no embeddings: is it a textual inversion?")
    if set(names) <= set(SDXL_NAMES.values()):
        tensors = {token or path.stem: {encoder: name for encoder, name in SDXL_NAMES.items() if name in names}}
    else:
        if token is not None and len(names) > 1:
            raise WeightsError(f"{path} holds {len(names)} tokens, but `token` names only one: leave `token` out.")
        only = wanted[0] if len(wanted) == 1 else "text_encoder"
        tensors = {token or _token(path, name): {only: name} for name in names}
    for word, parts in tensors.items():
        if sorted(parts) != sorted(wanted):
            raise WeightsError(
                f"{path} has {word!r} for {' and '.join(sorted(parts))}; this model has {' and '.join(wanted)}: "
                "it is of another family."
            )
    return {word: {e: _vectors(model, source, e, name) for e, name in parts.items()} for word, parts in tensors.items()}


def _token(path: Path, name: str) -> str:
    return path.stem if name == "emb_params" or name.startswith("string_to_param") or name.isdigit() else name


def _vectors(model: Model, source: TensorSource, encoder: str, name: str) -> np.ndarray:
    shape, width = list(source.shapes[name]), getattr(model, encoder).config.hidden_size
    if len(shape) not in (1, 2) or 0 in shape or shape[-1] != width:
        raise WeightsError(
            f"{source.path}: {name} has shape {shape}, where vectors of this model's {encoder} have {width} values: "
            "it is not a textual inversion, or is one for another family."
        )
    return np.asarray(source.read(name)).reshape(-1, width)


def load_textual_inversion(
    model: Model, params: Params, path: str | Path, token: str | None = None
) -> tuple[Model, Params]:
    """A model that knows the words of a file.

    Args:
        path, token: see `read_textual_inversion`.

    Returns:
        The model with a larger vocabulary, and parameters with larger tables of token embeddings; those given stay
        as they are.

    Raises:
        WeightsError: the file does not fit, or a token exists already; nothing has been changed then.
    """
    params = dict(params)
    for word, vectors in read_textual_inversion(model, path, token).items():
        for encoder, rows in vectors.items():
            try:
                model, params[encoder] = extend(model, params[encoder], encoder, word, rows)
            except ConfigError as e:
                raise WeightsError(f"{path}: {str(e)[0].lower()}{str(e)[1:]}") from None
    return model, params


def extend(model: Model, params: Params, encoder: str, word: str, rows: Array) -> tuple[Model, Params]:
    """One text encoder, its tokenizer and its parameters with one word more, of vectors `rows` [n, D].

    Raises:
        ConfigError: the tokenizer knows the word already.
    """
    old = getattr(model, TOKENIZERS[encoder])
    tokenizer = old.with_word(word, len(rows))
    table = params[TABLE]["embedding"]
    # Some published tables are longer than the vocabulary: the new ids take the spare rows first.
    size = max(tokenizer.vocab_size, len(table))
    table = jnp.pad(table, ((0, size - len(table)), (0, 0)))
    table = table.at[old.vocab_size : tokenizer.vocab_size].set(jnp.asarray(rows, table.dtype))
    # Old files say eos_token_id 2 and mean the highest id of a prompt, which a new token would be.
    config = getattr(model, encoder).config
    end = tokenizer.eos_id if config.eos_token_id == 2 else config.eos_token_id
    model = replace_config(model, encoder, vocab_size=size, eos_token_id=end)
    model = dataclasses.replace(model, **{TOKENIZERS[encoder]: tokenizer})
    return model, {**params, TABLE: {"embedding": table}}


def save_textual_inversion(path: str | Path, model: Model, params: Params, token: str) -> None:
    """Write the vectors of a token that a model knows as safetensors; whole or not at all.

    The form is diffusers', {token: [n, D]}; with two text encoders `clip_l` and `clip_g`.

    Raises:
        WeightsError: the model knows no such token, or the file cannot be written.
    """
    tensors = {}
    for encoder in encoders(model):
        ids = getattr(model, TOKENIZERS[encoder]).added_ids(token)
        if not ids:
            raise WeightsError(f"the model's {encoder} has no token {token!r} of its own: load or add it first.")
        name = token if encoders(model) == ["text_encoder"] else SDXL_NAMES[encoder]
        tensors[name] = np.asarray(jax.device_get(params[encoder][TABLE]["embedding"]))[ids]
    write_tensors(Path(path), tensors)
