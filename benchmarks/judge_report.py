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
    for kind, found in report["kinds"].items():
        for name, row in found["measures"].items():
            cells = [percent(row.get(column)) for column in ("model", "real", "floor")]
            lines.append(f"| {kind} | {row['model']['count']} | {name} | {' | '.join(cells)} |")
    plain = report["kinds"].get("plain")
    if plain:
        each = ", ".join(f"{name} {percent(value)}" for name, value in plain["galleries"].items())
        lines += [
            "",
            f"Drawings of each gallery among the other two: {each}; blurred drawings {percent(plain['blurred'])}.",
        ]
    for kind, found in report["kinds"].items():
        if "confusion" in found:
            lines += ["", f"Asked for a {kind}, and found:", *_confusion(found["confusion"])]
    if "reconstructions" in report:
        lines += _reconstructions(report["reconstructions"])
    return "\n".join(lines) + "\n"


def _confusion(table: dict[str, dict[str, int]]) -> list[str]:
    lines = ["", "| asked | right | found most |", "|---|---|---|"]
    for asked, found in table.items():
        most = ", ".join(f"{name} {count}" for name, count in list(found.items())[:4])
        lines.append(f"| {asked} | {found.get(asked, 0)} of {sum(found.values())} | {most} |")
    return lines


def _reconstructions(found: dict) -> list[str]:
    lines = ["", "| real drawings | right thing, originals | right thing, through the autoencoder |", "|---|---|---|"]
    for source, row in found["things"].items():
        lines.append(f"| {source} | {percent(row['originals'])} | {percent(row['reconstructions'])} |")
    lines += ["", "| style, subjects held out | right style, originals | through the autoencoder |", "|---|---|---|"]
    for name, row in found["styles"].items():
        lines.append(f"| {name} | {percent(row['originals'])} | {percent(row['reconstructions'])} |")
    lines += ["", "| style, subjects held out | images | PSNR |", "|---|---|---|"]
    return lines + [f"| {name} | {row['count']} | {row['mean']:.1f} dB |" for name, row in found["psnr"].items()]


def sheet(kind: str, images: Images, wanted: Sequence[Request]) -> Image.Image:
    """All images of a kind with their prompts; of the plain ones the first of each of the first prompts."""
    shown = list(zip(images, wanted, strict=True))
    if kind == "plain":
        shown = shown[:: SEEDS["plain"]][:SHOWN]
    across, (height, width) = columns(kind), images.shape[1:3]
    down = -(-len(shown) // across)
    paper = Image.new("RGB", (across * (width + GAP) + GAP, down * (height + LABEL + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(size=10)
    for i, (image, request) in enumerate(shown):
        x, y = GAP + i % across * (width + GAP), GAP + i // across * (height + LABEL + GAP)
        paper.paste(Image.fromarray(np.ascontiguousarray(image)), (x, y))
        text = request.prompt
        while pen.textlength(text, font=font) > width:
            text = f"{text[:-2]}…"
        pen.text((x, y + height), text, "black", font)
    return paper
