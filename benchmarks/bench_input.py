"""How fast the input is by itself, and how long a training step waits for it.

    python -m benchmarks.bench_input [--images=256]

Synthetic JPEG images of 512 px (smooth noise, quality 90, 640 x 512) are written as a captioned folder, tar shards
and Parquet. Each is read shuffled for two epochs; the first warms up the disk's cache. Then an
autoencoder's encoder of the bundled model takes the images batch after batch, as latent diffusion does: what passes
before a batch is there is waiting. Prints Markdown.
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import jaxdiff
from jaxdiff.data.captioned import captioned_data, open_source

SIDE, BATCH, STEPS = 512, 8, 6


def jpeg(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((640, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def write(root: Path, images: list[bytes]) -> dict[str, Path]:
    """The same images as every kind of data."""
    lines = [{"file_name": f"{i}.jpg", "text": f"image {i}"} for i in range(len(images))]
    paths = {kind: root / kind for kind in ("folder", "tar shards", "Parquet")}
    for path in paths.values():
        path.mkdir()
    for line, data in zip(lines, images, strict=True):
        (paths["folder"] / line["file_name"]).write_bytes(data)
    (paths["folder"] / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for start in range(0, len(images), 64):
        with tarfile.open(paths["tar shards"] / f"{start:05d}.tar", "w") as tar:
            for i in range(start, min(start + 64, len(images))):
                for name, data in ((f"{i}.jpg", images[i]), (f"{i}.txt", lines[i]["text"].encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        del paths["Parquet"]
        return paths
    table = pa.table({"image": images, "text": [line["text"] for line in lines]})
    pq.write_table(table, paths["Parquet"] / "train-00000.parquet", row_group_size=32)
    return paths


def loader_rate(path: Path, **options: int) -> float:
    """Images a second of the loader alone, in the second epoch."""
    data = captioned_data(open_source(path), BATCH, SIDE, seed=0, **options)
    batches, count = iter(data), data.size // BATCH
    for _ in range(count):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return count * BATCH / seconds


def encoder_wait(path: Path, threads: int) -> tuple[float, float]:
    """(seconds of a step, share of them spent waiting for its batch)."""
    model, params = jaxdiff.load("icons")
    encode = jax.jit(lambda params, x: jaxdiff.encode(model, params, x / 255.0).sum())
    batches = iter(captioned_data(open_source(path), BATCH, SIDE, seed=0, threads=threads))
    jax.block_until_ready(encode(params, next(batches)["image"].astype(np.float32)))
    wait_time, start = 0.0, time.perf_counter()
    for _ in range(STEPS):
        before = time.perf_counter()
        images = next(batches)["image"]
        wait_time += time.perf_counter() - before
        jax.block_until_ready(encode(params, images.astype(np.float32)))
    seconds = time.perf_counter() - start
    batches.close()
    return seconds / STEPS, wait_time / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    images = [jpeg(i) for i in range(parser.parse_args().images)]
    size = sum(map(len, images)) / len(images) / 1000
    print(f"{len(images)} JPEG images of 640x512, {size:.0f} kB each; {os.cpu_count()} cores; batches of {BATCH}.\n")
    print("| data | images/s, 1 thread | 2 threads | 8 threads | encoder step | share of it waiting |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for kind, path in write(Path(root), images).items():
            rates = [f"{loader_rate(path, threads=n):.0f}" for n in (1, 2, 8)]
            seconds, share = encoder_wait(path, threads=8)
            print(f"| {kind} | {' | '.join(rates)} | {seconds:.2f} s | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
