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
HINT = "conditioning_file"  # the metadata's key for a ControlNet's input image
REPEATS = "repeats"  # and for how often a pass over the data shows an image
MAX_REPEATS = 1000
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Subfolders that are splits of their own, so that "train" without a folder of its own does not hold their images.
SPLITS = ("train", "validation", "valid", "val", "test", "testing", "dev", "eval", "evaluation")
REPEATED = re.compile(r"(\d+)_(.+)")  # a folder's name as kohya's scripts have it
LOOKED_AT = 100  # examples of metadata beside which text files are looked for
NAMED = 3  # files that a sentence names


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
        once = list(_from_lines(root / METADATA, *columns))
    elif kinds[0] == TABLE:
        once = list(_from_table(root / TABLE, *columns))
    elif kinds[0] == PARQUET:
        once = list(_from_parquet(root / PARQUET, *columns))
    elif text_column or image_column:
        raise ConfigError(
            f"data.text_column and data.image_column name columns, and {root} has text files: leave them out."
        )
    else:
        once = _from_files(root)
    found = [e for e in once for _ in range(e.extras.get(REPEATS, 1))]
    if len({HINT in e.extras for e in found}) > 1:
        raise ConfigError(f'{root / kinds[0]} gives some images a "{HINT}" and others none: give one to all, or none.')
    if not found:
        raise ConfigError(f"{root / kinds[0]} is empty: give it a line with file_name and text for each image.")
    if empty := [Path(e.path) for e in once if not any(e.captions)]:
        say_once(f"{len(empty)} of {len(once)} captions in {root} are empty: {_names(root, empty)}.")
    if kinds[0] != _TEXT_FILES and any(caption_files(Path(e.path)) for e in found[:LOOKED_AT]):
        say_once(f"The text files beside the images of {root} are not read: {kinds[0]} has the captions.")
    return found


_TEXT_FILES = "text files beside images"


def metadata_files(root: Path) -> list[str]:
    """The names of the metadata that lie in a folder, in the order in which they count."""
    return [name for name in TABLES if (root / name).is_file()]


def has_text_files(root: Path) -> bool:
    """Whether a folder has captions beside its images, or in the names of its subfolders."""
    return root.is_dir() and any(caption_files(p) or repeated(root, p)[1] for p in image_files(root, below=True))


def _kinds(root: Path) -> list[str]:
    """The kinds of captions that a folder holds, in the order in which they count."""
    return metadata_files(root) or ([_TEXT_FILES] if has_text_files(root) else [])


def listed_files(path: str | Path, split: str, **columns: str) -> list[Path]:
    """The files that `examples` reads: metadata or text files, images, and their "conditioning_file"s.

    Raises:
        ConfigError: see `examples`.
    """
    found, root = examples(path, split, **columns), find_root(Path(path), split)
    kind = _kinds(root)[0]
    hints = [Path(e.extras[HINT]) for e in found if HINT in e.extras]
    images = [Path(e.path) for e in found]
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
    there = f"; its splits are {', '.join(splits)}" if splits else f", no {TABLE} and no text files beside images"
    raise NoCaptions(f"The data folder {path} has no {split}/{METADATA}{there}.")


def image_files(folder: Path, *, below: bool = False) -> list[Path]:
    """The image files of a folder, by their suffixes, sorted by name.

    Args:
        below: those of its subfolders too, but for splits and the workdirs of runs.

    Raises:
        ConfigError: a subfolder cannot be read.
    """
    if not below:
        return sorted(p for p in folder.glob("*") if _is_image(p.name))
    found: list[Path] = []

    def unreadable(error: OSError) -> None:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror}).")

    for place, folders, names in os.walk(folder, onerror=unreadable):
        apart = SPLITS if Path(place) == folder else ()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in apart]
        if Path(place) != folder and "run.json" in names:
            folders[:] = names = []
        found += [Path(place, name) for name in names if _is_image(name)]
    return sorted(found)


def uncaptioned(folder: Path) -> list[Path]:
    """The images of a folder that needs no captions: its own, else those of subfolders such as "10_sks dog"."""
    below = image_files(folder, below=True) if folder.is_dir() else []
    found = [p for p in below if p.parent == folder] or [p for p in below if repeated(folder, p)[1]]
    if found and len(below) > len(found):
        say_once(f"{len(below) - len(found)} images in subfolders of {folder} are not read.")
    return found


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def caption_files(image: Path) -> list[Path]:
    """The text files beside an image that may hold its caption, the first of which counts."""
    suffixes = [s for suffix in CAPTION_SUFFIXES for s in (suffix, suffix.upper())]
    return [p for suffix in suffixes for p in (image.with_suffix(suffix), Path(f"{image}{suffix}")) if p.is_file()]


def repeated(root: Path, image: Path) -> tuple[int, str]:
    """(repeats per epoch, caption) of an image, from the name of its folder in `root`; (1, "") by default.

    >>> repeated(Path("dogs"), Path("dogs/10_sks dog/a.png"))
    (10, 'sks dog')
    """
    inside = image.relative_to(root).parts
    match = REPEATED.fullmatch(inside[0]) if len(inside) > 1 else None
    if match is None or not 1 <= int(match[1]) <= MAX_REPEATS:
        return 1, ""
    return int(match[1]), match[2].replace("_", " ").strip()


