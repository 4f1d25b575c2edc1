"""The contents of a `tokenizer/` folder as a mapping file name -> bytes, used by both kinds of tokenizer."""

import hashlib
import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdiff.config import ConfigError
from jaxdiff.files import atomic_write

Files = Mapping[str, bytes]


def read_files(folder: Path, names: Sequence[str]) -> Files:
    """The named files that exist in `folder`."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def write_files(folder: Path, files: Files, names: Sequence[str]) -> None:
    """Write the files into a folder, created if missing; those of `names` that are not in `files` are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in files:
            with atomic_write(folder / name) as temporary:
                temporary.write_bytes(files[name])
        else:  # a leftover of another tokenizer would be read together with these
            (folder / name).unlink(missing_ok=True)


def digest_of(files: Files) -> str:
    content = hashlib.sha256()
    for name, data in sorted(files.items()):
        content.update(f"{name} {len(data)} ".encode() + data)
    return content.hexdigest()[:16]


def open_files(kind: str, files: Files) -> Any:
    """An object of transformers' class `kind` made from the files. Raises ConfigError if it cannot be made."""
    # Otherwise transformers advises installing PyTorch, which is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # transformers replaces its module during import; a plain import in a waiting thread would get the old one.
    transformers = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files, list(files))
        try:
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
        except Exception as e:  # versions of transformers raise different types
            raise ConfigError(f"The tokenizer's files cannot be opened by transformers ({e}).") from e


def readable(text: str) -> str:
    """The text with question marks for lone surrogates (undecodable bytes of a command line), which have no tokens."""
    return text.encode("utf-8", "replace").decode()
