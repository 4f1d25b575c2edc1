"""Paths of the files that a command writes, and their writing."""

import collections
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from jaxdiff import stores
from jaxdiff.cli.errors import Failure, UsageError
from jaxdiff.cli.flags import LONGEST_NAME
from jaxdiff.files import make_writable
from jaxdiff.io import images

NOT_PNG = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def name_of(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:50].strip("-") or "image"


def paths_of_pattern(output: str, fields: list[dict[str, Any]], known: str) -> list[Path]:
    """The path of each image by a pattern such as "{prompt}-{index}.png".

    Args:
        fields: what each image's path may name.
        known: the same in words.

    Raises:
        UsageError: the pattern names something else, or does not end in .png.
    """
    try:
        paths = [Path(output.format(**values)) for values in fields]
    except (LookupError, ValueError, AttributeError, TypeError):
        raise UsageError(f"--output {output} may name {known}.") from None
    if not output.lower().endswith(".png"):
        raise UsageError(f"--output {output} is a pattern, and images are PNG: end it in .png.")
    return paths


def output_paths(output: str, requests: list[dict[str, Any]]) -> tuple[list[Path], Path]:
    """The path of each image, and of the sheet of all.

    Raises:
        UsageError: `output` names another type than PNG, or is a wrong pattern.
    """
    path = Path(output)
    if "{" in output:
        fields = [{"prompt": name_of(p["prompt"]), "seed": p["seed"], "index": i} for i, p in enumerate(requests)]
        paths = paths_of_pattern(output, fields, "{prompt}, {seed} and {index} only")
        return paths, paths[0].parent / "grid.png"
    if path.suffix.lower() in NOT_PNG:
        raise UsageError(f"--output {output}: images are written as PNG: name a .png file or a folder.")
    if path.suffix.lower() != ".png" or path.is_dir():
        names = [f"{name_of(p['prompt'])}-{p['seed']:03d}" for p in requests]
        if len(set(names)) < len(names):  # a seed of a prompts file, or frames of an interpolation
            names = [f"{name}-{i:03d}" for i, name in enumerate(names)]
        return [path / f"{name}.png" for name in names], path / "grid.png"
    sheet = path.with_name(f"{path.stem}-grid.png")
    if len(requests) == 1:
        return [path], sheet
    return [path.with_name(f"{path.stem}-{i:03d}.png") for i in range(len(requests))], sheet


def enlarged_paths(output: str, files: list[Path], scale: float) -> list[Path]:
    """The path of the enlargement of each file: in a folder, small.png becomes small-x4.png.

    Raises:
        UsageError: `output` names another type than PNG, is a wrong pattern, or gives two files one name.
    """
    names = [f"{file.stem}-x{scale:g}" for file in files]
    counts = collections.Counter(name.casefold() for name in names)
    names = [name if counts[name.casefold()] == 1 else f"{name}-{i:03d}" for i, name in enumerate(names)]
    if "{" in output:
        fields = [{"name": file.stem, "index": i} for i, file in enumerate(files)]
        paths = paths_of_pattern(output, fields, "{name} and {index} only, of images enlarged")
    else:
        paths = output_paths(output, [{"prompt": name, "seed": i} for i, name in enumerate(names)])[0]
        if Path(output).suffix.lower() != ".png" or Path(output).is_dir():
            paths = [Path(output) / f"{name}.png" for name in names]
    check_names(output, paths)
    return paths


class Files(NamedTuple):
    """The paths of all files that a command writes."""

    images: list[Path]
    previews: list[Path]  # one an image
    sheet: Path
    animation: Path


def preview_path(image: Path) -> Path:
    """The path of the preview strip of an image."""
    return image.with_name(f"{image.stem}-preview.png")


def animation_path(preview: Path) -> Path:
    """The path of the animation of a preview strip."""
    return preview.with_suffix(".webp")


def output_files(f: flags.FlagValues, requests: list[dict[str, Any]]) -> Files:
    """The paths of the files that the flags ask for. Raises UsageError if two are the same."""
    paths, sheet = output_paths(f.output, requests)
    previews = [preview_path(path) for path in paths]
    files = Files(paths, previews, sheet, sheet.with_name(f"{sheet.stem.removesuffix('grid')}animation.gif"))
    animations = [animation_path(path) for path in previews] if f.preview_animation else []
    check_names(f.output, [*paths, *(previews if f.preview else ()), *animations, *([sheet] if f.grid else ())])
    return files


def check_names(output: str, written: list[Path]) -> None:
    """Raise UsageError if a file's name is too long, or if two are the same."""
    for path in written:
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise UsageError(f"--output {output:.40} gives a file the name {path.name:.40}…, too long: shorten it.")
    # Some file systems ignore case.
    counts = collections.Counter(str(path).casefold() for path in written)
    for path in written:
        if counts[str(path).casefold()] > 1:
            raise UsageError(f"--output {output} gives two files the name {path.name}: add {{index}} to it.")


class Writer:
    """Writes the files of a command and prints their paths, one a line."""

    def __init__(self, overwrite: bool) -> None:
        self._overwrite, self._warned = overwrite, False

    def png(self, path: Path, image: np.ndarray, metadata: Any) -> Path:
        """Write an image; returns its path, which is numbered if the name is taken."""
        return self._print_path(path, images.write_png(path, image, metadata, overwrite=self._overwrite))

    def gif(self, path: Path, frames: list[np.ndarray], seconds: float) -> Path:
        return self._print_path(path, images.write_gif(path, frames, seconds, overwrite=self._overwrite))

    def webp(self, path: Path, frames: list[np.ndarray], seconds: float, last: float) -> Path:
        return self._print_path(path, images.write_webp(path, frames, seconds, last, overwrite=self._overwrite))

    def _print_path(self, requested: Path, written: Path) -> Path:
        print(stores.shown(written), flush=True)
        if written != requested and not self._warned:
            names = stores.shown(requested), stores.shown(written)
            logging.warning(
                "%s exists, so this image is %s; other names are numbered likewise; --overwrite replaces files.", *names
            )
            self._warned = True
        return written


def check_folder(folder: Path) -> None:
    """Raise Failure if images cannot be written to a folder, as far as can be told without creating it."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise Failure(f"--output: {existing} is a file, not a folder: choose another place.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Failure(f"--output: the folder {existing} is not writable: choose another place.")


def make_folder(folder: Path, flag: str = "--output") -> None:
    """Make a folder that can be written to; raises Failure."""
    try:
        make_writable(folder)
    except OSError as e:
        raise Failure(f"{flag}: {folder} cannot be written to ({e.strerror or e}): choose another place.") from None
