"""What autoencoders make of images that none of them has learned from: PSNR, SSIM, a distance of features, and a sheet.

    python -m benchmarks.judge_decoders --models icons runs/decoder/export --data data/icons --images photographs/ \
        --output runs/decoders

Prints a row for each model and kind of image: PSNR and SSIM (Wang et al. 2004) in RGB, means over images, and 1 - the
cosine of features by two ImageNet networks (see judge_features.py). Into the folder --output go the images and what
each model makes of them, side by side at full size: the image, then a column a model.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import jaxdiff
from benchmarks.bench_upscale import psnr, ssim
from benchmarks.judge_drawings import read, rows, sample_rows
from benchmarks.judge_features import Images, features
from benchmarks.judge_reconstructions import reconstruct
from jaxdiff.evaluation.encoder import square
from jaxdiff.io.images import write_png

SIDE = 256  # of photographs: their middle squares, made so small
SHOWN = 8  # images in a sheet


def distance(first: Images, second: Images) -> np.ndarray:
    """1 - cosine of the features of each pair: [N]."""
    pairs = [features(x).reshape(len(x), 2, -1) for x in (first, second)]  # of unit length for each network
    return 1 - (pairs[0] * pairs[1]).sum(-1).mean(-1)


def photographs(folder: Path) -> Images:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(square(image.convert("RGB"), SIDE))
    return np.stack(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--data", type=Path, help="the icons set, of which subjects held out are taken")
    parser.add_argument("--count", type=int, default=96, help="icons, at most")
    parser.add_argument("--images", type=Path, help="a folder of photographs")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    kinds = {}
    if args.data:
        kinds["icons"] = read(sample_rows(rows(args.data, "heldout_subjects"), args.count))
    if args.images:
        kinds["photographs"] = photographs(args.images)
    args.output.mkdir(parents=True, exist_ok=True)
    print("| images | model | PSNR, dB | SSIM | feature distance |\n|---|---|---|---|---|")
    columns = {kind: [images[:SHOWN]] for kind, images in kinds.items()}
    for name in args.models:
        model, params = jaxdiff.load(name)
        for kind, images in kinds.items():
            reconstructed = reconstruct(model, params, images)
            columns[kind].append(reconstructed[:SHOWN])
            values = (psnr(images, reconstructed), ssim(images, reconstructed), distance(images, reconstructed))
            quality = " | ".join(f"{v.mean():.{digits}f}" for v, digits in zip(values, (2, 4, 4), strict=True))
            print(f"| {kind} ({len(images)}) | {name} | {quality} |", flush=True)
    for kind, images_shown in columns.items():
        sheet = np.concatenate([np.concatenate(list(x), 0) for x in images_shown], 1)
        write_png(args.output / f"{kind}.png", sheet)


if __name__ == "__main__":
    main()
