"""What `judge_icons` found, as Markdown and as sheets of images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.judge_features import Images
from benchmarks.judge_prompts import SEEDS, SHOWN, Request, columns

LABEL, GAP = 14, 4  # pixels


def percent(value: dict[str, float] | None) -> str:
    """A share with its standard error.

    >>> percent({"mean": 0.42, "error": 0.051, "count": 160})
    '42.0 ± 5.1 %'
    """
    return f"{100 * value['mean']:.1f} ± {100 * value['error']:.1f} %" if value else "-"


def markdown(report: dict) -> str:
    """The tables of a report."""
    lines = [f"{report['model']}, {report['steps']} steps, guidance {report['guidance_scale'] or 'of the model'}.", ""]
    lines += ["| prompts | images | measure | model | real drawings | shuffled prompts |", "|---|---|---|---|---|---|"]
    for kind, results in report["kinds"].items():
        for name, row in results["measures"].items():
            cells = [percent(row.get(column)) for column in ("model", "real", "floor")]
            lines.append(f"| {kind} | {row['model']['count']} | {name} | {' | '.join(cells)} |")
    plain = report["kinds"].get("plain")
    if plain:
        galleries = ", ".join(f"{name} {percent(value)}" for name, value in plain["galleries"].items())
        lines += [
            "",
            f"Drawings of each gallery among the other two: {galleries}; blurred drawings {percent(plain['blurred'])}.",
        ]
    for kind, results in report["kinds"].items():
        if "confusion" in results:
            lines += ["", f"Asked for a {kind}, and found:", *_confusion(results["confusion"])]
    if "reconstructions" in report:
        lines += _reconstructions(report["reconstructions"])
    return "\n".join(lines) + "\n"


def _confusion(table: dict[str, dict[str, int]]) -> list[str]:
    lines = ["", "| asked | right | found most |", "|---|---|---|"]
    for label, counts in table.items():
        most_frequent = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:4])
        lines.append(f"| {label} | {counts.get(label, 0)} of {sum(counts.values())} | {most_frequent} |")
    return lines


def _reconstructions(results: dict) -> list[str]:
    lines = ["", "| real drawings | right thing, originals | right thing, through the autoencoder |", "|---|---|---|"]
    for source, row in results["things"].items():
        lines.append(f"| {source} | {percent(row['originals'])} | {percent(row['reconstructions'])} |")
    lines += ["", "| style, subjects held out | right style, originals | through the autoencoder |", "|---|---|---|"]
    for name, row in results["styles"].items():
        lines.append(f"| {name} | {percent(row['originals'])} | {percent(row['reconstructions'])} |")
    lines += ["", "| style, subjects held out | images | PSNR |", "|---|---|---|"]
    return lines + [f"| {name} | {row['count']} | {row['mean']:.1f} dB |" for name, row in results["psnr"].items()]


def sheet(kind: str, images: Images, requests: Sequence[Request]) -> Image.Image:
    """All images of a kind with their prompts; of the plain ones the first of each of the first prompts."""
    pairs = list(zip(images, requests, strict=True))
    if kind == "plain":
        pairs = pairs[:: SEEDS["plain"]][:SHOWN]
    num_columns, (height, width) = columns(kind), images.shape[1:3]
    num_rows = -(-len(pairs) // num_columns)
    canvas = Image.new("RGB", (num_columns * (width + GAP) + GAP, num_rows * (height + LABEL + GAP) + GAP), "white")
    drawing, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
    for i, (image, request) in enumerate(pairs):
        x, y = GAP + i % num_columns * (width + GAP), GAP + i // num_columns * (height + LABEL + GAP)
        canvas.paste(Image.fromarray(np.ascontiguousarray(image)), (x, y))
        text = request.prompt
        while drawing.textlength(text, font=font) > width:
            text = f"{text[:-2]}…"
        drawing.text((x, y + height), text, "black", font)
    return canvas
