"""Fetching packages into a cache folder with the machine's own package clients: npm, and apt-get on Debian."""

import gzip
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

from jaxdiff.errors import JaxdiffError


class BuildError(JaxdiffError, RuntimeError):
    """A failure with a message of one sentence."""


class Unavailable(BuildError):
    """A source that cannot be fetched on this machine; the build continues without it."""


def _run(command: list[str], folder: Path, description: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise BuildError(f"{description} failed ({lines[-1].strip()}): check the network and run again.")


def npm_package(name: str, version: str, cache: Path) -> Path:
    """The unpacked folder of the npm package `name` at `version`, fetched with `npm pack` unless cached.

    Raises:
        BuildError: npm is missing or fails, or what it fetched is not that package.
    """
    folder = cache / f"{name.replace('@', '').replace('/', '-')}-{version}"
    if not folder.exists():
        if not shutil.which("npm"):
            raise BuildError(
                f"{name} is fetched with npm, which is not installed: install Node.js (https://nodejs.org)."
            )
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            _run(["npm", "pack", "--silent", f"{name}@{version}"], Path(temporary), f"npm pack {name}@{version}")
            _unpack(Path(temporary), name)
            (Path(temporary) / "package").rename(folder)
    package = read_json(folder / "package.json")
    if package.get("version") != version:
        raise BuildError(f"{folder} holds version {package.get('version')} and not {version}: delete it and run again.")
    return folder


def _unpack(folder: Path, name: str) -> None:
    """Unpack the one .tgz in `folder` there; its tree is `package/…`."""
    try:
        (archive,) = folder.glob("*.tgz")
        # Decompress all of it, which verifies the checksum: tarfile alone stops silently at a damaged header.
        content = io.BytesIO(gzip.decompress(archive.read_bytes()))
        with tarfile.open(fileobj=content) as tar:
            tar.extractall(folder, filter="data")
    except (ValueError, tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise BuildError(f"What npm fetched for {name} is not a package archive ({error}): run again.") from error
    if not (folder / "package").is_dir():
        raise BuildError(f"What npm fetched for {name} has no package/ folder: check the name and version.")


def debian_package(name: str, cache: Path) -> Path:
    """The unpacked tree of the Debian package `name`, fetched with `apt-get download` unless cached.

    Raises:
        Unavailable: this is not a Debian machine.
        BuildError: apt-get or dpkg fails.
    """
    folder = cache / f"{name}-debian"
    if not folder.exists():
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise Unavailable(f"{name} is left out: it comes with apt-get and dpkg, and this machine lacks them.")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            _run(["apt-get", "download", name], Path(temporary), f"apt-get download {name} (try apt-get update first)")
            archives = list(Path(temporary).glob("*.deb"))
            if not archives:
                raise BuildError(f"apt-get download {name} left no .deb file: run apt-get update and try again.")
            _run(["dpkg", "-x", str(archives[0]), "tree"], Path(temporary), f"dpkg -x {archives[0].name}")
            (Path(temporary) / "tree").rename(folder)
    return folder


def read_json(path: Path):
    """The content of a package's JSON file.

    Raises:
        BuildError: it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BuildError(f"{path} cannot be read ({error}): delete the folder {path.parent} and run again.") from error
