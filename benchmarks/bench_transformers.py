"""A step of each transformer family at its full width and a reduced depth: jaxdiff against PyTorch diffusers, in turns.

    python -m benchmarks.bench_transformers [--models FLUX.1-dev ...] [--depth 1] [--side 64] [--text 512] [--repeats 5]

In float32, on random weights, in one process. Prints a line for each model: the median of each library, their ratio,
the relative error between them, and the share of this machine's measured matrix product rate. `--depth` is the number
of blocks of each kind, `--side` the latents along a side, `--text` the tokens of the prompt. A model takes some five
gigabytes of memory, both libraries together. `--small` takes a narrow network, to see that it runs.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.bench_sd15 import compare, matmul_rate, watch_compiling
from jaxdiff.io.torch_names import from_torch_layout, tensor_name
from jaxdiff.io.transformer_layout import COUNTS
from jaxdiff.models.model import FAMILIES, MODULES
from tests.support.published_transformers import TRANSFORMERS
from tests.support.transformer_pipelines import velocity

GUIDANCE = 3.5
SMALL = {  # values of a config that make it narrow
    "flux": {"num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32},
    "flux2": {"num_attention_heads": 2, "joint_attention_dim": 96},
    "sd3": {
        "num_attention_heads": 2, "caption_projection_dim": 128, "joint_attention_dim": 64, "pooled_projection_dim": 32,
        "pos_embed_max_size": 64,
    },
    "z_image": {"dim": 256, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64},
}  # fmt: skip


def shallow(name: str, depth: int, small: bool) -> Any:
    """The published config with `depth` blocks of each kind."""
    published = TRANSFORMERS[name]
    config = published.config.from_dict(published.values)
    changes: dict[str, Any] = {field: depth for field in COUNTS if hasattr(config, field)}
    if FAMILIES[published.config] == "sd3":  # whose last block differs from the others
        dual = tuple(i for i in config.dual_attention_layers if i < depth)
        changes = {"num_layers": depth + 1, "dual_attention_layers": dual}
    return dataclasses.replace(config, **changes, **(SMALL[FAMILIES[published.config]] if small else {}))


def build_steps(config: Any, batch: int, side: int, text: int) -> tuple[Callable, Callable, Any]:
    """A step of each library on the same weights and inputs, [B, h, w, C], and ours compiled."""
    family, rng = FAMILIES[type(config)], np.random.default_rng(0)
    torch.manual_seed(0)
    values = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    net = getattr(diffusers, config.CLASS_NAME)(**values).eval()
    width = getattr(config, "joint_attention_dim", None) or config.cap_feat_dim
    pooled = getattr(config, "pooled_projection_dim", None)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    x, t = normal(batch, side, side, config.latent_channels), np.full(batch, 500, np.float32)
    states = normal(batch, text, width)
    vector = normal(batch, pooled) if pooled else None
    guidance = np.full(batch, GUIDANCE, np.float32) if getattr(config, "guidance_embeds", False) else None
    mask = np.ones((batch, text), np.float32) if family == "z_image" else None
    inputs = (x, t, states, vector, mask, guidance)
    module = MODULES[type(config)](config)
    shapes = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x)["params"], *inputs)
    tensors = net.state_dict()
    params = unflatten_dict(
        {p: jnp.array(from_torch_layout(p, tensors[tensor_name(p)].numpy())) for p in flatten_dict(shapes)}
    )
    step = jax.jit(lambda params, *x: module.apply({"params": params}, *x)).lower(params, *inputs).compile()
    return lambda: step(params, *inputs), lambda: velocity(family, net, x, t, states, vector, guidance), step


def measure(name: str, config: Any, args: argparse.Namespace, rate: float) -> None:
    """Print one line of the table."""
    ours, theirs, compiled = build_steps(config, args.batch, args.side, args.text)
    a, b, error = compare(ours, theirs, args.repeats)
    flops = compiled.cost_analysis()["flops"]
    share = f"{flops / 1e9:.0f} GFLOP, {flops / a / rate:.0%} of {rate / 1e9:.0f} GFLOP/s"
    print(f"| {name}, depth {args.depth} | {a:.3g} s | {b:.3g} s | {a / b:.2f} | {error:.1e} | {share} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(TRANSFORMERS), choices=TRANSFORMERS)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    watch_compiling()
    rate = matmul_rate(256 if args.small else 4096)
    with torch.no_grad():
        for name in args.models:
            measure(name, shallow(name, args.depth, args.small), args, rate)


if __name__ == "__main__":
    main()
