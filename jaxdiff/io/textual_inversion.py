"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): tokens with learned embeddings, in and out of files.

A file holds one vector or several for each word. The tokenizer learns a new token a vector (`<cat>`, `<cat>_1`, …),
the text encoder's table gets the vectors as new rows, and `<cat>` in a prompt stands for all of them.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.io import kinds
from jaxdiff.io.configs import replace_config
from jaxdiff.io.embedding_images import is_image, open_image_embedding
from jaxdiff.io.lora_names import LORA
from jaxdiff.io.tensor_files import TensorSource, open_tensors, write_tensors
from jaxdiff.models.model import Model
from jaxdiff.text.tokenizer import Tokenizer
from jaxdiff.typing import Array, Params

TABLE = "embeddings_token_embedding"
SDXL_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
ENCODERS = {  # what files of SDXL call the vectors of each text encoder; the second pair is cog-sdxl's
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
OUTPUTS = ("clip_l_out", "clip_g_out", "emb_params_out")  # OneTrainer's, of what a text encoder puts out
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

Parts = dict[str, dict[str, str]]  # token -> what the file calls its vectors -> the tensor's name in the file
WEB_UI = "string_to_param."
# diffusers' trainer writes a file for each text encoder; its advanced script one for both.
STEMS = {"text_encoder": "learned_embeds", "text_encoder_2": "learned_embeds_2"}
SUFFIXES = (".safetensors", ".bin")
BOTH = "*_emb.safetensors"


class Word(NamedTuple):
    """A word that a file brings along."""

    path: Path
    name: str
    vectors: dict[str, np.ndarray]  # text encoder -> [vectors, width]


def encoders(model: Model) -> list[str]:
    """The text encoders that learn words: CLIP's."""
    return [name for name in TOKENIZERS if isinstance(getattr(model, TOKENIZERS[name]), Tokenizer)]


def read_textual_inversion(model: Model, given: Sequence[tuple[str | Path, str | None]]) -> list[Word]:
    """The words in files.

    Args:
        given: files, and the word to use where it is to be another one than the file's, which is the file's name where
            the file says none. Each is safetensors, .pt or .bin; either {"<token>": [n, D] or [D]} as diffusers writes
            it, or the AUTOMATIC1111 web UI's `emb_params` or `string_to_param`, or for SDXL `clip_l` and `clip_g`
            (`text_encoders_0` and `_1`), or the web UI's PNG with one in a text; or a LoRA's file that brings words
            along (`bundle_emb`); or the folder in which diffusers put one. Where SDXL has a file for each text encoder,
            the second one is among `given`, or lies beside the first (`learned_embeds_2` beside `learned_embeds`).

    Raises:
        WeightsError: a file is no textual inversion, or one for text encoders of other widths.
    """
    found: list[Word] = []

    def add(path: Path, token: str | None) -> None:
        for word in _read_file(model, path, token):
            begun = (w for w in found if w.name == word.name and not w.vectors.keys() & word.vectors.keys())
            if other := next(begun, None):
                other.vectors.update(word.vectors)
            else:
                found.append(word)

    tokens = {file: token for path, token in given for file in _files(model, Path(path))}
    for file, token in tokens.items():
        add(file, token)
    half = {word.path for word in found if word.vectors.keys() != set(encoders(model))}
    for file in sorted(half):
        if (beside := _other_file(file)).is_file() and beside not in tokens:
            add(beside, tokens[file])
    for word in found:
        if missing := sorted(set(encoders(model)) - word.vectors.keys()):
            raise WeightsError(
                f"{word.path} has {word.name!r} for {' and '.join(word.vectors)}; this model has "
                f"{' and '.join(encoders(model))}: give the file for {missing[0]} too, or put it beside as "
                f"{_other_file(word.path).name}; else it is of another family."
            )
    return found


def _files(model: Model, path: Path) -> list[Path]:
    """The file given, or those of a folder that diffusers wrote. Raises WeightsError where it holds none."""
    if not path.is_dir():
        return [path]
    named = [[path / f"{STEMS[e]}{suffix}" for suffix in SUFFIXES] for e in encoders(model)]
    found = [next(p for p in paths if p.is_file()) for paths in named if any(p.is_file() for p in paths)]
    found = found or sorted(path.glob(BOTH))[:2]
    if not found or (found[0].match(BOTH) and len(found) > 1):
        raise WeightsError(f"{path} holds no {named[0][0].name}: give the file of the textual inversion.")
    return found


def _other_file(path: Path) -> Path:
    """Where the vectors of the other text encoder lie: learned_embeds_2 beside learned_embeds, x_2 beside x."""
    match = re.fullmatch(r"(.*?)(_2)?(-steps-\d+)?", path.stem)
    assert match is not None
    return path.with_name(f"{match[1]}{'' if match[2] else '_2'}{match[3] or ''}{path.suffix}")


def _read_file(model: Model, path: Path, token: str | None) -> list[Word]:
    source, stem = open_image_embedding(path) if is_image(path) else (open_tensors(path), path.stem)
    found = bundled(source) or _own(source, stem)
    if not found:
        raise WeightsError(f"{path} holds no embeddings: is it a textual inversion?")
    if token is not None:
        if len(found) > 1:
            raise WeightsError(f"{path} holds {len(found)} tokens, but `token` names only one: leave `token` out.")
        found = {token: next(iter(found.values()))}
    return [Word(path, word, _encoded(model, source, word, parts)) for word, parts in found.items()]


def _own(source: TensorSource, word: str) -> Parts:
    """The words of an embedding's own file; `word` where it names none."""
    # A LoRA may lie beside them, and the web UI's first files hold the ids that their words had.
    names = [n for n in source.shapes if not re.fullmatch(r"\w+:\d+:(up|down)|string_to_token\..*", n)]
    if any(map(LORA.fullmatch, names)):
        raise WeightsError(
            f"{source.path} is a LoRA: it is not a textual inversion; give it to load_lora, or to --lora."
        )
    kinds.refuse(source, "a textual inversion")
    several = sum(name.startswith(WEB_UI) for name in names) > 1
    found: Parts = {}
    for name in names:
        inner = name.removeprefix(WEB_UI)
        unnamed = (
            not name or name in (*ENCODERS, *OUTPUTS, "emb_params") or name.isdigit() or (inner != name and not several)
        )
        found.setdefault(word if unnamed else inner, {})[inner if inner == name else "*"] = name
    return found


def bundled(source: TensorSource) -> Parts:
    """The words that a LoRA's file brings along: `bundle_emb.WORD.` before the names of an embedding's file."""
    found: Parts = {}
    for name in source.shapes:
        match = re.fullmatch(r"bundle_emb\.(.+?)\.(string_to_(?:param|token)\..+|\w+)", name)
        if match and not match[2].startswith("string_to_token."):
            found.setdefault(match[1], {})[match[2]] = name
    return found


def _encoded(model: Model, source: TensorSource, word: str, parts: dict[str, str]) -> dict[str, np.ndarray]:
    """One word's vectors [n, D] for each text encoder that the file has any for."""
    wanted = encoders(model)
    if outputs := sorted(set(OUTPUTS) & parts.keys()):
        raise WeightsError(
            f"{source.path} has output embeddings for {word!r} ({outputs[0]}), which are not supported: train and save "
            "it without them."
        )
    tensors = {ENCODERS.get(part) or _encoder_of(model, source, name): name for part, name in parts.items()}
    if len(tensors) < len(parts):
        raise WeightsError(f"{source.path} has several embeddings for {word!r} ({', '.join(parts)}): keep one of them.")
    if not tensors.keys() <= set(wanted):
        raise WeightsError(
            f"{source.path} has {word!r} for {' and '.join(sorted(tensors))}; this model has {' and '.join(wanted)}: "
            "it is of another family."
        )
    return {encoder: _vectors(model, source, encoder, name) for encoder, name in tensors.items()}


def _encoder_of(model: Model, source: TensorSource, name: str) -> str:
    """The text encoder of vectors without its name: the one of their width, or by the file's name."""
    wanted = encoders(model)
    width = source.shapes[name][-1:]
    fitting = [e for e in wanted if [getattr(model, e).config.hidden_size] == list(width)] or wanted
    second = re.fullmatch(r".*_2(-steps-\d+)?", source.path.stem)
    return fitting[-1 if second else 0]


def _vectors(model: Model, source: TensorSource, encoder: str, name: str) -> np.ndarray:
    shape, width = list(source.shapes[name]), getattr(model, encoder).config.hidden_size
    if len(shape) not in (1, 2) or 0 in shape or shape[-1] != width:
        raise WeightsError(
            f"{source.path}: {name} has shape {shape}, where vectors of this model's {encoder} have {width} values: "
            "it is not a textual inversion, or is one for another family."
        )
    return np.asarray(source.read(name)).reshape(-1, width)


def load_textual_inversion(model: Model, params: Params, path: Any, token: str | None = None) -> tuple[Model, Params]:
    """A model that knows the words of a file.

    Args:
        path: a file, a folder or a list of them: see `read_textual_inversion`.
        token: the word to use; needed only to have another one than the file's.

    Returns:
        The model with a larger vocabulary, and parameters with larger tables of token embeddings; those given stay
        as they are.

    Raises:
        WeightsError: the file does not fit, or a token exists already; nothing has been changed then.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    return with_words(model, params, read_textual_inversion(model, [(Path(p), token) for p in paths]))


def with_words(model: Model, params: Params, words: Sequence[Word]) -> tuple[Model, Params]:
    """A model that knows these words, as `load_textual_inversion`."""
    for word in words:
        model, params = _extended(model, params, word.path, word.name, word.vectors)
    return model, params


def load_bundled(model: Model, params: Params, path: str | Path) -> tuple[Model, Params]:
    """The model with the words that a LoRA's file brings along, as `load_textual_inversion`.

    Words that the model knows stay as they are; one that does not fit it is named in a warning.
    """
    source = open_tensors(path)
    for word, parts in bundled(source).items():
        if not knows(model, word):
            try:
                vectors = _encoded(model, source, word, parts)
                if missing := sorted(set(encoders(model)) - vectors.keys()):
                    raise WeightsError(f"{path} has {word!r} for {' and '.join(vectors)} and not for {missing[0]}.")
                model, params = _extended(model, params, path, word, vectors)
            except WeightsError as e:
                logging.warning("%s The LoRA is used without this embedding.", e)
    return model, params


def knows(model: Model, word: str) -> bool:
    """Whether the tokenizers have been given a word."""
    return all(getattr(model, TOKENIZERS[encoder]).added_ids(word) for encoder in encoders(model))


def _extended(
    model: Model, params: Params, path: str | Path, word: str, vectors: dict[str, np.ndarray]
) -> tuple[Model, Params]:
    """`extend` for all text encoders. Raises WeightsError, and has changed nothing then."""
    params = dict(params)
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
