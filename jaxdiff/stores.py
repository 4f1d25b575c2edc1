"""Object stores: paths gs://bucket/… and s3://bucket/…, read and written through fsspec.

Nothing reads from a store directly: objects are first copied to this machine, and files are written here, then
uploaded. Each path of a store has a local place below `copies()`, from which the path can be recovered:

    copies() / AREA / s3 / bucket / run / model.safetensors   <->   s3://bucket/run/model.safetensors

A store cannot rename, and its folders are mere prefixes of names. A single object is written atomically; of several,
the one that readers look for is uploaded last.
"""

import contextlib
import errno
import functools
import importlib.util
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import logging

from jaxdiff.errors import JaxdiffError, say_once

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}  # and the packages that fsspec reads them with
FETCHED, OUTPUTS = "fetched", "outputs"  # areas: downloaded files, and files to be uploaded
PATIENCE = 600.0  # seconds for which failed requests are retried
LONGEST_PAUSE = 15.0  # seconds between two tries
THREADS = 16  # objects transferred at a time
_SCHEME = re.compile(r"([A-Za-z][\w+.-]+):/(/?)(.*)", re.DOTALL)
# Errors that a retry does not help: credentials, names, this machine's disk, bugs.
_FINAL = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound")
_FINAL_NUMBERS = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
_MISTAKES = (TypeError, ValueError, LookupError, AttributeError, ImportError, NotImplementedError)

Listing = dict[str, tuple[int, str]]  # names below a path ("": the path itself) -> (bytes, version tags)


class StoreError(JaxdiffError, ValueError):
    """A store that cannot be reached, read or written, or an invalid path."""


def is_store(path: object) -> bool:
    """Whether a path begins with a known scheme."""
    return str(path).partition("://")[0] in SCHEMES and "://" in str(path)


def wrong(path: object) -> str | None:
    """Why a path is neither a store's nor a local one, as the end of a sentence; None if it may be valid."""
    if not (match := _SCHEME.match(str(path))):
        return None
    scheme, double_slash, inner = match.groups()
    known = " and ".join(f"{name}://" for name in SCHEMES)
    if scheme not in SCHEMES:
        return f"is of an unknown kind: known are {known}, and paths of this machine." if double_slash else None
    if not double_slash:
        return f"has one slash after {scheme}: and would be a folder of this machine: write {scheme}://{inner}."
    if any(part in ("", ".", "..") for part in inner.rstrip("/").split("/")):
        return f"has an empty part, or . or ..: write {scheme}://bucket/folder."
    if importlib.util.find_spec(SCHEMES[scheme]) is None:
        return f"needs the package {SCHEMES[scheme]}: pip install 'jaxdiff[stores]'."
    return None


def check(path: object) -> None:
    """Raise StoreError for a path that is neither a store's nor a local one."""
    if reason := wrong(path):
        raise StoreError(f"{path} {reason}")


# --- local places


def cache_folder() -> Path:
    """`jaxdiff` in the user's cache folder: $XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxdiff"


def copies() -> Path:
    """The folder of all copies."""
    return cache_folder().absolute() / "stores"


def place(url: str, area: str) -> Path:
    """The local place of a store's path; nothing is created. Raises StoreError for an invalid path."""
    check(url)
    scheme, _, inner = url.partition("://")
    return copies() / area / scheme / inner.rstrip("/")


def behind(path: str | Path, area: str = "") -> str | None:
    """The store's path of a local place; None for other paths, or if the place is not in `area` (if given)."""
    try:
        path_area, scheme, *parts = Path(path).absolute().relative_to(copies()).parts
    except ValueError:
        return None
    return f"{scheme}://{'/'.join(parts)}" if parts and area in ("", path_area) else None


def shown(text: object) -> str:
    """A text with local places replaced by the stores' paths."""
    return re.sub(rf"{re.escape(str(copies()))}/[\w-]+/({'|'.join(SCHEMES)})/", r"\1://", str(text))


# --- objects


@functools.cache
def _filesystem(scheme: str) -> Any:
    import fsspec  # orbax brings it

    return fsspec.filesystem(scheme, use_listings_cache=False)


