"""The contents of a `tokenizer/` folder, as both kinds of tokenizer hold them: file name -> bytes."""

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
    """Those of the named files that are there."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def write_files(folder: Path, files: Files, names: Sequence[str]) -> None:
    """Write the files into a folder, which is made if missing; those of `names` that are not among them go."""
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
    """What transformers' class `kind` makes of the files. Raises ConfigError where it cannot."""
    # It would advise to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # transformers replaces itself while it is imported. A plain import gives what it was before to a thread that waits.
    transformers = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files, list(files))
        try:
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
        except Exception as e:  # whatever the version of transformers at hand raises
            raise ConfigError(f"The tokenizer's files cannot be opened by transformers ({e}).") from e


def readable(text: str) -> str:
    """The text with question marks for lone surrogates (undecodable bytes of a command line), which have no tokens."""
    return text.encode("utf-8", "replace").decode()
