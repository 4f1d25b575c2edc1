"""Captions of a folder of images: `metadata.jsonl`, `.csv` or `.parquet`, or a text file beside each image.

    images/metadata.jsonl    {"file_name": "castle.webp", "text": ["a castle", "two towers"], "license": "CC0"}
    images/metadata.csv      file_name,text
    images/metadata.parquet  the same columns
    images/castle.txt        beside castle.webp, or castle.caption, or castle.webp.txt; a line is a caption

The first of these that a folder has is read, and a warning names the others. Images with text files may be in
subfolders. In a subfolder named in the style of kohya's scripts, "10_sks dog", images count 10 times per epoch, and
"sks dog" is the caption of those without a text file.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff.config import ConfigError
from jaxdiff.data import tables
from jaxdiff.data.source import TEXT_NAMES
from jaxdiff.errors import say_once
from jaxdiff.files import not_fetched

METADATA = "metadata.jsonl"  # names the images of a split and their captions
TABLE = "metadata.csv"  # the same
PARQUET = "metadata.parquet"  # the same, as Hugging Face's folders of images have it
TABLES = (METADATA, TABLE, PARQUET)  # in the order in which they count
CAPTION_SUFFIXES = (".txt", ".caption")  # of the text file beside an image
HINT = "conditioning_file"  # metadata key of a ControlNet's input image
REPEATS = "repeats"  # metadata key of how often an epoch shows an image
MAX_REPEATS = 1000
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Subfolders with splits of their own, whose images are not part of a "train" split without a subfolder.
SPLITS = ("train", "validation", "valid", "val", "test", "testing", "dev", "eval", "evaluation")
REPEATED_FOLDER = re.compile(r"(\d+)_(.+)")  # kohya's scripts: "10_sks dog"
CHECKED_EXAMPLES = 100  # examples of metadata that are checked for text files beside them
MAX_NAMED = 3  # files that a message lists


class NoCaptions(ConfigError):
    """A folder has no captions of its images."""


class Example(NamedTuple):
    """One image of a folder."""

    path: str  # of the image
    captions: tuple[str, ...]
    extras: dict[str, Any]  # other metadata


def examples(path: str | Path, split: str = "train", *, image_column: str = "", text_column: str = "") -> list[Example]:
    """The examples of a captioned folder, in the order of its metadata, or of their names; images are not read.

    An example with "repeats": n is listed n times.

    Args:
        path: the folder. Images and captions are in its subfolder `split`, or for "train" in the folder itself.
        split: "train", "validation", "test", …
        image_column, text_column: of the metadata; "" takes "file_name", and a usual name of captions.

    Raises:
        ConfigError: folder, split or captions are missing, empty or damaged; the sentence names the line or file.
    """
    root = find_root(Path(path), split)
    kinds = _kinds(root)
    if len(kinds) > 1:
        say_once(f"{root} holds {' and '.join(kinds)}: {kinds[0]} is read.")
    columns = image_column or "file_name", text_column
    if kinds[0] == METADATA:
        unrepeated = list(_from_lines(root / METADATA, *columns))
    elif kinds[0] == TABLE:
        unrepeated = list(_from_table(root / TABLE, *columns))
    elif kinds[0] == PARQUET:
        unrepeated = list(_from_parquet(root / PARQUET, *columns))
    elif text_column or image_column:
        raise ConfigError(
            f"data.text_column and data.image_column name columns, and {root} has text files: leave them out."
        )
    else:
        unrepeated = _from_files(root)
    listed = [example for example in unrepeated for _ in range(example.extras.get(REPEATS, 1))]
    if len({HINT in example.extras for example in listed}) > 1:
        raise ConfigError(f'{root / kinds[0]} gives some images a "{HINT}" and others none: give one to all, or none.')
    if not listed:
        raise ConfigError(f"{root / kinds[0]} is empty: give it a line with file_name and text for each image.")
    if empty := [Path(example.path) for example in unrepeated if not any(example.captions)]:
        say_once(f"{len(empty)} of {len(unrepeated)} captions in {root} are empty: {_describe_files(root, empty)}.")
    if kinds[0] != _TEXT_FILES and any(caption_files(Path(example.path)) for example in listed[:CHECKED_EXAMPLES]):
        say_once(f"The text files beside the images of {root} are not read: {kinds[0]} has the captions.")
    return listed


_TEXT_FILES = "text files beside images"


def metadata_files(root: Path) -> list[str]:
    """The names of a folder's metadata files, in order of precedence."""
    return [name for name in TABLES if (root / name).is_file()]


def has_text_files(root: Path) -> bool:
    """Whether a folder has captions beside its images, or in the names of its subfolders."""
    return root.is_dir() and any(
        caption_files(p) or folder_label(root, p)[1] for p in image_files(root, recursive=True)
    )


def _kinds(root: Path) -> list[str]:
    """The kinds of captions in a folder, in order of precedence."""
    return metadata_files(root) or ([_TEXT_FILES] if has_text_files(root) else [])