def _call(url: str, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a store's file system; retry errors that may be temporary.

    Raises:
        FileNotFoundError, FileExistsError: raised by the method.
        StoreError: any other error that persists for `PATIENCE` seconds.
    """
    check(url)
    start, delay, warned = time.monotonic(), 0.5, False
    while True:
        try:
            return getattr(_filesystem(url.partition("://")[0]), method)(*args, **kwargs)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as e:
            reason = " ".join((getattr(e, "strerror", None) or str(e) or type(e).__name__).split())[:200]
            if _is_final(e) or time.monotonic() - start > PATIENCE:
                raise StoreError(f"{url} cannot be read or written ({reason}): check the path, your rights there and "
                                 "the network.") from None  # fmt: skip
            if not warned:
                logging.warning("%s answers errors (%s): trying again for up to %.0f s.", url, reason, PATIENCE)
                warned = True
            time.sleep(delay)
            delay = min(2 * delay, LONGEST_PAUSE)


def _is_final(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _FINAL_NUMBERS:
        return True
    code = getattr(error, "code", None)  # of gcsfs
    refused = isinstance(code, int) and 400 <= code < 500 and code not in (408, 429)
    return refused or isinstance(error, (PermissionError, *_MISTAKES)) or type(error).__name__ in _FINAL


def listing(url: str) -> Listing:
    """All objects at and below a path; empty if there are none."""
    url = url.rstrip("/")
    try:
        entries = _call(url, "find", url, detail=True)
    except FileNotFoundError:
        return {}
    root, objects = _filesystem(url.partition("://")[0])._strip_protocol(url).rstrip("/"), Listing()
    for name, info in entries.items():
        if info.get("type") == "directory" or not (name == root or name.startswith(f"{root}/")):
            continue
        relative = name[len(root) + 1 :]
        if any(part in ("", ".", "..") for part in relative.split("/")) and relative:
            if not relative.endswith("/"):  # web consoles make such objects for folders
                say_once(f"{url}/{relative} is left out: its name is not a valid path.")
            continue
        tags = [str(info[key]) for key in ("ETag", "etag", "generation", "created") if key in info]
        objects[relative] = int(info["size"]), " ".join(tags)
    if len(objects) > 1:
        objects.pop("", None)  # on disk a name cannot be both a file and a folder
    return objects


def exists(url: str) -> bool:
    """Whether there is an object of this name."""
    return bool(_call(url, "isfile", url))


def read(url: str) -> bytes | None:
    """The contents of an object; None if it is missing."""
    try:
        return _call(url, "cat_file", url)
    except FileNotFoundError:
        return None


def write(url: str, data: bytes, *, new: bool = False) -> None:
    """Write an object. With `new`, raise FileExistsError if it exists, even with concurrent writers."""
    if new and exists(url):  # for stores without conditional writes
        raise FileExistsError(url)
    _call(url, "pipe_file", url, data, mode="create" if new else "overwrite")


def put(path: Path, url: str) -> None:
    """Upload a file."""
    _call(url, "put_file", str(path), url)


def put_new(path: Path, url: str) -> bool:
    """Upload a small file to a new name; return False if the name is taken."""
    try:
        write(url, path.read_bytes(), new=True)
    except FileExistsError:
        return False
    return True


def remove(*urls: str) -> None:
    """Remove objects; missing ones are ignored."""

    def remove_one(url: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            _call(url, "rm_file", url)

    _in_threads(remove_one, urls)


def move(url: str, to: str, first: str) -> None:
    """Move all objects below a path one by one, starting with `first`."""
    names = listing(url)
    for name in sorted(names, key=lambda name: name != first):
        _call(url, "copy", f"{url}/{name}", f"{to}/{name}")
        remove(f"{url}/{name}")


def probe(url: str) -> None:
    """Raise StoreError if nothing can be written below a path."""
    name = f"{url.rstrip('/')}/.{uuid.uuid4().hex}.tmp"
    try:
        write(name, b"")
    except FileNotFoundError:  # no such bucket
        raise StoreError(f"{url} cannot be written: there is no such bucket.") from None
    remove(name)


def _in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(function, items):
            pass


# --- folders


def files(folder: Path) -> list[str]:
    """Names of the files below a folder, without hidden files and links."""
    paths = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    names = (p.relative_to(folder).as_posix() for p in paths)
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


def upload(folder: Path, url: str, names: Iterable[str]) -> None:
    """Upload files of a folder by their relative names."""
    _in_threads(lambda name: put(folder / name, f"{url}/{name}"), names)


def download(url: str, folder: Path, names: Iterable[str]) -> None:
    """Copy objects below a path into a folder, each atomically. Raises FileNotFoundError if one is missing."""

    def download_one(name: str) -> None:
        path = folder / name if name else folder
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _call(url, "get_file", f"{url}/{name}" if name else url, str(temporary))
            if path.is_dir():  # of an earlier copy
                shutil.rmtree(path)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    _in_threads(download_one, names)


def publish(folder: Path, url: str, marker: str) -> None:
    """Upload a folder so that readers who find its file `marker` find all of it. Other objects there stay.

    Args:
        marker: a file of the folder. An existing one is removed first, and the new one is uploaded last.
    """
    url, names = url.rstrip("/"), files(folder)
    subfolders = {name.split("/")[0] for name in names if "/" in name}  # folders that are replaced
    stale = [name for name in listing(url) if name.split("/")[0] in subfolders and name not in names]
    remove(f"{url}/{marker}")
    upload(folder, url, (name for name in names if name != marker))
    remove(*(f"{url}/{name}" for name in stale))
    put(folder / marker, f"{url}/{marker}")


def fetch(url: str, choose: Callable[[Sequence[str]], Sequence[str]] | None = None) -> Path:
    """A local copy of the objects at and below a path; only objects that changed are downloaded.

    Args:
        url: the path. If a name contains {00..99} or *, all objects are copied that share the prefix before it.
        choose: selects the names to copy; None copies all.

    Raises:
        StoreError: there is nothing, or it cannot be read.
    """
    check(url)
    if match := re.search(r"[{*?\[]", url):
        slash = url.rfind("/", 0, match.start())
        root, prefix = url[:slash], url[slash + 1 : match.start()]
        return fetch(root, lambda names: [n for n in names if n.startswith(prefix)]) / url[slash + 1 :]
    url, objects = url.rstrip("/"), listing(url)
    names = list(objects) if choose is None else list(choose(list(objects)))
    if not names:
        raise StoreError(f"{url} does not exist, or holds nothing: check the path.")
    folder = place(url, FETCHED)
    index = folder.with_name(f".{folder.name}.json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(index.with_suffix(".lock")):
        try:
            previous = json.loads(index.read_bytes())
        except (OSError, ValueError):
            previous = {}
        current: dict[str, list[Any]] = {name: list(objects[name]) for name in names}
        unchanged = {
            name for name in names if previous.get(name) == current[name] and _size(folder / name) == current[name][0]
        }
        if missing := [name for name in names if name not in unchanged]:
            total = sum(current[name][0] for name in missing)
            logging.info("Copying %d files (%.1f MB) of %s to %s.", len(missing), total / 1e6, url, folder)
            index.unlink(missing_ok=True)  # invalid while copying
            try:
                download(url, folder, missing)
            except FileNotFoundError as e:
                raise StoreError(f"{url} changes while it is read ({e}): try again.") from None
        if folder.is_dir():  # delete what was removed from the store
            for name in set(files(folder)) - set(objects):
                (folder / name).unlink(missing_ok=True)
        temporary = index.with_name(f"{index.name}.{os.getpid()}")
        temporary.write_text(json.dumps(current))
        temporary.replace(index)
    return folder


def local(path: str, choose: Callable[[Sequence[str]], Sequence[str]] | None = None) -> str:
    """A local path: `path` itself, or the local copy of a store's path, see `fetch`."""
    return str(fetch(path, choose)) if is_store(path) else path


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock out other processes of this machine during the block, if the file system has locks."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError, OSError):  # systems and file systems without locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
