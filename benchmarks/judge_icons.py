"""How often a model draws the thing, style, colour and background that a prompt names, and how varied its images are.

    python -m benchmarks.judge_icons --model icons --output runs/judge/icons [--steps 20] [--guidance_scale 2]
    python -m benchmarks.judge_icons --images runs/judge/icons/images --output runs/judge/again
    python -m benchmarks.judge_icons --model icons --output runs/judge/icons --kinds "" --reconstructions

Draws the prompts of `icons_prompts.json` with fixed seeds, or takes images drawn before, and writes report.json,
report.md, the images, and a sheet of them for each kind. Nothing is chosen among the images.

- thing: the image is ranked among subjects by its likeness to real drawings of each; right is rank 1. The drawings are
  those of galleries that no model here is trained on (see judge_drawings.py).
- style, colour: what a probe fitted on real drawings of data/icons takes the image for (judge_probes.py).
- background: the named colour that the mean of the border pixels is nearest to.
- variety: mean distance between images of one prompt, over that between drawings of the thing by five designers. Images
  of wrong things and blots vary as well: read it beside the share of right things.

Each measure is given for real drawings (the most a model could reach) and for shuffled prompts (the least). Networks
and galleries are for measuring only, and their licences stand in judge_features.py and judge_drawings.py. Needs
data/icons, npm, and the packages that judge_features.py names; features of real drawings are kept in runs/judge_cache.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import jaxdiff
from benchmarks.judge_features import Images
from benchmarks.judge_prompts import KINDS, Request, requests
from benchmarks.judge_reconstructions import reconstructions
from benchmarks.judge_report import markdown, sheet
from benchmarks.judge_scores import Judge
from jaxdiff.io.cache import cache_compilations

BATCH = 16


def draw(model, params, requests: Sequence[Request], **settings) -> Images:
    """The images of requests, in batches of one size; the last one is padded with its last request."""
    images = []
    for start in range(0, len(requests), BATCH):
        batch = list(requests[start : start + BATCH])
        padded = batch + batch[-1:] * (BATCH - len(batch))
        generated = jaxdiff.generate(
            model,
            params,
            [request.prompt for request in padded],
            seed=[request.seed for request in padded],
            **settings,
        )
        images.append(generated[: len(batch)])
    return np.concatenate(images)


def save_images(folder: Path, images: Images) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def read_images(folder: Path, count: int) -> Images:
    """The images that `save_images` wrote."""
    paths = [folder / f"{i:03d}.png" for i in range(count)]
    if missing := [path for path in paths if not path.exists()]:
        raise SystemExit(f"{missing[0]} is missing: {folder} must hold {count} images, 000.png and so on.")
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="icons", help="bundled name or folder of the model")
    parser.add_argument("--output", type=Path, required=True, help="folder of the report, images and sheets")
    parser.add_argument("--images", type=Path, help="folder of images drawn before, instead of drawing")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which prompts, separated by commas")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, help="default: the model's own")
    parser.add_argument("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="sigma / alpha")
    parser.add_argument("--data", type=Path, default=Path("data/icons"), help="the icons set")
    parser.add_argument("--reconstructions", action="store_true", help="judge the model's autoencoder, too")
    parser.add_argument("--threads", type=int, default=1, help="of the networks that judge")
    args = parser.parse_args()
    args.kinds = [kind for kind in args.kinds.split(",") if kind]
    if unknown := sorted(set(args.kinds) - set(KINDS)):
        parser.error(f"--kinds: unknown {', '.join(unknown)}; the known ones are {', '.join(KINDS)}.")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    cache_compilations()
    settings = {name: getattr(args, name) for name in ("steps", "guidance_scale", "guidance_interval")}
    report: dict = {"model": args.model, **settings, "kinds": {}}
    if args.images:
        report["images"] = str(args.images)
    if args.reconstructions or (args.kinds and not args.images):
        model, params = jaxdiff.load(args.model)
    judge = Judge(args.data)
    for kind in args.kinds:
        start_time, kind_requests = time.monotonic(), requests(kind)
        if args.images:
            images = read_images(args.images / kind, len(kind_requests))
        else:
            images = draw(model, params, kind_requests, **settings)
            save_images(args.output / "images" / kind, images)
        args.output.mkdir(parents=True, exist_ok=True)
        sheet(kind, images, kind_requests).save(args.output / f"{kind}.png")
        draw_end = time.monotonic()
        if kind != "look":
            report["kinds"][kind] = judge(kind, images, kind_requests)
        write(args.output, report)
        print(
            f"{kind}: {draw_end - start_time:.0f} s to draw, {time.monotonic() - draw_end:.0f} s to judge", flush=True
        )
    if args.reconstructions:
        report["reconstructions"] = reconstructions(model, params, judge, args.data)
    write(args.output, report)
    print(markdown(report))


def write(output: Path, report: dict) -> None:
    """The report so far: a run that is stopped leaves the kinds that it has done."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "report.md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
