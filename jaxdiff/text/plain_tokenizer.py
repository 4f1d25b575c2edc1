"""Prompts to token ids by transformers' own tokenizers: T5's, and Qwen's with its chat template.

Brackets in a prompt have no special meaning, and each prompt is one row of a fixed length.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from absl import logging

from jaxdiff.config import ConfigError
from jaxdiff.text.tokenizer_files import digest_of, open_files, read_files, readable, write_files

TEMPLATE = "chat_template.jinja"  # the template may also be a key of tokenizer_config.json
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "vocab.json", "merges.txt", TEMPLATE,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PlainTokenizer:
    """The contents of a `tokenizer/` folder. Hashable and equal by content, so it may be static under `jit`."""

    files: Mapping[str, bytes] = dataclasses.field(repr=False, compare=False)  # file name -> content
    max_length: int  # tokens of a row: longer prompts are cut, shorter ones padded
    # The chat template's `enable_thinking`. None: no template is applied.
    thinking: bool | None = None
    digest: str = dataclasses.field(init=False)  # of all the files

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", digest_of(self.files))

    @classmethod
    def load(cls, folder: str | Path, max_length: int, thinking: bool | None = None) -> Self:
        """Read a `tokenizer/` folder. Raises ConfigError where it holds none."""
        files = read_files(Path(folder), FILES)
        if not {"tokenizer.json", "spiece.model", "vocab.json"} & set(files):
            raise ConfigError(f"{folder} holds no tokenizer: put tokenizer.json there.")
        template = TEMPLATE in files or b"chat_template" in files.get("tokenizer_config.json", b"")
        if thinking is not None and not template:
            raise ConfigError(f"{folder} holds no chat template, which this model needs: fetch the whole tokenizer.")
        return cls(files, max_length, thinking)

    def save(self, folder: str | Path) -> None:
        """Write the files into `folder`, created if missing."""
        write_files(Path(folder), self.files, FILES)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.files, self.max_length, self.thinking)

    @functools.cached_property
    def _opened(self) -> Any:
        return open_files("AutoTokenizer", self.files)

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [B, max_length] of B prompts, and a mask float32 [B, max_length], 0 for padding."""
        texts = [readable(p) for p in prompts]
        if self.thinking is not None:
            texts = [self._chat(text) for text in texts]
        rows = self._opened(texts, padding="max_length", max_length=self.max_length, truncation=True)
        mask = np.asarray(rows["attention_mask"], np.float32)
        for prompt, text, row in zip(prompts, texts, mask, strict=True):
            if row.all() and len(self._opened(text)["input_ids"]) > self.max_length:
                _warn_truncated(prompt, self.max_length)
        return np.asarray(rows["input_ids"], np.int32), mask

    def _chat(self, prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        return self._opened.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=self.thinking
        )


@functools.lru_cache(maxsize=4096)
def _warn_truncated(prompt: str, length: int) -> None:
    logging.warning("The text encoder reads %d tokens; the end of the prompt %.60r… is left out.", length, prompt)
