"""Building the set: fetch, plan, draw in parallel, and write the metadata and the licence list."""

import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import logging
from rich.console import Console
from rich.progress import track

from datasets.icons import render
from datasets.icons.drawings import Drawing, read_drawings
from datasets.icons.fetch import BuildError, Unavailable, debian_package, npm_package
from datasets.icons.lexicon import Lexicon
from datasets.icons.plan import Picture, pictures
from datasets.icons.sources import PAINTINGS, SILHOUETTE, WORDS_PACKAGE, WORDS_VERSION, Source
from datasets.icons.splits import SPLITS

RECIPE = 1  # raised whenever the same drawing gives other pixels, so that old and new ones never mix


def build(
    out: Path, cache: Path, sources: Sequence[Source], size: int = 128, processes: int = 2, flags: bool = False
) -> Counter:
    """Build the set in `out`; pictures that are already there are kept. Returns the number of pictures by split.

    Args:
        out: folder of the set; made if need be.
        cache: folder of the fetched packages.
        sources: what to draw.
        size: side of the pictures in pixels.
        processes: how many draw at once.
        flags: whether flags of countries are wanted.

    Raises:
        BuildError: something cannot be fetched or read, or `out` holds a set of another size.
    """
    _claim(out, size)
    lexicon = Lexicon(npm_package(WORDS_PACKAGE, WORDS_VERSION, cache))
    drawings: list[Drawing] = []
    for source in sources:
        try:
            folder = _fetch(source, cache)
        except Unavailable as error:
            logging.warning("%s", error)
            continue
        drawings += read_drawings(source, folder, lexicon, flags)
    planned = [(drawing, pictures(drawing)) for drawing in drawings]
    _draw([job for drawing, wanted in planned if (job := _job(out, drawing, wanted, size))], processes)
    made = [picture for _, wanted in planned for picture in wanted if _path(out, picture).exists()]
    if not made:
        raise BuildError(f"No picture could be drawn into {out}: see the warnings above.")
    for split in SPLITS:
        _write_metadata(out / split, [picture for picture in made if picture.split == split])
    used = [source for source in sources if any(drawing.source == source for drawing in drawings)]
    write_atomically(out / "LICENSES.md", licenses(used, made))
    return Counter(picture.split for picture in made)


def _claim(out: Path, size: int) -> None:
    """Mark `out` as a set of this size and recipe, or refuse one of another."""
    marker, mine = out / "build.json", {"size": size, "recipe": RECIPE}
    try:
        out.mkdir(parents=True, exist_ok=True)
        theirs = json.loads(marker.read_text()) if marker.exists() else mine
    except (OSError, ValueError) as error:
        raise BuildError(f"--out {out} cannot be used ({error}): give another folder.") from error
    if theirs != mine:
        raise BuildError(f"--out {out} holds a set built with {theirs}, not {mine}: delete it or give another folder.")
    write_atomically(marker, json.dumps(mine) + "\n")


def _fetch(source: Source, cache: Path) -> Path:
    if source.kind == "openclipart":
        return debian_package(source.package, cache)
    return npm_package(source.package, source.version, cache)


def _path(out: Path, picture: Picture) -> Path:
    return out / picture.split / picture.file_name


def _job(out: Path, drawing: Drawing, wanted: Iterable[Picture], size: int) -> render.Job | None:
    """What remains to be drawn of a drawing; None when all is there."""
    missing = [picture for picture in wanted if not _path(out, picture).exists()]
    outputs = tuple(render.Output(_path(out, picture), picture.color, picture.effect) for picture in missing)
    return render.Job(drawing.svg, drawing.path, drawing.source.trim, size, outputs) if outputs else None


def _draw(jobs: list[render.Job], processes: int) -> None:
    """Draw the jobs, with a progress bar on a terminal; the broken and blank ones are counted, and named at -v=1."""
    if not jobs:
        return
    processes = min(processes, len(jobs), os.cpu_count() or 1)
    # "spawn": the parent has threads of JAX, which do not survive a fork.
    pool = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None
    try:
        done = pool.imap_unordered(render.write, jobs, chunksize=8) if pool else map(render.write, jobs)
        quiet = not sys.stderr.isatty()
        bar = track(done, "Drawing", total=len(jobs), console=Console(stderr=True), disable=quiet)
        failures = [failure for failure in bar if failure]
    finally:
        if pool:
            pool.terminate()
    for failure in failures:
        logging.vlog(1, "left out: %s", failure)
    if failures:
        logging.warning("%d of %d drawings are broken or blank and were left out.", len(failures), len(jobs))


def _write_metadata(folder: Path, found: list[Picture]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(picture.row(), ensure_ascii=False) for picture in found]
    write_atomically(folder / "metadata.jsonl", "".join(f"{line}\n" for line in lines))


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def licenses(sources: Sequence[Source], made: Sequence[Picture]) -> str:
    """The text of LICENSES.md: every source's version, licence and count, and the credit that CC-BY asks for."""
    counts = Counter(picture.source for picture in made)
    lines = [
        "# Sources and licences of the icons set",
        "",
        "| source | package | version | licence | pictures | author |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for s in sources:
        lines.append(
            f"| {s.name} | {s.package} | {s.version} | {s.license} | {counts[s.name]} | {s.author} ({s.url}) |"
        )
    lines.append(f"| words in captions | {WORDS_PACKAGE} | {WORDS_VERSION} | MIT | - | Miles Johnson |")
    painted = ", ".join(style.name for style in (*PAINTINGS.values(), SILHOUETTE))
    lines += ["", f"Pictures in these styles are made from drawings of the same source by filters: {painted}."]
    lines += ["Pictures with a `color` in the metadata are drawings that were recoloured.", ""]
    credited = [source for source in sources if source.license.startswith("CC-BY")]
    if credited:
        lines += [
            "## Credits",
            "",
            "To be repeated wherever the pictures, or a model trained on them, are given away:",
            "",
        ]
    for s in credited:
        url = "https://creativecommons.org/licenses/by/4.0/"
        lines.append(
            f"- “{s.package}”: drawings by {s.author} ({s.url}), under CC BY 4.0 ({url}), scaled and rendered."
        )
    return "\n".join(lines).rstrip() + "\n"
