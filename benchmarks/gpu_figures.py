"""Two minutes of figures on an accelerator: Stable Diffusion's UNets in bfloat16 against the matrix product's rate.

    python -m benchmarks.gpu_figures [--seconds 120] [--small]

Random weights at the published shapes. Prints a line of JSON each: the rate of an 8192-wide bfloat16 product, a guided
denoising step of SD 1.5 at 512 and SDXL at 1024 pixels (the UNet at twice the batch), SD 1.5's decoding, and a training
step of SD 1.5's UNet, each with its time, TFLOP/s as XLA counts them, and the share of the product's rate. Stops before
what would not begin in time. --small has the same programs at sizes that a CPU takes.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.config import UNetConfig, VAEConfig
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL

SD15 = UNetConfig(cross_attention_dim=768)
SDXL = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
VAE = VAEConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
)
SMALL = {"block_out_channels": (32, 32, 32), "sample_size": 16}


def random_like(shapes: Any, dtype: Any) -> Any:
    """Small random numbers in place of parameters: some thousand of them, repeated."""
    base = 0.02 * jax.random.normal(jax.random.key(0), (65537,))
    return jax.tree.map(lambda s: jnp.resize(base, s.shape).astype(dtype), shapes)


def timed(function: Callable, *args: Any, repeats: int = 5) -> tuple[float, float, float]:
    """(median seconds of a call, FLOP of it as XLA counts, seconds of compiling)."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compiling = time.perf_counter() - start
    cost = compiled.cost_analysis() or {}
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times), float(cost.get("flops", 0.0)), compiling


def unet_inputs(config: UNetConfig, batch: int) -> tuple[Any, ...]:
    x = jnp.ones((batch, config.side, config.side, 4), jnp.bfloat16)
    text = jnp.ones((batch, 77, config.cross_attention_dim), jnp.bfloat16)
    added = ()
    if config.addition_embed_type:
        added = (jnp.ones((batch, 1280), jnp.bfloat16), jnp.ones((batch, 6)))
    return x, jnp.full(batch, 500.0), text, *added


def unet(config: UNetConfig) -> tuple[UNet2DConditionModel, Any]:
    """A UNet that computes in bfloat16, and the shapes of its parameters."""
    module = UNet2DConditionModel(config, dtype=jnp.bfloat16)
    return module, jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x)["params"], *unet_inputs(config, 1))


def denoising(config: UNetConfig, batch: int) -> tuple[Callable, Any]:
    module, shapes = unet(config)
    inputs = unet_inputs(config, 2 * batch)
    return lambda params, *x: module.apply({"params": params}, *x), (random_like(shapes, jnp.bfloat16), *inputs)


def decoding(config: VAEConfig, side: int, batch: int) -> tuple[Callable, Any]:
    module = AutoencoderKL(config, dtype=jnp.bfloat16)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x)["params"], image)
    decode = functools.partial(module.apply, method="decode")
    return lambda params, z: decode({"params": params}, z), (
        random_like(shapes, jnp.bfloat16),
        jnp.ones((batch, side, side, 4), jnp.bfloat16),
    )


def training(config: UNetConfig, batch: int) -> tuple[Callable, Any]:
    """A gradient step of float32 weights, bfloat16 compute."""
    module, shapes = unet(config)

    def step(params: Any, *x: Any) -> Any:
        grads = jax.grad(lambda p: (module.apply({"params": p}, *x) ** 2).mean())(params)
        return jax.tree.map(lambda p, g: p - 1e-5 * g, params, grads)

    return step, (random_like(shapes, jnp.float32), *unet_inputs(config, batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    sd15, sdxl, vae, side, width, b = SD15, SDXL, VAE, 64, 8192, 4
    if args.small:
        heads = {"attention_head_dim": (2, 2, 2), "transformer_layers_per_block": (1, 1, 1)}
        types = {"down_block_types": SDXL.down_block_types, "up_block_types": SDXL.up_block_types}
        sd15 = UNetConfig(cross_attention_dim=32, **SMALL, **types)
        sdxl = UNetConfig(**{**vars(SDXL), **SMALL, **heads})
        vae = VAEConfig(**{**vars(VAE), "block_out_channels": (32, 32, 32, 32)})
        side, width, b = 16, 256, 1
    a = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)
    seconds, _, _ = timed(jnp.matmul, a, a)
    limit = 2 * width**3 / seconds
    print(json.dumps({"what": f"product {width} bfloat16", "TFLOP/s": round(limit / 1e12, 2)}), flush=True)
    for name, make, count in (
        ("SD 1.5 step, batch 1", lambda: denoising(sd15, 1), 1),
        (f"SD 1.5 step, batch {b}", lambda: denoising(sd15, b), b),
        (f"SD 1.5 decoding, batch {b}", lambda: decoding(vae, side, b), b),
        ("SDXL step, batch 1", lambda: denoising(sdxl, 1), 1),
        (f"SD 1.5 training step, batch {2 * b}", lambda: training(sd15, 2 * b), 2 * b),
        (f"SDXL step, batch {b}", lambda: denoising(sdxl, b), b),
        (f"SD 1.5 step, batch {4 * b}", lambda: denoising(sd15, 4 * b), 4 * b),
    ):
        if time.monotonic() > end:
            break
        function, inputs = make()
        seconds, flops, compiling = timed(function, *inputs)
        rate = flops / seconds
        row = {"what": name, "ms": round(1e3 * seconds, 2), "images/s": round(count / seconds, 2)}
        row |= {"TFLOP/s": round(rate / 1e12, 2), "of the product": round(rate / limit, 3)}
        print(json.dumps(row | {"compiling s": round(compiling, 1)}), flush=True)


if __name__ == "__main__":
    main()
