"""The folder of a report: written under a temporary name, and renamed when it is complete."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags, logging

from jaxdiff.cli.errors import Failure, UsageError
from jaxdiff.cli.outputs import check_folder, make_folder
from jaxdiff.data.source import Source
from jaxdiff.evaluation import measures, report, sheets
from jaxdiff.evaluation.features import Features, read_rgb
from jaxdiff.evaluation.flags import DATA_FLAGS, without_drawing
from jaxdiff.evaluation.images import Images
from jaxdiff.evaluation.measures import Nearest
from jaxdiff.files import replace_folder, writing
from jaxdiff.io.images import write_png
from jaxdiff.version import __version__

SETTINGS = "settings.json"  # of an unfinished report
PATHS = ("images", "data", "features", "model", "encoder", "prompts")  # flags whose files must not lie in the report


class Results(NamedTuple):
    """All measures of a report."""

    rows: list[measures.Row]
    notes: list[str]
    scores: np.ndarray  # [N]
    ranks: np.ndarray  # [N]
    nearest: Nearest | None
    train: Features | None


def unfinished(output: Path) -> Path:
    """The folder in which a report is made."""
    return output.with_name(f".{output.name}.partial")


def writing_report(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Turn errors of the file system into a Failure."""
    mend = "free some space or choose another place; the same command resumes."
    return writing(f"--output: {folder}", Failure, mend)


def check_output(f: flags.FlagValues) -> Path:
    """The folder of the report. Raises UsageError if it exists and must not be replaced."""
    output = Path(f.output).absolute()
    if output.exists() and not f.overwrite:
        raise UsageError(f"--output {f.output} exists: name another folder, or give --overwrite.")
    if output.exists() and not (output / "report.json").is_file():
        raise UsageError(
            f"--output {f.output} exists and is not a report, so --overwrite does not replace it: name another folder."
        )
    report_folders = {output.resolve(), unfinished(output).resolve()}
    for name in (name for name in PATHS if f[name].value is not None):
        path = Path(str(f[name].value)).resolve()
        if report_folders & {path, *path.parents} and (path.exists() or name == "features"):
            raise UsageError(
                f"--{name} {f[name].value} lies where the report of --output {f.output} is made: name another --output."
            )
    check_folder(output.parent)
    return output


@contextlib.contextmanager
def locked(work: Path, output: str) -> Iterator[None]:
    """Lock the folder of an unfinished report for the block; it is created if missing.

    Raises:
        Failure: another process holds the lock, or the folder cannot be created.
    """
    missing = [p for p in (work, *work.parents) if not p.exists()]  # innermost first
    with writing_report(work):
        descriptor = _open_locked(work)
    if descriptor is None:
        raise Failure(f"--output {output} is being made by another process: wait for it, or name another folder.")
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # it is not empty, or was renamed
                path.rmdir()
        os.close(descriptor)  # releases the lock


def _open_locked(work: Path) -> int | None:
    """A file descriptor of the locked folder, valid even after a rename; None if another process has the lock."""
    while True:
        make_folder(work)
        try:
            descriptor = os.open(work, os.O_RDONLY)
        except FileNotFoundError:  # it was just renamed
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as e:  # some network file systems have no locks
            logging.warning("%s cannot be locked (%s): do not write a second report there.", work, e.strerror)
            return descriptor
        if work.exists() and os.path.samestat(os.fstat(descriptor), work.stat()):
            return descriptor
        os.close(descriptor)  # renamed since it was opened


def begin(work: Path, settings: Any) -> None:
    """Create the folder of an unfinished report; one with other settings is emptied first."""
    text = json.dumps(settings, sort_keys=True)
    try:
        unchanged = (work / SETTINGS).read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        unchanged = False
    with writing_report(work):
        make_folder(work)
        if not unchanged:
            for path in work.iterdir():  # the folder itself is locked
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            (work / SETTINGS).write_text(text, encoding="utf-8")


