"""Models of one step, of a few and of many beside each other: a grid of the same prompts, seconds an image, measures.

    python -m benchmarks.compare_few_steps --output runs/compare --entry gan=runs/gan/export \
        --entry distilled=runs/few_steps/export@1,2,4 --entry diffusion=icons@10,25,50

An entry is name=model@steps, the steps of a GAN left out. Writes into --output: few_steps.md, which may be pasted into
the docs, the grid few_steps.webp, report.json, and the images of each column. After a kill the same command goes on.

- Prompts are the plain ones of `icons_prompts.json`, each with two seeds, or those of --prompts, a line each.
- Seconds and CPU seconds an image are of batches of --batch_size, after one that compiles.
- Agreement and variety are those of `python -m jaxdiff.evaluation` by --encoder; with --data its distance to real
  images and its originality too. Without an encoder they are left out.
- --judge adds the share of right things by the galleries' judge, with its requirements (judge_icons.py).
"""

import argparse
import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import jaxdiff
from benchmarks.judge_prompts import Request, requests
from jaxdiff.io.cache import cache_compilations
from jaxdiff.io.images import read_image, write_png

# The evaluation's rows that are shown: (part, name) -> the table's heading.
SHOWN = {
    ("agreement", "clip_score"): "CLIP score",
    ("agreement", "rank_1"): "own prompt first",
    ("variety", "distance"): "variety",
    ("distance", "kernel"): "kernel distance",
    ("originality", "features_near_copies"): "near copies",
}
LABEL, GAP = 14, 4  # pixels of the grid


class Column(NamedTuple):
    """One model at one number of steps."""

    name: str
    model: str  # bundled name or folder
    steps: int | None  # None: the model's own, which is 1 of a GAN

    @property
    def label(self) -> str:
        return self.name if self.steps is None else f"{self.name}, {self.steps} step{'s' * (self.steps > 1)}"

    @property
    def folder(self) -> str:
        return re.sub(r"[\W_]+", "-", self.label.lower()).strip("-")


def columns_of(entry: str) -> list[Column]:
    """The columns that an entry asks for.

    >>> [column.label for column in columns_of("distilled=runs/few/export@1,4")]
    ['distilled, 1 step', 'distilled, 4 steps']
    >>> columns_of("gan=runs/gan/export")
    [Column(name='gan', model='runs/gan/export', steps=None)]
    """
    name, equals, value = entry.partition("=")
    model, separator, steps = value.rpartition("@")
    if not separator:
        model, steps = value, ""
    if not (name and equals and model and re.fullmatch(r"(\d+(,\d+)*)?", steps)):
        raise ValueError(f"--entry {entry} must be name=model, or name=model@steps such as diffusion=icons@10,25.")
    return [Column(name, model, int(n) if n else None) for n in steps.split(",")]


def image_requests(prompts: Path | None, count: int) -> list[Request]:
    """The images of each column: those of the first `count` prompts, two seeds each; 0 for all."""
    if prompts is None:
        all_requests = requests("plain")
    else:
        lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        all_requests = [Request(line, 2 * i + k, line) for i, line in enumerate(lines) for k in range(2)]
    names = list(dict.fromkeys(request.prompt for request in all_requests))
    prompts_kept = set(names[: count or len(names)])
    return [request for request in all_requests if request.prompt in prompts_kept]


def draw(column: Column, requests: Sequence[Request], folder: Path, batch: int) -> dict[str, float]:
    """Draw a column's images into a folder with their prompts; the seconds of one."""
    model, params = jaxdiff.load(column.model)
    options: dict[str, Any] = {} if column.steps is None else {"steps": column.steps}

    def generate(batch_requests: Sequence[Request]) -> np.ndarray:
        full = [*batch_requests, *[batch_requests[-1]] * (batch - len(batch_requests))]
        prompts, seeds = [request.prompt for request in full], [request.seed for request in full]
        return jaxdiff.generate(model, params, prompts, seed=seeds, **options)[: len(batch_requests)]

    generate(requests[:batch])  # compiles
    images, wall, cpu = [], time.perf_counter(), time.process_time()
    for start in range(0, len(requests), batch):
        images += list(generate(requests[start : start + batch]))
    padded = -(-len(requests) // batch) * batch
    seconds = {"wall": (time.perf_counter() - wall) / padded, "cpu": (time.process_time() - cpu) / padded}
    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, request) in enumerate(zip(images, requests, strict=True)):
        write_png(folder / f"{i:04d}.png", image, {"prompt": request.prompt, "seed": request.seed})
    return seconds


def evaluate(folder: Path, output: Path, encoder: str, data: str | None, held_out: str | None) -> dict[str, Any]:
    """What `python -m jaxdiff.evaluation` finds of images, by heading."""
    from jaxdiff.evaluation import command

    if not (output / "report.json").is_file():
        flags = [] if data is None else [f"--data={data}"]
        flags += [] if held_out is None else [f"--held_out_split={held_out}"]
        code = command.main(["evaluation", f"--images={folder}", f"--encoder={encoder}", f"--output={output}", *flags])
        if code:
            raise SystemExit(code)
    measures = json.loads((output / "report.json").read_text(encoding="utf-8"))["measures"]
    return {title: measures[part][name] for (part, name), title in SHOWN.items() if name in measures.get(part, {})}


