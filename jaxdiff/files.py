"""Atomic writing of files and folders: they are written under a temporary name, then renamed.

A file whose path stands for an object of a store is uploaded instead of renamed, see `jaxdiff.stores`.
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
def writing(what: object, error: type[Exception], mend: str) -> Iterator[None]:
    """Turn an OSError of the block into an `error` of one sentence: `what` cannot be written, why, and the remedy.

    Args:
        what: begins the sentence, such as "--output: FOLDER".
        error: type to raise.
        mend: ends the sentence: what to do.
    """
    try:
        yield
    except OSError as e:
        raise error(f"{what} cannot be written ({e.strerror or e}): {mend}") from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path next to `path` for the block to write to; the file is renamed to `path` at the end.

    If the block raises, the temporary file is removed and an existing file stays as it is. The temporary name is hidden
    and unique, also among hosts that share the folder.

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
    """As `atomic_write`, but never replaces a file: if castle.png exists, the name becomes castle-2.png, and so on.

    Several processes may write into one folder.

    Yields:
        The temporary path, and a list that holds the final path after the block.

    Raises:
        OSError: the file cannot be renamed.
    """
    temporary, taken = path.with_name(f".{uuid.uuid4().hex}.tmp"), list[Path]()
    try:
        yield temporary, taken
        names = itertools.chain([path], (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2)))
        taken.append(next(name for name in names if _claim(temporary, name)))
    finally:
        temporary.unlink(missing_ok=True)


def _claim(temporary: Path, name: Path) -> bool:
    """Rename a file; False if the name is taken."""
    if url := stores.behind(name, stores.OUTPUTS):
        return stores.put_new(temporary, url)
    try:
        os.link(temporary, name)
    except FileExistsError:
        return False
    except OSError:  # a file system without links, such as FAT: the name is taken first, then filled
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


def first_bytes(path: str | Path) -> bytes:
    """The first 64 bytes of a file, for `not_fetched`."""
    with Path(path).open("rb") as file:
        return file.read(64)


def not_fetched(head: bytes) -> str | None:
    """Whether a file is a Git LFS pointer or a web page instead of the file itself, by its first bytes.

    Returns:
        The rest of a sentence that begins with the file's path; None if the file may be right.
    """
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "is a Git LFS pointer, not the file itself: fetch it again with `git lfs pull`, or download it."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file itself: fetch it again by its download link."
    return None
