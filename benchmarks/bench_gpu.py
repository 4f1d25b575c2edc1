"""Whole images and training steps of Stable Diffusion on a GPU: jaxdiff against PyTorch diffusers with torch.compile.

    python -m benchmarks.bench_gpu [--seconds 300] [--cases sd1:1 sd1:4 ...] [--small]

Random weights at the published shapes, in bfloat16: text to pixels in 20 steps of DPM++ 2M with guidance, SD 1.5 at 512
and SDXL at 1024 pixels (`sd1:4` is a batch of four), and a training step of the UNet with AdamW on float32 weights
(`sd1-train:8`). Each library runs all cases in a process of its own, which leaves out what would not begin in its half
of the time; PyTorch compiles its UNet and its decoder. Prints a table with images/s, their ratio, the share of the rate
of a large bfloat16 product that each reaches (FLOP as XLA counts them, for both), peak memory, and the seconds that the
first call takes longer than the next. --small has small models, to try the script on a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.tpu_compile import model_of

STEPS, GUIDANCE, PROMPT = 20, 7.5, "a photo of a cat"
SIDES = {"sd1": 512, "sdxl": 1024}
CASES = ("sd1:1", "sd1:4", "sdxl:1", "sdxl:4", "sd1-train:8", "sd1:16", "sdxl-train:4", "sdxl:16")
LIBRARIES = ("jaxdiff", "pytorch")
FIGURES = ("images/s", "of the product", "GB", "first s")
COLUMNS = ("case", *(f"{library} {what}" for library in LIBRARIES for what in FIGURES), "ratio")


class Case(NamedTuple):
    family: str
    train: bool
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        name, _, batch = text.partition(":")
        family, _, what = name.partition("-")
        return cls(family, what == "train", int(batch))


def product_rate(width: int) -> float:
    """FLOP a second of a bfloat16 matrix product, best of five."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return 2 * width**3 / min(seconds(lambda: product(x, x).block_until_ready()) for _ in range(6))


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def unet_inputs(model: Any, batch: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what a UNet is given, in jaxdiff's layout."""
    config = model.unet.config
    shapes = {
        "x": (batch, config.side, config.side, config.in_channels),
        "text": (batch, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes |= {"pooled": (batch, pooled), "time_ids": (batch, 6)}
    return shapes


def flop(model: Any, shapes: Any, case: Case) -> float:
    """Of an image's 20 guided steps and decoding, or of a training step: times the batch."""
    import jax
    import jax.numpy as jnp

    from jaxdiff.models.model import apply, decode

    def ones(batch: int) -> list[Any]:
        inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in unet_inputs(model, batch).values()]
        return [inputs[0], jax.ShapeDtypeStruct((batch,), jnp.float32), *inputs[1:]]

    def count(function: Callable, *args: Any) -> float:
        return float(jax.jit(function).lower(*args).cost_analysis()["flops"])

    def predict(params: Any, *inputs: Any) -> Any:
        return apply(model, params, "unet", *inputs)

    if case.train:
        return count(jax.grad(lambda p, *x: predict(p, *x).astype(jnp.float32).sum()), shapes, *ones(case.batch))
    latents = jax.ShapeDtypeStruct((case.batch, *ones(1)[0].shape[1:]), jnp.float32)
    decoding = count(lambda p, x: decode(model, p, x), shapes, latents)
    return STEPS * count(predict, shapes, *ones(2 * case.batch)) + decoding


def jaxdiff_call(case: Case, small: bool) -> tuple[Callable[[], object], Callable[[], float]]:
    """A call of jaxdiff that waits for its result, and the peak of memory in bytes."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxdiff
    from benchmarks.gpu_figures import random_like
    from jaxdiff.models.model import apply

    def peak() -> float:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan"))

    model, shapes = model_of(case.family, small)
    if not case.train:
        params = jax.jit(lambda: random_like(shapes, "bfloat16"))()
        side = {} if small else {"height": SIDES[case.family], "width": SIDES[case.family]}
        settings: Any = {"steps": STEPS, "guidance_scale": GUIDANCE, "scheduler": "dpmpp_2m", **side}
        return lambda: jaxdiff.generate(model, params, [PROMPT] * case.batch, seed=0, **settings), peak
    params = jax.jit(lambda: random_like({"unet": shapes["unet"]}, "float32"))()
    inputs = {name: jnp.ones(shape) for name, shape in unet_inputs(model, case.batch).items()}
    optimizer = optax.adamw(1e-5)

    def step(params: Any, moments: Any) -> Any:
        def loss(params: Any) -> Any:
            x, *text = inputs.values()
            out = apply(model, params, "unet", x, jnp.full(case.batch, 500.0), *text)
            return ((out.astype(jnp.float32) - x) ** 2).mean()

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    compiled, state = jax.jit(step, donate_argnums=(0, 1)), [(params, optimizer.init(params))]

    def train() -> None:
        state[0] = jax.block_until_ready(compiled(*state[0]))

    return train, peak


def diffusers_call(case: Case, small: bool) -> tuple[Callable[[], object], Callable[[], float]]:
    """The same of PyTorch diffusers."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from jaxdiff.io.model_paths import BUNDLED

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def peak() -> float:
        return torch.cuda.max_memory_allocated() if device == "cuda" else float("nan")

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model, _ = model_of(case.family, small)
    dtype = torch.float32 if case.train else torch.bfloat16
    unet = diffusers.UNet2DConditionModel.from_config(model.unet.config.to_dict()).to(device, dtype)
    if case.train:
        inputs = {name: torch.ones(shape, device=device) for name, shape in unet_inputs(model, case.batch).items()}
        x = inputs["x"].permute(0, 3, 1, 2).contiguous()
        added = {"text_embeds": inputs.get("pooled"), "time_ids": inputs.get("time_ids")}
        unet.train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=device == "cuda")
        predict = torch.compile(unet)

        def train() -> None:
            with torch.autocast(device, dtype=torch.bfloat16):
                out = predict(x, 500.0, inputs["text"], added_cond_kwargs=added if "pooled" in inputs else None).sample
            ((out.float() - x) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            finish()

        return train, peak
    torch.set_grad_enabled(False)
    unet = unet.to(memory_format=torch.channels_last)
    vae = diffusers.AutoencoderKL.from_config(model.vae.config.to_dict()).to(device, dtype)
    scheduler = diffusers.DPMSolverMultistepScheduler(steps_offset=1)
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "scheduler": scheduler}
    for n, (encoder, cls) in enumerate(
        ((model.text_encoder, CLIPTextModel), (model.text_encoder_2, CLIPTextModelWithProjection)), 1
    ):
        if encoder is not None:
            suffix = "" if n == 1 else "_2"
            config = CLIPTextConfig(**encoder.config.to_dict())
            parts[f"text_encoder{suffix}"] = cls(config).to(device, dtype).eval()
            if small:
                model.tokenizer.save(folder := f"/tmp/bench_gpu_{os.getpid()}")
            parts[f"tokenizer{suffix}"] = CLIPTokenizer.from_pretrained(folder if small else BUNDLED / "clip_tokenizer")
    if case.family == "sdxl":
        pipe: Any = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        options: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet, pipe.vae.decode = torch.compile(unet), torch.compile(vae.decode)
    settings: Any = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}

    def draw() -> None:
        pipe([PROMPT] * case.batch, **settings)
        finish()

    return draw, peak


