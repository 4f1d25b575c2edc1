"""Prompts to token ids by the byte-pair encoding of CLIP (Radford et al. 2021, section 2.4; Sennrich et al. 2016).

A `Tokenizer` holds the *contents* of a Hugging Face `tokenizer/` folder and lets transformers' `CLIPTokenizer` read
them, so that ids match those of published models. transformers takes a second or two to import, so it is imported on
first use, and the tokenizer that it builds can be cached (`jaxdiff.text.tokenizer_backend`).
"""

import dataclasses
import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from absl import logging

from jaxdiff.config import ConfigError, read_json
from jaxdiff.text.tokenizer_backend import Backend, cache_file, from_transformers, read
from jaxdiff.text.tokenizer_files import digest_of, open_files, read_files, readable, write_files

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
DEFAULT_LENGTH = 77  # tokens, of every published CLIP text encoder

# Folders saved by transformers 4 hold all four, those saved by transformers 5 the last two.
_VOCAB, _MERGES, _CONFIG, _JSON = "vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"
_ADDED = "added_tokens.json"  # optional in both
_COUNTS = "word_vectors"  # our own key in tokenizer_config.json: added word -> its number of ids
_FILES = (_VOCAB, _MERGES, _CONFIG, "special_tokens_map.json", _ADDED, _JSON)