def listed_files(path: str | Path, split: str, **columns: str) -> list[Path]:
    """The files that `examples` reads: metadata or text files, images, and their "conditioning_file"s.

    Raises:
        ConfigError: see `examples`.
    """
    listed, root = examples(path, split, **columns), find_root(Path(path), split)
    kind = _kinds(root)[0]
    hints = [Path(example.extras[HINT]) for example in listed if HINT in example.extras]
    images = [Path(example.path) for example in listed]
    texts = [p for image in images for p in caption_files(image)[:1]] if kind == _TEXT_FILES else [root / kind]
    return [*texts, *images, *hints]


def find_root(path: Path, split: str) -> Path:
    """The folder with the images of a split and their captions. Raises ConfigError where there is none."""
    if not path.is_dir():
        raise ConfigError(f"The data folder {path} does not exist.")
    roots = (path / split, path) if split == "train" else (path / split,)
    for has_captions in (metadata_files, has_text_files):
        for root in roots:
            if has_captions(root):
                return root
    splits = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".") and _kinds(p))
    hint = f"; its splits are {', '.join(splits)}" if splits else f", no {TABLE} and no text files beside images"
    raise NoCaptions(f"The data folder {path} has no {split}/{METADATA}{hint}.")


def image_files(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The image files of a folder, by their suffixes, sorted by name.

    Args:
        recursive: whether to include subfolders, except for splits and the workdirs of runs.

    Raises:
        ConfigError: a subfolder cannot be read.
    """
    if not recursive:
        return sorted(p for p in folder.glob("*") if _is_image(p.name))
    files: list[Path] = []

    def unreadable(error: OSError) -> None:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror}).")

    for directory, folders, names in os.walk(folder, onerror=unreadable):
        excluded = SPLITS if Path(directory) == folder else ()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in excluded]
        if Path(directory) != folder and "run.json" in names:
            folders[:] = names = []
        files += [Path(directory, name) for name in names if _is_image(name)]
    return sorted(files)


def uncaptioned(folder: Path) -> list[Path]:
    """The images of a folder that needs no captions: its own, else those of subfolders such as "10_sks dog"."""
    all_images = image_files(folder, recursive=True) if folder.is_dir() else []
    images = [p for p in all_images if p.parent == folder] or [p for p in all_images if folder_label(folder, p)[1]]
    if images and len(all_images) > len(images):
        say_once(f"{len(all_images) - len(images)} images in subfolders of {folder} are not read.")
    return images


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def caption_files(image: Path) -> list[Path]:
    """The text files beside an image that may hold its caption, in order of precedence."""
    suffixes = [s for suffix in CAPTION_SUFFIXES for s in (suffix, suffix.upper())]
    return [p for suffix in suffixes for p in (image.with_suffix(suffix), Path(f"{image}{suffix}")) if p.is_file()]


def folder_label(root: Path, image: Path) -> tuple[int, str]:
    """(repeats per epoch, caption) of an image, from the name of its folder in `root`; (1, "") by default.

    >>> folder_label(Path("dogs"), Path("dogs/10_sks dog/a.png"))
    (10, 'sks dog')
    """
    parts = image.relative_to(root).parts
    match = REPEATED_FOLDER.fullmatch(parts[0]) if len(parts) > 1 else None
    if match is None or not 1 <= int(match[1]) <= MAX_REPEATS:
        return 1, ""
    return int(match[1]), match[2].replace("_", " ").strip()


def _from_files(root: Path) -> list[Example]:
    """The images of a folder with the text files beside them."""
    images = image_files(root, recursive=True)
    with ThreadPoolExecutor(16) as pool:
        text_files = list(pool.map(caption_files, images))
        captions = list(pool.map(lambda files: _lines(files[0]) if files else (), text_files))
    listed, missing, ambiguous, folders = list[Example](), list[Path](), list[Path](), set[str]()
    for image, files, texts in zip(images, text_files, captions, strict=True):
        repeats, folder_caption = folder_label(root, image)
        if not (texts or folder_caption):
            missing.append(image)
        if len({file.suffix.lower() for file in files}) > 1:
            ambiguous.append(image)
        if folder_caption:
            folders.add(image.relative_to(root).parts[0])
        listed.append(Example(str(image), texts or (folder_caption,), {REPEATS: repeats} if repeats > 1 else {}))
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(images)} images in {root} have no text file beside them with a caption, such as "
            f"{_describe_files(root, missing)}: write them, or take the images out."
        )
    if ambiguous:
        say_once(
            f"{len(ambiguous)} of {len(images)} images in {root} have text files of both kinds "
            f"({_describe_files(root, ambiguous)}): {CAPTION_SUFFIXES[0]} is read."
        )
    if folders:
        say_once(
            f"Images of {', '.join(sorted(folders)[:MAX_NAMED])} in {root} are shown as often as the number says; the "
            "rest of the name is the caption of those without a text file."
        )
    return listed


def _lines(path: Path) -> tuple[str, ...]:
    """The captions of a text file, one a line; at least one."""
    lines = [line.strip() for line in _text(path).splitlines()]
    return tuple(line for line in lines if line) or ("",)


def _describe_files(root: Path, paths: list[Path]) -> str:
    ellipsis = ", …" if len(paths) > MAX_NAMED else ""
    return ", ".join(str(p.relative_to(root)) for p in paths[:MAX_NAMED]) + ellipsis


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise ConfigError(f"{path} cannot be read ({e.strerror}).") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8: save it as that.") from None
    if (reason := not_fetched(text[:200].encode())) is not None:
        raise ConfigError(f"{path} {reason}")
    return text


def _from_lines(metadata: Path, image: str, text: str) -> Iterator[Example]:
    """The examples of metadata.jsonl."""
    try:
        lines = metadata.read_bytes().split(b"\n")
    except OSError as e:
        raise ConfigError(f"{metadata} cannot be read ({e.strerror}).") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{where} is not JSON ({e}).") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{where} is not a JSON object with file_name and text.")
        yield _example(metadata.parent, where, values, image, text)


def _from_table(table: Path, image: str, text: str) -> Iterator[Example]:
    """The examples of metadata.csv: commas between cells, and quotes around those with commas or quotes in them."""
    content = _text(table)
    rows = csv.reader(io.StringIO(content, newline=""), skipinitialspace=True, strict=True)
    header: list[str] = []
    try:
        for row in rows:
            where, cells = f"{table}, line {rows.line_num}", [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not header:
                header = cells
                if duplicate := next((name for name in header if header.count(name) > 1), None):
                    raise ConfigError(f"{where} names the column {duplicate!r} twice: rename one of them.")
                if image not in header:
                    used = next((name for separator, name in OTHER_SEPARATORS if separator in row[0]), None)
                    hint = f" (it has {used} between them)" if used else ""
                    raise ConfigError(
                        f"{where} must name the columns, {image} and {text or 'text'}, with commas between{hint}."
                    )
                continue
            if len(cells) != len(header):
                raise ConfigError(
                    f"{where} has {len(cells)} cells, the header {len(header)}: put a caption with commas into quotes."
                )
            values = {name: _number(cell) for name, cell in zip(header, cells, strict=True) if cell}
            # Captions and file names stay text, even if they look like numbers.
            values |= {
                name: cell for name, cell in zip(header, cells, strict=True) if _is_text(name, text) or name == image
            }
            yield _example(table.parent, where, values, image, text)
    except csv.Error as e:
        raise ConfigError(f"{table}, line {rows.line_num} cannot be read ({e}).") from None


def _from_parquet(table: Path, image: str, text: str) -> Iterator[Example]:
    """The examples of metadata.parquet."""
    for number, row in enumerate(tables.rows(table), 1):
        values = {name: x for name, x in row.items() if x is not None}
        yield _example(table.parent, f"{table}, row {number}", values, image, text)


NUMBER = re.compile(r"-?[0-9]{1,300}(\.[0-9]+)?([eE][-+]?[0-9]+)?")  # Python refuses integers of 4300 digits
OTHER_SEPARATORS = ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"))  # separators that are not commas


def _is_text(name: str, text: str) -> bool:
    return name == text if text else name in TEXT_NAMES


def _number(cell: str) -> Any:
    """The cell as a number if it is one, for filters."""
    if not NUMBER.fullmatch(cell):
        return cell
    return int(cell) if cell.lstrip("-").isdecimal() else float(cell)


def _example(folder: Path, where: str, row: Mapping[str, Any], image: str, text: str) -> Example:
    values = dict(row)
    text = text or next((name for name in TEXT_NAMES if name in values), "text")
    for key, setting in ((image, "image_column"), (text, "text_column")):
        if key not in values:
            columns = ", ".join(map(str, values)) or "nothing"
            raise ConfigError(f'{where} lacks "{key}"; it has {columns}: name the column with data.{setting}.')
    name, captions = values.pop(image), values.pop(text)
    if isinstance(name, str):
        name = name.replace("\\", "/")  # Windows
    if not isinstance(name, str) or not name:
        raise ConfigError(f'{where}: "{image}" must be the name of an image, not {name!r}.')
    for file_name in (name, values.get(HINT, "")):
        if not isinstance(file_name, str) or file_name.startswith("/") or ".." in file_name.split("/"):
            raise ConfigError(f"{where}: the image {file_name!r} lies outside of the folder: name one inside.")
    if HINT in values:
        values[HINT] = f"{folder}/{values[HINT]}"
    repeats = values.get(REPEATS, 1)
    if type(repeats) is not int or not 1 <= repeats <= MAX_REPEATS:
        raise ConfigError(f'{where}: "{REPEATS}" must be a whole number from 1 to {MAX_REPEATS}, not {repeats!r}.')
    texts = (captions,) if isinstance(captions, str) else tuple(captions) if isinstance(captions, list) else ()
    if not texts or not all(isinstance(c, str) for c in texts):
        raise ConfigError(f'{where}: "{text}" must be a caption or a list of captions, not {captions!r}.')
    return Example(f"{folder}/{name}", texts, values)
