"""Atomic writing of files and folders: write under a temporary name, then rename.

Files that belong to an object store are uploaded instead of renamed, see `jaxdiff.stores`.
"""

import contextlib
import itertools
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from jaxdiff import stores


@contextlib.contextmanager
def writing(target: object, error: type[Exception], remedy: str) -> Iterator[None]:
    """Turn an OSError in the block into an `error` that says what cannot be written, why, and what to do.

    Args:
        target: the start of the sentence, such as "--output: FOLDER".
        error: type to raise.
        remedy: the end of the sentence.
    """
    try:
        yield
    except OSError as e:
        raise error(f"{target} cannot be written ({e.strerror or e}): {remedy}") from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` to write to, then rename the file to `path`.

    If the block raises, the temporary file is removed and an existing file is left untouched. The temporary name is
    hidden, and unique even among hosts that share the folder.

    Raises:
        OSError: the file cannot be renamed.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if url := stores.behind(path, stores.OUTPUTS):
            stores.put(temporary, url)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_new(path: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Like `atomic_write`, but never replace a file: if castle.png exists, write castle-2.png, and so on.

    Safe with several processes that write to one folder.

    Yields:
        The temporary path, and a list that holds the final path after the block.

    Raises:
        OSError: the file cannot be renamed.
    """
    temporary, written = path.with_name(f".{uuid.uuid4().hex}.tmp"), list[Path]()
    try:
        yield temporary, written
        names = itertools.chain([path], (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2)))
        written.append(next(name for name in names if _claim(temporary, name)))
    finally:
        temporary.unlink(missing_ok=True)


def _claim(temporary: Path, name: Path) -> bool:
    """Rename a file; return False if the name is taken."""
    if url := stores.behind(name, stores.OUTPUTS):
        return stores.put_new(temporary, url)
    try:
        os.link(temporary, name)
    except FileExistsError:
        return False
    except OSError:  # a file system without links, such as FAT: reserve the name, then replace the empty file
        try:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        temporary.replace(name)
    return True


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises OSError if it cannot be written."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_writable(folder: Path) -> None:
    """Make a folder if it is missing. Raises OSError if it cannot be made or written to."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    if url := stores.behind(folder, stores.OUTPUTS):
        stores.probe(url)


def replace_folder(folder: Path, new: Path, old: Path) -> None:
    """Rename `new` to `folder`. An existing `folder` is first moved to `old`, and moved back if the renaming fails.

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


def first_bytes(path: str | Path) -> bytes:
    """The first 64 bytes of a file, for `not_fetched`."""
    with Path(path).open("rb") as file:
        return file.read(64)


def not_fetched(head: bytes) -> str | None:
    """Recognize, by its first bytes, a Git LFS pointer or a web page that was saved in place of a file.

    Returns:
        The end of an error message that starts with the file's path; None if nothing is wrong.
    """
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "is a Git LFS pointer, not the file itself: fetch it again with `git lfs pull`, or download it."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file itself: fetch it again by its download link."
    return None
