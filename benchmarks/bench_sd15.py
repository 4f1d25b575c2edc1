"""Stable Diffusion 1.5's shapes on random weights: jaxdiff against PyTorch diffusers, in turns, in one process.

    python -m benchmarks.bench_sd15 [--parts load text unet decode image] [--batches 1 4] [--steps 20] [--repeats 5]

Prints a line of the table in RESULTS.md for each part and batch: the median of each library, their ratio, the relative
error between them, and the share of this machine's measured matrix product rate. "unet" is a guided step, twice the
batch; "image" is text to pixels with guidance, on the same noise; as each takes minutes, its first turn counts as
well, less what compiling took; "load" opens the folder in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxdiff
from benchmarks import sd15
from jaxdiff.models.model import apply

PARTS = ("load", "text", "unet", "decode", "image")
COMPILING = "/jax/core/compile/backend_compile_duration"  # as jax.monitoring has it
PROMPT, NEGATIVE, GUIDANCE = "a photo of a cat", "blurry", 7.5
LOADING = r"""
import re, sys, time
import jax, jaxdiff
jax.devices()
def peak(): return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
before, start = peak(), time.perf_counter()
jax.block_until_ready(jaxdiff.load(sys.argv[1])[1])
print(time.perf_counter() - start, peak() - before)
"""


compiling: list[float] = []  # seconds of each program


def seconds(function: Callable) -> float:
    """Seconds of a call, but for compiling."""
    compiling.clear()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start - sum(compiling)


def matmul_rate(size: int = 4096) -> float:
    """Floating-point operations a second of a float32 matrix product, best of three."""
    x = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    return 2 * size**3 / min(seconds(lambda: product(x, x).block_until_ready()) for _ in range(3))


def to_torch(x: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] to PyTorch's [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def from_torch(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


def text(model, params, pipe, batch: int, steps: int) -> tuple[Callable, Callable, object]:
    tokens = np.asarray(jaxdiff.tokenize(model, [PROMPT] * batch))
    encode = jax.jit(lambda p, t: jaxdiff.encode_text(model, p, t).embeddings).lower(params, tokens).compile()
    return lambda: encode(params, tokens), lambda: pipe.text_encoder(torch.from_numpy(tokens).long())[0].numpy(), encode


def unet(model, params, pipe, batch: int, steps: int) -> tuple[Callable, Callable, object]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * batch, 64, 64, 4), np.float32)
    context = rng.standard_normal((2 * batch, 77, 768), np.float32)
    step = jax.jit(lambda p, *a: apply(model, p, "unet", *a)).lower(params, x, jnp.float32(500), context).compile()
    theirs = to_torch(x), torch.tensor(500), torch.from_numpy(context)
    return (
        lambda: step(params, x, jnp.float32(500), context),
        lambda: from_torch(pipe.unet(*theirs).sample),
        step,
    )


def decode(model, params, pipe, batch: int, steps: int) -> tuple[Callable, Callable, object]:
    z = np.random.default_rng(0).standard_normal((batch, 64, 64, 4), np.float32)
    step = jax.jit(lambda p, z: jaxdiff.decode(model, p, z)).lower(params, z).compile()
    scaled = to_torch(z) / model.vae.config.scaling_factor
    return (
        lambda: step(params, z),
        lambda: from_torch((pipe.vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1)),
        step,
    )


def image(model, params, pipe, batch: int, steps: int) -> tuple[Callable, Callable, object]:
    noise = np.random.default_rng(0).standard_normal((batch, 64, 64, 4), np.float32)
    shared = {"guidance_scale": GUIDANCE}

    def ours():
        prompts = [PROMPT] * batch
        return jaxdiff.generate(model, params, prompts, NEGATIVE, steps=steps, noise=noise, **shared) / np.float32(255)

    def theirs():
        texts = {"prompt": [PROMPT] * batch, "negative_prompt": [NEGATIVE] * batch}
        return pipe(**texts, num_inference_steps=steps, latents=to_torch(noise), output_type="np", **shared).images

    return ours, theirs, None


def load(folder: Path) -> None:
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    process = subprocess.run([sys.executable, "-c", LOADING, str(folder)], capture_output=True, text=True, check=True)
    load_time, peak = map(float, process.stdout.split())
    print(f"| load {size / 1e9:.2f} GB | {load_time:.1f} s | | | peak {peak / size:.2f} of the files |", flush=True)


def compare(ours: Callable, theirs: Callable, repeats: int, warm_up: int = 1) -> tuple[float, float, float]:
    """Median seconds of both functions, called in turns, and the relative error of the first one's output."""
    outputs: list = [None, None]

    def turn(i: int, function: Callable) -> float:
        def run() -> None:
            outputs[i] = jax.block_until_ready(function())

        return seconds(run)

    rounds = [(turn(0, ours), turn(1, theirs)) for _ in range(warm_up + repeats)][warm_up:]
    a, b = (statistics.median(times) for times in zip(*rounds, strict=True))
    output, reference = map(np.asarray, outputs)
    return a, b, float(np.linalg.norm(output - reference) / np.linalg.norm(reference))


def watch_compiling() -> None:
    """Record the seconds of each compilation in `compiling`."""
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiling.append(duration) if event == COMPILING else None
    )


def measure(part: Callable, batch: int, args: argparse.Namespace, built: tuple, rate: float) -> None:
    """Print one line of the table."""
    ours, theirs, compiled = part(*built, batch, args.steps)
    a, b, error = compare(ours, theirs, args.repeats, warm_up=0 if part is image else 1)
    share = ""
    if compiled is not None:
        flops = compiled.cost_analysis()["flops"]
        temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
        share = f"{flops / 1e9:.0f} GFLOP, {flops / a / rate:.0%} of {rate / 1e9:.0f} GFLOP/s; {temporary:.0f} MB"
    print(
        f"| {part.__name__}, batch {batch} | {a:.3g} s | {b:.3g} s | {a / b:.2f} | {error:.1e} | {share} |", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    watch_compiling()
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        pipe = sd15.pipeline(folder)
        if "load" in args.parts:
            load(folder)
        rate = matmul_rate()
        built = (*jaxdiff.load(folder), pipe)
        for part in (text, unet, decode, image):
            if part.__name__ in args.parts:
                for batch in args.batches:
                    measure(part, batch, args, built, rate)


if __name__ == "__main__":
    main()