def measure(library: str, cases: list[str], small: bool, end: float) -> Iterator[dict[str, Any]]:
    for text in cases:
        if time.time() > end:
            return
        case = Case.parse(text)
        call, peak = (jaxdiff_call if library == "jaxdiff" else diffusers_call)(case, small)
        first = seconds(call)
        times = [seconds(call)]
        while len(times) < 5 and sum(times) < 10:
            times.append(seconds(call))
        best = min(times)
        yield {"case": text, "images/s": case.batch / best, "GB": peak() / 1e9, "first s": first - best}


def run_child(library: str, args: argparse.Namespace, share: float) -> dict[str, dict[str, Any]]:
    """What a library measures in a process of its own, by case."""
    command = [sys.executable, "-m", "benchmarks.bench_gpu", "--library", library, "--cases", *args.cases]
    command += ["--seconds", str(share), *(["--small"] if args.small else [])]
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=False).stdout
    rows = [json.loads(line) for line in out.splitlines() if line.startswith('{"')]
    return {row["case"]: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--library", choices=(*LIBRARIES, "limits"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library == "limits":
        print(json.dumps({"case": "product", "rate": product_rate(256 if args.small else 8192)}))
        for text in args.cases:
            case = Case.parse(text)
            print(json.dumps({"case": text, "FLOP": flop(*model_of(case.family, args.small), case)}), flush=True)
    elif args.library:
        for row in measure(args.library, args.cases, args.small, time.time() + args.seconds):
            print(json.dumps(row), flush=True)
    else:
        limits = run_child("limits", args, args.seconds)
        results = {library: run_child(library, args, args.seconds / 2) for library in LIBRARIES}
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        for text in args.cases:
            cells, rates = [], []
            for rows in results.values():
                row = rows.get(text)
                rates.append(row["images/s"] if row else float("nan"))
                share = rates[-1] / Case.parse(text).batch * limits[text]["FLOP"] / limits["product"]["rate"]
                details = [f"{share:.2f}", f"{row['GB']:.1f}", f"{row['first s']:.0f}"] if row else ["", "", ""]
                cells += [f"{rates[-1]:.3g}", *details]
            print("| " + " | ".join([text, *cells, f"{rates[0] / rates[1]:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