def image_record(i: int, images: Images, results: Results, source: Source | None) -> dict[str, Any]:
    """The line of images.jsonl for image i."""
    values: dict[str, Any] = {
        "file_name": Path(images.paths[i]).name,
        "prompt": images.prompts[i],
        "seed": images.seeds[i],
    }
    values |= {"clip_score": float(results.scores[i]), "rank": float(results.ranks[i])}
    if results.nearest is not None and results.train is not None and source is not None:
        nearest_images: dict[str, Any] = {}
        for k, kind in enumerate(measures.KINDS):
            record = int(results.train.index[results.nearest.rows[k, i]])
            nearest_images[kind] = {
                "name": source.read(record, image=False).name,
                "distance": float(results.nearest.distances[k, i]),
            }
            if results.nearest.ratios is not None:
                nearest_images[kind]["ratio"] = float(results.nearest.ratios[k, i])
        values["nearest"] = nearest_images
    return values


def pairs(images: Images, results: Results, source: Source, count: int) -> Iterator[list[sheets.Pair]]:
    """Drawn images with their nearest training images, sheet by sheet, the nearest first.

    Of the nearest by features and by pixels, the one with the smaller ratio is shown; without ratios, by features.
    """
    nearest, train = results.nearest, results.train
    assert nearest is not None
    assert train is not None
    scores = nearest.distances[:1] if nearest.ratios is None else nearest.ratios
    kinds, order = np.argmin(scores, 0), np.argsort(scores.min(0), kind="stable")[:count]
    for start in range(0, len(order), sheets.PAIRS):
        page = []
        for i in order[start : start + sheets.PAIRS]:
            k = int(kinds[i])
            record = source.read(int(train.index[nearest.rows[k, i]]))
            text = f"{scores[k, i]:.2f} {measures.KINDS[k]}: {images.prompts[i]}"
            page.append(sheets.Pair(read_rgb(images.paths[i]), read_rgb(record.image), text))
        yield page


def image_rows(images: Images) -> list[tuple[str, list[Any]]]:
    """The rows of the image sheet: the first prompts with their first images."""
    rows: dict[str, list[Any]] = {}
    for path, prompt in zip(images.paths, images.prompts, strict=True):
        if prompt in rows or len(rows) < sheets.ROWS:
            row_images = rows.setdefault(prompt, [])
            if len(row_images) < sheets.IMAGES:
                row_images.append(read_rgb(path))
    return list(rows.items())


def write(work: Path, images: Images, results: Results, source: Source | None, f: flags.FlagValues, text: str) -> None:
    """Write all files of the report into the folder `work`.

    Args:
        source: the training images; None without --data.
    """
    with writing_report(work):
        for stale in work.glob("pairs-*.png"):  # of an interrupted run
            stale.unlink()
    write_png(work / "images.png", sheets.image_sheet(image_rows(images)))
    if source is not None and results.nearest is not None:
        for number, page in enumerate(pairs(images, results, source, f.pairs)):
            write_png(work / f"pairs-{number:02d}.png", sheets.pair_sheet(page))
    lines = "".join(json.dumps(image_record(i, images, results, source)) + "\n" for i in range(len(images)))
    values = report.as_json(results.rows, results.notes, settings(f))
    with writing_report(work):
        (work / "images.jsonl").write_text(lines, encoding="utf-8")
        (work / "report.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (work / "report.md").write_text(text, encoding="utf-8")


def settings(f: flags.FlagValues) -> dict[str, Any]:
    """The flags that say what was measured."""
    hidden: tuple[str, ...] = ("verbose", "help", "h", "overwrite", "cache_dir", "output", "features", "threads")
    hidden += (() if f.images is None else without_drawing(f)) + (DATA_FLAGS if f.data is None else ())
    values = {name: value for name, value in sorted(f.flag_values_dict().items()) if name not in hidden}
    return {"jaxdiff": __version__, **{name: value for name, value in values.items() if value not in (None, "")}}


def publish(work: Path, output: Path, overwrite: bool) -> None:
    """Rename the finished report to its final name; an existing report is replaced only then."""
    old = output.with_name(f".{output.name}.old")
    with writing(f"--output {output}", Failure, f"the report is in {work}; move it."):
        if overwrite:
            if output.exists():
                shutil.rmtree(old, ignore_errors=True)
            replace_folder(output, work, old)
        else:
            work.rename(output)
    (output / SETTINGS).unlink(missing_ok=True)  # last, so that a failed run can resume
    shutil.rmtree(old, ignore_errors=True)
