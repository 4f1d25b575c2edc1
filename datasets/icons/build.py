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
from datasets.icons.lexicon import read_lexicon
from datasets.icons.sources import PAINTINGS, STYLES, WORDS_PACKAGE, Source
from datasets.icons.splits import SPLITS
from datasets.icons.variants import ImageSpec, image_specs
from jaxdiff.files import write_text

RECIPE = 1  # raised when a drawing's pixels change, so that images of different recipes never mix
CC_BY = "https://creativecommons.org/licenses/by/{}/"


def build(
    out: Path, cache: Path, sources: Sequence[Source], size: int = 128, processes: int = 2, flags: bool = False
) -> Counter:
    """Build the set in `out`, keeping existing images. Returns the number of images by split.

    Args:
        out: folder of the set; created if missing.
        cache: folder of the fetched packages.
        sources: what to draw.
        size: side of the images in pixels.
        processes: number of processes that draw.
        flags: whether to include flags of countries.

    Raises:
        BuildError: something cannot be fetched or read, or `out` holds a set of another size.
    """
    _claim(out, size)
    lexicon = read_lexicon(cache)
    drawings: list[Drawing] = []
    for source in sources:
        try:
            folder = _fetch(source, cache)
        except Unavailable as error:
            logging.warning("%s", error)
            continue
        drawings += read_drawings(source, folder, lexicon, flags)
    planned = [(drawing, image_specs(drawing)) for drawing in drawings]
    _draw([job for drawing, specs in planned if (job := _job(out, drawing, specs, size))], processes)
    existing = [spec for _, specs in planned for spec in specs if _path(out, spec).exists()]
    if not existing:
        raise BuildError(f"No image could be drawn into {out}: see the warnings above.")
    for split in SPLITS:
        _write_metadata(out / split, [spec for spec in existing if spec.split == split])
    used_sources = [source for source in sources if any(drawing.source == source for drawing in drawings)]
    write_text(out / "LICENSES.md", licenses(used_sources, existing))
    return Counter(spec.split for spec in existing)


def _claim(out: Path, size: int) -> None:
    """Mark `out` as a set of this size and recipe. Raises BuildError if it holds one of another."""
    marker, requested = out / "build.json", {"size": size, "recipe": RECIPE}
    try:
        out.mkdir(parents=True, exist_ok=True)
        stored = json.loads(marker.read_text()) if marker.exists() else requested
    except (OSError, ValueError) as error:
        raise BuildError(f"--out {out} cannot be used ({error}): give another folder.") from error
    if stored != requested:
        raise BuildError(
            f"--out {out} holds a set built with {stored}, not {requested}: delete it or give another folder."
        )
    write_text(marker, json.dumps(requested) + "\n")


def _fetch(source: Source, cache: Path) -> Path:
    if source.kind == "openclipart":
        return debian_package(source.package, cache)
    return npm_package(source.package, source.version, cache)


def _path(out: Path, spec: ImageSpec) -> Path:
    return out / spec.split / spec.file_name


def _job(out: Path, drawing: Drawing, specs: Iterable[ImageSpec], size: int) -> render.Job | None:
    """The job that draws a drawing's missing images; None if none is missing."""
    missing = [spec for spec in specs if not _path(out, spec).exists()]
    outputs = tuple(render.Output(_path(out, spec), spec.color, spec.effect) for spec in missing)
    return render.Job(drawing.svg, drawing.path, drawing.source.trim, size, outputs) if outputs else None


def _draw(jobs: list[render.Job], processes: int) -> None:
    """Draw the jobs, with a progress bar on a terminal. Broken and blank drawings are counted, and listed at -v=1."""
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


def _write_metadata(folder: Path, specs: list[ImageSpec]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(spec.row(), ensure_ascii=False) for spec in specs]
    write_text(folder / "metadata.jsonl", "".join(f"{line}\n" for line in lines))


def licenses(sources: Sequence[Source], specs: Sequence[ImageSpec]) -> str:
    """The text of LICENSES.md: every source's version, licence and count, and the credit that CC-BY asks for."""
    counts = Counter(spec.source for spec in specs)
    rows: list[tuple[object, ...]] = [
        (s.name, s.package, s.version, s.license, counts[s.name], f"{s.author} ({s.url})") for s in sources
    ]
    words = WORDS_PACKAGE
    rows.append(("words in captions", words["package"], words["version"], words["license"], "-", words["author"]))
    effects = ", ".join(style.name for style in (*PAINTINGS.values(), STYLES["silhouette"]))
    lines = [
        "# Sources and licences of the icons set",
        "",
        "| source | package | version | licence | images | author |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
        "",
        f"Images in these styles are made from drawings of the same source by effects: {effects}.",
        "Images with a `color` in the metadata are recoloured drawings.",
    ]
    if credits := [
        f"- “{s.package}”: drawings by {s.author} ({s.url}), under CC BY {version} ({CC_BY.format(version)}), scaled "
        "and rendered."
        for s in sources
        if (version := s.license.removeprefix("CC-BY-")) != s.license
    ]:
        sentence = "Repeat these wherever you give away the images or a model trained on them:"
        lines += ["", "## Credits", "", sentence, "", *credits]
    return "\n".join(lines) + "\n"
