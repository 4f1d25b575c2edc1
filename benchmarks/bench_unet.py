"""One step of Stable Diffusion 1.5's UNet, jaxdiff against PyTorch diffusers in the same process.

    python benchmarks/bench_unet.py [--batch 2] [--side 64] [--repeats 5]

Prints the median of each, their ratio, the relative error between them, and the share of this machine's measured
matrix product rate. The two take turns, so that a busy machine slows both.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import sd15
from jaxdiff.config import UNetConfig
from jaxdiff.io.weights import load_tensors
from jaxdiff.models.unet import UNet2DConditionModel


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def matmul_rate(size: int = 4096) -> float:
    """Floating-point operations a second of a float32 matrix product, best of three."""
    x = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    return 2 * size**3 / min(seconds(lambda: product(x, x).block_until_ready()) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=64, help="latent height and width")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((args.batch, args.side, args.side, 4), np.float32)
    text = rng.standard_normal((args.batch, 77, 768), np.float32)
    inputs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.tensor(500), torch.from_numpy(text)

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        reference, weights = sd15.make("unet", Path(folder))
        unet = UNet2DConditionModel(UNetConfig.load(Path(folder) / "config.json"))
        shapes = jax.eval_shape(lambda: unet.init(jax.random.key(0), x, jnp.float32(0), text)["params"])
        loading = time.perf_counter()
        params = load_tensors(weights, shapes, jnp.float32)
        jax.block_until_ready(params)
        loading = time.perf_counter() - loading
        compiling = time.perf_counter()
        step = jax.jit(lambda p, *a: unet.apply({"params": p}, *a)).lower(params, x, jnp.float32(500), text).compile()
        compiling = time.perf_counter() - compiling
        ours = np.asarray(step(params, x, jnp.float32(500), text))
        theirs = reference(*inputs).sample.numpy().transpose(0, 2, 3, 1)
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        rounds = [
            (
                seconds(lambda: step(params, x, jnp.float32(500), text).block_until_ready()),
                seconds(lambda: reference(*inputs)),
            )
            for _ in range(args.repeats)
        ]
    mine, other = (statistics.median(r) for r in zip(*rounds, strict=True))
    flops, rate = step.cost_analysis()["flops"] / 1e9, matmul_rate() / 1e9
    print(f"SD 1.5 UNet step, float32, batch {args.batch}, latents {args.side}x{args.side}, {jax.default_backend()}")
    print(
        f"  jaxdiff {mine:.2f} s, PyTorch diffusers {other:.2f} s, ratio {mine / other:.2f} (median of {args.repeats})"
    )
    print(f"  relative L2 error {error:.1e}; loading {loading:.1f} s, compiling {compiling:.1f} s")
    print(
        f"  {flops:.0f} GFLOP, {flops / mine:.0f} GFLOP/s, {flops / mine / rate:.0%} of a matrix product's {rate:.0f}"
    )


if __name__ == "__main__":
    main()
