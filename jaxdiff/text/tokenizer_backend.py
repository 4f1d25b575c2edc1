"""A cache on disk of the tokenizers that transformers builds.

transformers builds a `tokenizers.Tokenizer` from a tokenizer's files, which takes a second or two with its import. The
tokenizers library alone opens the result in a few milliseconds. A cache file is named by the content of the tokenizer's
files and by the versions of both libraries.
"""

import contextlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from jaxdiff.files import write_text


class Backend(NamedTuple):
    """A tokenizer that only encodes, and its special ids."""

    encoder: Any  # tokenizers.Tokenizer
    bos_id: int
    eos_id: int
    pad_id: int
    size: int  # ids in all, special tokens included
    added: dict[str, int]  # tokens beside the vocabulary


def cache_file(folder: Path, digest: str) -> Path:
    """The cache file of a tokenizer with this digest."""
    return folder / f"tokenizer-{digest}-{version('transformers')}-{version('tokenizers')}.json"


def from_transformers(clip: Any, file: Path | None) -> Backend:
    """The backend of transformers' `CLIPTokenizer`; it is written to `file` if that is given."""
    ids = {"bos_id": clip.bos_token_id, "eos_id": clip.eos_token_id, "pad_id": clip.pad_token_id}
    metadata = ids | {"size": len(clip), "added": dict(clip.added_tokens_encoder)}
    values = {"tokenizer": clip.backend_tokenizer.to_str(), "split": bool(clip.split_special_tokens), **metadata}
    if file is not None:
        with contextlib.suppress(OSError):
            write_text(file, json.dumps(values))
    return _build(values)


def read(file: Path) -> Backend | None:
    """The backend in a cache file; None if there is none, or, with a warning, if it cannot be used."""
    try:
        return _build(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except Exception as e:  # of JSON, or of the library, which raises plain Exception
        logging.warning("%s cannot be used (%s): written again.", file, e)
        return None


def _build(values: dict[str, Any]) -> Backend:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(values["tokenizer"])
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = values["split"]
    return Backend(encoder, *(values[name] for name in Backend._fields[1:]))
