"""Files and folders that appear whole or not at all: written under a temporary name, then renamed."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for the block to write a file under; the file takes the name `path` at the end.

    An earlier file `path` stays until then, and for good if the block raises: the temporary file is then removed. The
    name is hidden and unique, also among hosts that share the folder.

    Raises:
        OSError: the file cannot be renamed, or the block raised it.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. Raises OSError if it cannot be written."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_folder(folder: Path, new: Path, old: Path) -> None:
    """Rename `new` to `folder`. A folder of that name is first moved to `old`, and moved back if the renaming fails.

    Raises:
        OSError: the renaming fails.
    """
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


def not_fetched(head: bytes) -> str | None:
    """What a file is that lies where another should, by its first bytes; None if it may be the right one.

    The end of a sentence that begins with its path.
    """
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "is a Git LFS pointer, not the file itself: fetch it again with `git lfs pull`, or download it."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file itself: fetch it again by its download link."
    return None