def judge_things(folder: Path, requests: Sequence[Request], data: Path) -> dict[str, dict]:
    """The judge's share of right things among a column's images."""
    from benchmarks.judge_scores import Judge

    images = np.stack([read_image(folder / f"{i:04d}.png") for i in range(len(requests))])
    measures = Judge(data)("plain", images, requests)["measures"]
    return {name: row["model"] for name, row in list(measures.items())[:1]}


def cell(measure: dict[str, Any] | None) -> str:
    """A measure with its standard error."""
    if measure is None:
        return "–"
    value, error = measure.get("value", measure.get("mean")), measure.get("error")
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.2g}"


def markdown(report: dict[str, Any], image: str) -> str:
    """The page: what was drawn, the grid, and a row a column."""
    titles = list(dict.fromkeys(title for row in report["columns"] for title in row["measures"]))
    head = ["model", "steps", "seconds an image", "CPU seconds", *titles]
    lines = [
        f"{report['images']} images of {report['prompts']} prompts by each, in batches of {report['batch_size']}.",
        "",
        f"![The same prompts by each]({image})",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in report["columns"]:
        cells = [cell(row["measures"].get(title)) for title in titles]
        seconds = [f"{row['seconds'][name]:.3g}" for name in ("wall", "cpu")]
        lines.append(f"| {' | '.join([row['name'], str(row['steps'] or 1), *seconds, *cells])} |")
    return "\n".join(lines) + "\n"


def grid(folders: Sequence[Path], labels: Sequence[str], requests: Sequence[Request], rows: int) -> Image.Image:
    """A row for each of the first prompts, a column for each model."""
    shown_prompts = list({request.prompt: i for i, request in reversed(list(enumerate(requests)))}.items())[::-1][:rows]
    height, width = read_image(folders[0] / "0000.png").shape[:2]
    row_height, column_width = height + LABEL + GAP, width + GAP
    size = column_width * len(folders) + GAP, row_height * len(shown_prompts) + LABEL + GAP
    canvas = Image.new("RGB", size, "white")
    drawing, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
    for x, (folder, label) in enumerate(zip(folders, labels, strict=True)):
        drawing.text((GAP + x * column_width, 0), label, "black", font)
        for y, (prompt, i) in enumerate(shown_prompts):
            corner = GAP + x * column_width, LABEL + y * row_height
            canvas.paste(Image.fromarray(read_image(folder / f"{i:04d}.png")), corner)
            if not x:
                drawing.text((corner[0], corner[1] + height), prompt, "black", font)
    return canvas


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", action="append", required=True, help="name=model@steps; may be given again")
    parser.add_argument("--output", type=Path, required=True, help="folder of the page, the grid and the images")
    parser.add_argument("--prompts", type=Path, help="a file of prompts; default: the judge's plain ones")
    parser.add_argument("--count", type=int, default=0, help="only the first prompts; 0: all")
    parser.add_argument("--rows", type=int, default=8, help="prompts in the grid")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--encoder", help="CLIP that measures, as of python -m jaxdiff.evaluation")
    parser.add_argument("--data", help="the images that the models have learned from, such as data/icons")
    parser.add_argument("--held_out_split", help="of --data, for originality, such as heldout_subjects")
    parser.add_argument("--judge", action="store_true", help="also ask the galleries' judge; needs --data")
    args = parser.parse_args(argv)
    try:
        args.columns = [column for entry in args.entry for column in columns_of(entry)]
    except ValueError as e:
        parser.error(str(e))
    if args.judge and (args.prompts or not args.data):
        parser.error("--judge needs --data, and knows the prompts of icons_prompts.json alone: leave --prompts out.")
    if args.data and not (args.encoder or args.judge):
        parser.error("--data goes with --encoder or --judge: give one of them too.")
    if len({column.folder for column in args.columns}) < len(args.columns):
        parser.error("--entry: two columns have the same name and steps.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    cache_compilations()
    requests = image_requests(args.prompts, args.count)
    report: dict[str, Any] = {"images": len(requests), "prompts": len({request.prompt for request in requests}),
                              "batch_size": args.batch_size, "columns": []}  # fmt: skip
    folders = [args.output / column.folder for column in args.columns]
    for column, folder in zip(args.columns, folders, strict=True):
        cache_file, settings = folder / "seconds.json", [*column, args.batch_size, requests]
        cached = json.loads(cache_file.read_text(encoding="utf-8")) if cache_file.is_file() else {}
        if cached.get("asked") != json.loads(json.dumps(settings)):
            shutil.rmtree(folder, ignore_errors=True)  # of other prompts, or not finished
            cached = {"asked": settings, "seconds": draw(column, requests, folder / "images", args.batch_size)}
            cache_file.write_text(json.dumps(cached), encoding="utf-8")
        row: dict[str, Any] = {"name": column.name, "steps": column.steps, "seconds": cached["seconds"], "measures": {}}
        if args.encoder:
            row["measures"] |= evaluate(
                folder / "images", folder / "report", args.encoder, args.data, args.held_out_split
            )
        if args.judge:
            row["measures"] |= judge_things(folder / "images", requests, Path(args.data))
        report["columns"].append(row)
        print(f"{column.label}: {row['seconds']['wall']:.3g} s an image", flush=True)
    images = [folder / "images" for folder in folders]
    labels = [column.label for column in args.columns]
    grid(images, labels, requests, args.rows).save(args.output / "few_steps.webp", quality=90)
    text = markdown(report, "few_steps.webp")
    (args.output / "few_steps.md").write_text(text, encoding="utf-8")
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