def _from_files(root: Path) -> list[Example]:
    """The images of a folder with the text files beside them."""
    images = image_files(root, below=True)
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(caption_files, images))
        captions = list(pool.map(lambda files: _lines(files[0]) if files else (), texts))
    named = [repeated(root, image) for image in images]
    if missing := [p for p, found, (_, name) in zip(images, captions, named, strict=True) if not (found or name)]:
        raise ConfigError(
            f"{len(missing)} of {len(images)} images in {root} have no text file beside them with a caption, such as "
            f"{_names(root, missing)}: write them, or take the images out."
        )
    if two := [p for p, files in zip(images, texts, strict=True) if len({f.suffix.lower() for f in files}) > 1]:
        say_once(
            f"{len(two)} of {len(images)} images in {root} have text files of both kinds ({_names(root, two)}): "
            f"{CAPTION_SUFFIXES[0]} is read."
        )
    if folders := sorted({p.relative_to(root).parts[0] for p, (_, name) in zip(images, named, strict=True) if name}):
        say_once(
            f"Images of {', '.join(folders[:NAMED])} in {root} are shown as often as the number says; the rest of the "
            "name is the caption of those without a text file."
        )
    return [
        Example(str(p), found or (name,), {REPEATS: n} if n > 1 else {})
        for p, found, (n, name) in zip(images, captions, named, strict=True)
    ]


def _lines(path: Path) -> tuple[str, ...]:
    """The captions of a text file, one a line; at least one."""
    lines = [line.strip() for line in _text(path).splitlines()]
    return tuple(line for line in lines if line) or ("",)


def _names(root: Path, paths: list[Path]) -> str:
    more = ", …" if len(paths) > NAMED else ""
    return ", ".join(str(p.relative_to(root)) for p in paths[:NAMED]) + more


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
                if twice := next((name for name in header if header.count(name) > 1), None):
                    raise ConfigError(f"{where} names the column {twice!r} twice: rename one of them.")
                if image not in header:
                    found = next((f" (it has {name} between them)" for c, name in OTHER if c in row[0]), "")
                    raise ConfigError(
                        f"{where} must name the columns, {image} and {text or 'text'}, with commas between{found}."
                    )
                continue
            if len(cells) != len(header):
                raise ConfigError(
                    f"{where} has {len(cells)} cells, the header {len(header)}: put a caption with commas into quotes."
                )
            values = {name: _number(cell) for name, cell in zip(header, cells, strict=True) if cell}
            texts = {
                name: cell for name, cell in zip(header, cells, strict=True) if _is_text(name, text) or name == image
            }
            yield _example(table.parent, where, values | texts, image, text)
    except csv.Error as e:
        raise ConfigError(f"{table}, line {rows.line_num} cannot be read ({e}).") from None


def _from_parquet(table: Path, image: str, text: str) -> Iterator[Example]:
    """The examples of metadata.parquet."""
    for number, row in enumerate(tables.rows(table), 1):
        values = {name: x for name, x in row.items() if x is not None}
        yield _example(table.parent, f"{table}, row {number}", values, image, text)


NUMBER = re.compile(r"-?[0-9]{1,300}(\.[0-9]+)?([eE][-+]?[0-9]+)?")  # Python refuses integers of 4300 digits
OTHER = ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"))  # separators that are not commas


def _is_text(name: str, text: str) -> bool:
    return name == text if text else name in TEXT_NAMES


def _number(cell: str) -> Any:
    """A cell as a number where it is one, as filters want it."""
    if not NUMBER.fullmatch(cell):
        return cell
    return int(cell) if cell.lstrip("-").isdecimal() else float(cell)


def _example(folder: Path, where: str, given: Mapping[str, Any], image: str, text: str) -> Example:
    values = dict(given)
    text = text or next((name for name in TEXT_NAMES if name in values), "text")
    for key, setting in ((image, "image_column"), (text, "text_column")):
        if key not in values:
            there = ", ".join(map(str, values)) or "nothing"
            raise ConfigError(f'{where} lacks "{key}"; it has {there}: name the column with data.{setting}.')
    name, captions = values.pop(image), values.pop(text)
    if isinstance(name, str):
        name = name.replace("\\", "/")  # as Windows separates folders
    if not isinstance(name, str) or not name:
        raise ConfigError(f'{where}: "{image}" must be the name of an image, not {name!r}.')
    for inside in (name, values.get(HINT, "")):
        if not isinstance(inside, str) or inside.startswith("/") or ".." in inside.split("/"):
            raise ConfigError(f"{where}: the image {inside!r} lies outside of the folder: name one inside.")
    if HINT in values:
        values[HINT] = f"{folder}/{values[HINT]}"
    repeats = values.get(REPEATS, 1)
    if type(repeats) is not int or not 1 <= repeats <= MAX_REPEATS:
        raise ConfigError(f'{where}: "{REPEATS}" must be a whole number from 1 to {MAX_REPEATS}, not {repeats!r}.')
    texts = (captions,) if isinstance(captions, str) else tuple(captions) if isinstance(captions, list) else ()
    if not texts or not all(isinstance(c, str) for c in texts):
        raise ConfigError(f'{where}: "{text}" must be a caption or a list of captions, not {captions!r}.')
    return Example(f"{folder}/{name}", texts, values)