# How CLIP cuts text into words before merging (Radford et al. 2021, the published `simple_tokenizer`).
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a CLIP text encoder. Hashable and equal by content, so it may be static under `jit`.

    Make one with `Tokenizer.load` or `train_bpe`.
    """

    files: Mapping[str, bytes] = dataclasses.field(repr=False, compare=False)  # file name -> content
    max_length: int = DEFAULT_LENGTH  # tokens of one prompt, start and end included
    # A folder to cache the tokenizer that transformers builds, for later processes.
    cache: Path | None = dataclasses.field(default=None, repr=False, compare=False)
    digest: str = dataclasses.field(init=False)  # of all the files

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", digest_of(self.files))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a `tokenizer/` folder, as transformers 4 or 5 wrote it.

        Raises:
            ConfigError: a file is missing or damaged; the message names it.
        """
        folder = Path(folder)
        files = read_files(folder, _FILES)
        config = read_json(folder / _CONFIG) if _CONFIG in files else {}
        _check_files(folder, files, config)
        length = config.get("model_max_length")
        # transformers writes 1e30 for "not known".
        return cls(files, int(length) if isinstance(length, int | float) and 2 <= length < 1e6 else DEFAULT_LENGTH)

    def save(self, folder: str | Path) -> None:
        """Write the files into `folder`, which is made if missing. transformers' `CLIPTokenizer` opens them too."""
        write_files(Path(folder), self.files, _FILES)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.files, self.max_length)  # the lazily opened tokenizer is not pickled

    @functools.cached_property
    def _clip(self) -> Any:
        return open_files("CLIPTokenizer", self.files)

    @functools.cached_property
    def _backend(self) -> Backend:
        file = self.cache and cache_file(self.cache, self.digest)
        return (file and read(file)) or from_transformers(self._clip, file)

    def with_word(self, word: str, vectors: int = 1) -> Self:
        """The tokenizer with an added word, which becomes `vectors` new ids in a row and matches in any letter case.

        A word that begins and ends with a letter, digit or underscore matches only as a whole word: `art` does not
        match in `party`. Other words (`<cat>`, and those of scripts without spaces) match anywhere. The further ids are
        named as in diffusers, `word_1`, `word_2` …, with an underscore appended if that name is taken.

        Raises:
            ConfigError: the word is blank or already known.
        """
        if not word.strip() or not word.isprintable():
            raise ConfigError(f"{word!r} cannot be a token: give it a visible name, such as '<cat-toy>'.")
        added, groups, first = self._clip.added_tokens_decoder, self._vectors.values(), self.vocab_size
        names = {i: added[i].content for i in sorted(added)}
        extra = {i: names[i] for ids in groups for i in ids[1:]}
        known = set(self._clip.get_vocab()).difference(extra.values())
        known |= {name.lower() for i, name in names.items() if i not in extra}  # added words match in any case
        if {word, word.lower()} & known:
            raise ConfigError(f"The tokenizer has a token {word!r} already: give another name.")
        names[first] = word
        known.add(word.lower())
        for i, name in [*extra.items(), *((first + i, f"{word}_{i}") for i in range(1, vectors))]:
            while name.lower() in known:
                name += "_"
            names[i] = name
            known.add(name.lower())
        config = json.loads(self.files.get(_CONFIG, b"{}"))
        counts = {ids[0]: len(ids) for ids in groups if ids[-1] - ids[0] == len(ids) - 1} | {first: vectors}
        config[_COUNTS] = config.get(_COUNTS, {}) | {names[i]: count for i, count in counts.items()}
        config["added_tokens_decoder"] = {str(i): _token_entry(name, added.get(i), word) for i, name in names.items()}
        # With these keys, transformers reads no other file for special tokens.
        config |= {kind: getattr(self._clip, kind) for kind in ("bos_token", "eos_token", "pad_token", "unk_token")}
        files = {name: data for name, data in self.files.items() if name != _ADDED}
        return type(self)({**files, _CONFIG: json.dumps(config, indent=2).encode()}, self.max_length, self.cache)

    def added_ids(self, token: str) -> list[int]:
        """The ids of an added token, one a vector; empty if there is no such token."""
        first = self._backend.added.get(token)
        return [] if first is None else self._expanded([first])

    @functools.cached_property
    def _vectors(self) -> dict[int, list[int]]:
        """For added words with several ids: the first id -> all ids."""
        added = self._backend.added
        words = json.loads(self.files.get(_CONFIG, b"{}")).get(_COUNTS, {})
        groups = {}
        for token, first in added.items():
            group = [first]
            if token in words:
                if first + words[token] > self.vocab_size:
                    raise ConfigError(
                        f"{_CONFIG} gives {token!r} {words[token]} ids, more than there are: save it again."
                    )
                group += range(first + 1, first + words[token])
            # Folders saved by diffusers mark further ids by their names only.
            while token not in words and (following := f"{token}_{len(group)}") in added and following not in words:
                group.append(added[following])
            if len(group) > 1:
                groups[first] = group
        return groups

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._backend.size

    @property
    def bos_id(self) -> int:
        return self._backend.bos_id

    @property
    def eos_id(self) -> int:
        return self._backend.eos_id

    @property
    def pad_id(self) -> int:
        return self._backend.pad_id

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [B, max_length] of B prompts: start, text, end, padding.

        A prompt that is too long is truncated; a warning, once a prompt, shows what was left out.

        Raises:
            TypeError: `prompts` is not a sequence of strings.
        """
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompts must be a list of strings, not {prompts!r}.")
        ids = np.full((len(prompts), self.max_length), self.pad_id, np.int32)
        if not len(prompts):
            return ids
        texts = [readable(p) for p in prompts]
        for row, text, encoded in zip(ids, texts, self._backend.encoder.encode_batch(texts), strict=True):
            pairs = zip(encoded.ids, encoded.offsets, strict=True)
            spans = [span for token, span in pairs for _ in self._vectors.get(token, (0,))]
            tokens = self._expanded(encoded.ids)
            if len(tokens) > self.max_length:
                _warn_truncated(text[spans[self.max_length - 1][0] :], text, self.max_length)
                tokens = [*tokens[: self.max_length - 1], self.eos_id]
            row[: len(tokens)] = tokens
        return ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text: no start, end or padding, and not truncated."""
        return [[vector for word in words for vector in word] for words in self.encode_words(texts)]

    def encode_words(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """`encode` with the ids grouped by token: one id each, or all ids of an added token."""
        if not len(texts):
            return []
        encoded = self._backend.encoder.encode_batch([readable(t) for t in texts], add_special_tokens=False)
        return [[self._vectors.get(i, [i]) for i in encoding.ids] for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids as CLIP reads it: in lower case, with single spaces."""
        return self._clip.decode(list(ids)).strip()

    def _expanded(self, ids: list[int]) -> list[int]:
        return [vector for i in ids for vector in self._vectors.get(i, (i,))]


def _token_entry(name: str, token: Any, word: str) -> dict[str, Any]:
    """The entry of an added token in tokenizer_config.json: an existing token, or (None) a new one for `word`."""
    if token is not None:
        options = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return {"content": name, **{option: getattr(token, option) for option in options}}
    has_spaces = not any(unicodedata.east_asian_width(character) in "WF" for character in word)
    single_word = has_spaces and re.fullmatch(r"\w(.*\w)?", word) is not None
    return {
        "content": name,
        "single_word": single_word,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }


@functools.lru_cache(maxsize=4096)  # a caption that recurs every epoch is reported once
def _warn_truncated(left_out: str, prompt: str, max_length: int) -> None:
    logging.warning(
        "The text encoder reads %d tokens, start and end included; left out of the prompt %r: %r",
        max_length,
        prompt,
        left_out,
    )


def _check_files(folder: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the files hold a complete CLIP vocabulary."""
    vocab: Any
    if _VOCAB in files and _MERGES in files:
        name, vocab = _VOCAB, read_json(folder / _VOCAB)
        try:
            lines = files[_MERGES].decode("utf-8").replace("\r", "").split("\n")
        except UnicodeDecodeError as e:
            raise ConfigError(f"{folder / _MERGES} is damaged ({e}): download or save it again.") from None
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    elif _JSON in files:
        name, model = _JSON, read_json(folder / _JSON).get("model") or {}
        vocab, raw_merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
        raw_merges = raw_merges if isinstance(raw_merges, list) else [raw_merges] if raw_merges else []
        # One string "a b" up to tokenizers 0.19, a pair since.
        merges = [tuple(m) if isinstance(m, list) else tuple(str(m).split(" ")) for m in raw_merges]
    else:
        raise ConfigError(f"{folder} holds no CLIP vocabulary: put vocab.json and merges.txt there, or tokenizer.json.")
    advice = "download or save it again."
    counts = config.get(_COUNTS, {})
    if not isinstance(counts, dict) or not all(type(n) is int and n >= 1 for n in counts.values()):
        raise ConfigError(f"{folder / _CONFIG}: {_COUNTS} must be words with how many ids each has: {advice}")
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise ConfigError(f"{folder / name} is not a CLIP vocabulary (tokens with their ids): {advice}")
    if len(set(vocab.values())) != len(vocab):
        raise ConfigError(f"{folder / name} gives one id to several tokens: {advice}")
    for key, default in (("bos_token", BOS), ("eos_token", EOS)):
        token = config.get(key, default)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str) or token not in vocab:
            raise ConfigError(f"{folder / name} lacks the {key} {token!r}: it is not CLIP's, or damaged; {advice}")
    for pair in merges:
        is_text = all(isinstance(part, str) for part in pair)
        if len(pair) != 2 or not is_text or not all(part in vocab for part in (*pair, "".join(pair))):
            raise ConfigError(
                f"The merge {' '.join(map(str, pair))!r} in {folder / (_MERGES if name == _VOCAB else name)} "
                f"does not fit the vocabulary: {advice}"
            )


def train_bpe(texts: Iterable[str], vocab_size: int, max_length: int = DEFAULT_LENGTH) -> Tokenizer:
    """Learn a byte-pair vocabulary like CLIP's from texts: lower case, bytes, words ending in `</w>`.

    As in CLIP, the ids are 256 bytes, the same 256 at the end of a word, the merges in the order learned, start, end,
    so that every text can be encoded. Training is deterministic.

    Args:
        texts: the corpus; letter case and white space do not matter.
        vocab_size: maximum number of ids; there are fewer if no pair occurs twice any more (`Tokenizer.vocab_size`).
        max_length: tokens of one prompt, start and end included.

    Raises:
        ConfigError: `vocab_size` leaves no room for the bytes, or `max_length` for a word.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as FastTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [c + "</w>" for c in alphabet]
    if vocab_size < len(base) + 2:
        raise ConfigError(f"vocab_size must be {len(base) + 2} or more (bytes and special tokens), not {vocab_size}.")
    if max_length < 3:
        raise ConfigError(f"max_length must be 3 or more (start, a token, end), not {max_length}.")
    backend = FastTokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # Naming the base as special tokens fixes its ids, by which the trainer breaks ties between equally frequent pairs.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        special_tokens=base,  # type: ignore[arg-type]
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    pairs = json.loads(backend.to_str())["model"]["merges"]
    tokens = [*base, *("".join(pair) for pair in pairs), BOS, EOS]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": EOS,
    }
    files = {
        _VOCAB: json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        _MERGES: "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]),
        _CONFIG: json.dumps(config, indent=2),
    }
    return Tokenizer({name: text.encode("utf-8") for name, text in files.items()}, max_length)
