"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): loading and saving tokens with learned embeddings.

A file holds one or several vectors for each word. Each vector becomes a new token of the tokenizer (`<cat>`,
`<cat>_1`, …) and a new row of the text encoder's table, and `<cat>` in a prompt stands for all of them.
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
ENCODERS = {  # names of each text encoder's vectors in files of SDXL; the second pair is cog-sdxl's
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
OUTPUTS = ("clip_l_out", "clip_g_out", "emb_params_out")  # OneTrainer's output embeddings
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

Parts = dict[str, dict[str, str]]  # word -> part of its embedding -> the tensor's name in the file
WEB_UI = "string_to_param."
# diffusers' trainer writes a file for each text encoder; its advanced script one for both.
STEMS = {"text_encoder": "learned_embeds", "text_encoder_2": "learned_embeds_2"}
SUFFIXES = (".safetensors", ".bin")
BOTH = "*_emb.safetensors"


class Word(NamedTuple):
    """A word and its embedding from a file."""

    path: Path
    name: str
    vectors: dict[str, np.ndarray]  # text encoder -> [vectors, width]


def encoders(model: Model) -> list[str]:
    """The text encoders that support new words: CLIP's."""
    return [name for name in TOKENIZERS if isinstance(getattr(model, TOKENIZERS[name]), Tokenizer)]


def read_textual_inversion(model: Model, files: Sequence[tuple[str | Path, str | None]]) -> list[Word]:
    """The words in files.

    Args:
        files: paths, each with the word to use, or None for the file's own, which defaults to the file's name. A file
            is safetensors, .pt or .bin, with {"<token>": [n, D] or [D]} as diffusers writes it, the AUTOMATIC1111 web
            UI's `emb_params` or `string_to_param`, or for SDXL `clip_l` and `clip_g` (`text_encoders_0` and `_1`); or
            the web UI's PNG with an embedding in a text chunk; or a LoRA's file with bundled words (`bundle_emb`); or
            a folder by diffusers. If SDXL has a file for each text encoder, the second one is among `files` or beside
            the first (`learned_embeds_2` beside `learned_embeds`).

    Raises:
        WeightsError: a file is no textual inversion, or one for text encoders of other widths.
    """
    words: list[Word] = []

    def add(path: Path, token: str | None) -> None:
        for word in _read_file(model, path, token):
            partial = (w for w in words if w.name == word.name and not w.vectors.keys() & word.vectors.keys())
            if other := next(partial, None):
                other.vectors.update(word.vectors)
            else:
                words.append(word)

    tokens = {file: token for path, token in files for file in _files(model, Path(path))}
    for file, token in tokens.items():
        add(file, token)
    incomplete = {word.path for word in words if word.vectors.keys() != set(encoders(model))}
    for file in sorted(incomplete):
        if (second_file := _other_file(file)).is_file() and second_file not in tokens:
            add(second_file, tokens[file])
    for word in words:
        if missing := sorted(set(encoders(model)) - word.vectors.keys()):
            raise WeightsError(
                f"{word.path} has {word.name!r} for {' and '.join(word.vectors)}; this model has "
                f"{' and '.join(encoders(model))}: give the file for {missing[0]} too, or put it beside as "
                f"{_other_file(word.path).name}; else it is of another family."
            )
    return words


def _files(model: Model, path: Path) -> list[Path]:
    """The file itself, or the files in a folder by diffusers. Raises WeightsError if it holds none."""
    if not path.is_dir():
        return [path]
    candidates = [[path / f"{STEMS[e]}{suffix}" for suffix in SUFFIXES] for e in encoders(model)]
    files = [next(p for p in paths if p.is_file()) for paths in candidates if any(p.is_file() for p in paths)]
    files = files or sorted(path.glob(BOTH))[:2]
    if not files or (files[0].match(BOTH) and len(files) > 1):
        raise WeightsError(f"{path} holds no {candidates[0][0].name}: give the file of the textual inversion.")
    return files


def _other_file(path: Path) -> Path:
    """The path of the other text encoder's vectors: learned_embeds_2 for learned_embeds, x_2 for x, and vice versa."""
    match = re.fullmatch(r"(.*?)(_2)?(-steps-\d+)?", path.stem)
    assert match is not None
    return path.with_name(f"{match[1]}{'' if match[2] else '_2'}{match[3] or ''}{path.suffix}")


def _read_file(model: Model, path: Path, token: str | None) -> list[Word]:
    source, stem = open_image_embedding(path) if is_image(path) else (open_tensors(path), path.stem)
    words = bundled(source) or _own_words(source, stem)
    if not words:
        raise WeightsError(f"{path} holds no embeddings: is it a textual inversion?")
    if token is not None:
        if len(words) > 1:
            raise WeightsError(f"{path} holds {len(words)} tokens, but `token` names only one: leave `token` out.")
        words = {token: next(iter(words.values()))}
    return [Word(path, word, _word_vectors(model, source, word, parts)) for word, parts in words.items()]


def _own_words(source: TensorSource, word: str) -> Parts:
    """The words of an embedding's own file; `word` if it does not name one."""
    # Skip cloneofsimo's LoRA in the same file, and the token ids in old files of the web UI.
    names = [n for n in source.shapes if not re.fullmatch(r"\w+:\d+:(up|down)|string_to_token\..*", n)]
    if any(map(LORA.fullmatch, names)):
        raise WeightsError(
            f"{source.path} is a LoRA: it is not a textual inversion; give it to load_lora, or to --lora."
        )
    kinds.refuse(source, "a textual inversion")
    several = sum(name.startswith(WEB_UI) for name in names) > 1
    words: Parts = {}
    for name in names:
        part = name.removeprefix(WEB_UI)
        is_unnamed = (
            not name or name in (*ENCODERS, *OUTPUTS, "emb_params") or name.isdigit() or (part != name and not several)
        )
        words.setdefault(word if is_unnamed else part, {})[part if part == name else "*"] = name
    return words


def bundled(source: TensorSource) -> Parts:
    """The words bundled in a LoRA's file, with `bundle_emb.WORD.` before the names of an embedding's file."""
    words: Parts = {}
    for name in source.shapes:
        match = re.fullmatch(r"bundle_emb\.(.+?)\.(string_to_(?:param|token)\..+|\w+)", name)
        if match and not match[2].startswith("string_to_token."):
            words.setdefault(match[1], {})[match[2]] = name
    return words


def _word_vectors(model: Model, source: TensorSource, word: str, parts: dict[str, str]) -> dict[str, np.ndarray]:
    """One word's vectors [n, D] for each text encoder in the file."""
    names = encoders(model)
    if outputs := sorted(set(OUTPUTS) & parts.keys()):
        raise WeightsError(
            f"{source.path} has output embeddings for {word!r} ({outputs[0]}), which are not supported: train and save "
            "it without them."
        )
    tensors = {ENCODERS.get(part) or _encoder_of(model, source, name): name for part, name in parts.items()}
    if len(tensors) < len(parts):
        raise WeightsError(f"{source.path} has several embeddings for {word!r} ({', '.join(parts)}): keep one of them.")
    if not tensors.keys() <= set(names):
        raise WeightsError(
            f"{source.path} has {word!r} for {' and '.join(sorted(tensors))}; this model has {' and '.join(names)}: "
            "it is of another family."
        )
    return {encoder: _read_vectors(model, source, encoder, name) for encoder, name in tensors.items()}


def _encoder_of(model: Model, source: TensorSource, name: str) -> str:
    """The text encoder of unnamed vectors, by their width and the file's name."""
    names = encoders(model)
    width = source.shapes[name][-1:]
    fitting = [e for e in names if [getattr(model, e).config.hidden_size] == list(width)] or names
    is_second = re.fullmatch(r".*_2(-steps-\d+)?", source.path.stem)
    return fitting[-1 if is_second else 0]


def _read_vectors(model: Model, source: TensorSource, encoder: str, name: str) -> np.ndarray:
    shape, width = list(source.shapes[name]), getattr(model, encoder).config.hidden_size
    if len(shape) not in (1, 2) or 0 in shape or shape[-1] != width:
        raise WeightsError(
            f"{source.path}: {name} has shape {shape}, where vectors of this model's {encoder} have {width} values: "
            "it is not a textual inversion, or is one for another family."
        )
    return np.asarray(source.read(name)).reshape(-1, width)


def load_textual_inversion(model: Model, params: Params, path: Any, token: str | None = None) -> tuple[Model, Params]:
    """A model with the words of a file added.

    Args:
        path: a file, a folder or a list of them: see `read_textual_inversion`.
        token: the word to use instead of the file's own.

    Returns:
        The model with a larger vocabulary, and parameters with larger tables of token embeddings; the arguments are
        not modified.

    Raises:
        WeightsError: the file does not fit, or a token exists already.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    return with_words(model, params, read_textual_inversion(model, [(Path(p), token) for p in paths]))


def with_words(model: Model, params: Params, words: Sequence[Word]) -> tuple[Model, Params]:
    """A model with words added, as by `load_textual_inversion`."""
    for word in words:
        model, params = _with_word(model, params, word.path, word.name, word.vectors)
    return model, params


def load_bundled(model: Model, params: Params, path: str | Path) -> tuple[Model, Params]:
    """The model with the words that are bundled in a LoRA's file, as by `load_textual_inversion`.

    Words that the model knows already are skipped; for words that do not fit it, a warning is logged.
    """
    source = open_tensors(path)
    for word, parts in bundled(source).items():
        if not knows(model, word):
            try:
                vectors = _word_vectors(model, source, word, parts)
                if missing := sorted(set(encoders(model)) - vectors.keys()):
                    raise WeightsError(f"{path} has {word!r} for {' and '.join(vectors)} and not for {missing[0]}.")
                model, params = _with_word(model, params, path, word, vectors)
            except WeightsError as e:
                logging.warning("%s The LoRA is used without this embedding.", e)
    return model, params


def knows(model: Model, word: str) -> bool:
    """Whether a word has been added to the tokenizers."""
    return all(getattr(model, TOKENIZERS[encoder]).added_ids(word) for encoder in encoders(model))


def _with_word(
    model: Model, params: Params, path: str | Path, word: str, vectors: dict[str, np.ndarray]
) -> tuple[Model, Params]:
    """`extend` for all text encoders. Raises WeightsError."""
    params = dict(params)
    for encoder, rows in vectors.items():
        try:
            model, params[encoder] = extend(model, params[encoder], encoder, word, rows)
        except ConfigError as e:
            raise WeightsError(f"{path}: {str(e)[0].lower()}{str(e)[1:]}") from None
    return model, params


def extend(model: Model, params: Params, encoder: str, word: str, rows: Array) -> tuple[Model, Params]:
    """The model, and one text encoder's parameters, with a new word of vectors `rows` [n, D].

    Args:
        params: of the text encoder.

    Raises:
        ConfigError: the tokenizer knows the word already.
    """
    tokenizer = getattr(model, TOKENIZERS[encoder])
    extended = tokenizer.with_word(word, len(rows))
    table = params[TABLE]["embedding"]
    # Some published tables are longer than the vocabulary: new ids use the spare rows first.
    size = max(extended.vocab_size, len(table))
    table = jnp.pad(table, ((0, size - len(table)), (0, 0)))
    table = table.at[tokenizer.vocab_size : extended.vocab_size].set(jnp.asarray(rows, table.dtype))
    # In old configs, eos_token_id 2 means the highest id of a prompt, which would now be the new token's.
    config = getattr(model, encoder).config
    eos_token_id = extended.eos_id if config.eos_token_id == 2 else config.eos_token_id
    model = replace_config(model, encoder, vocab_size=size, eos_token_id=eos_token_id)
    model = dataclasses.replace(model, **{TOKENIZERS[encoder]: extended})
    return model, {**params, TABLE: {"embedding": table}}


def save_textual_inversion(path: str | Path, model: Model, params: Params, token: str) -> None:
    """Write the vectors of a token as a safetensors file, atomically.

    The format is diffusers', {token: [n, D]}; with two text encoders `clip_l` and `clip_g`.

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
