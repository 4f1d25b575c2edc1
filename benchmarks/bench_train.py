"""Training step of Stable Diffusion 1.5's UNet shape: jaxdiff against PyTorch diffusers, each in a process of its own.

    python -m benchmarks.bench_train [--side 32] [--steps 3] [--rounds 2]

Batch 1, float32, AdamW, gradient clipped at norm 1, no average: parameters, gradients and two moments are 14 GB, so
that the two cannot be in memory together and take turns, `rounds` times. The noise, the times and the text embeddings
are the step's inputs, and both compute the same loss of them. Prints the line of the table in RESULTS.md: the median
step of each, their ratio, and jaxdiff's share of the measured matrix product rate.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np

RATE, DECAY, CLIP = 1e-5, 0.01, 1.0


def inputs(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noised latents [1, side, side, 4], noise of that shape, text [1, 77, 768]."""
    rng = np.random.default_rng(0)
    shapes = ((1, side, side, 4), (1, side, side, 4), (1, 77, 768))
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)  # type: ignore[return-value]


def time_jaxdiff(side: int, steps: int) -> dict:
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.bench_sd15 import matmul_rate
    from benchmarks.sd15 import UNET
    from jaxdiff.config import UNetConfig
    from jaxdiff.models.unet import UNet2DConditionModel
    from jaxdiff.training.optimizer import clip_by_global_norm

    rate = matmul_rate()
    unet = UNet2DConditionModel(UNetConfig(**UNET))
    x, noise, text = map(jnp.asarray, inputs(side))
    shapes = jax.eval_shape(lambda: unet.init(jax.random.key(0), x, jnp.ones(1), text)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape, np.float32)), shapes)
    adamw = optax.adamw(RATE, weight_decay=DECAY, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    tx = optax.chain(clip_by_global_norm(CLIP), adamw)
    opt_state = jax.jit(tx.init)(params)

    def step(params, opt_state, x, noise, text):
        def loss(params):
            return ((unet.apply({"params": params}, x, jnp.full(1, 500.0), text) - noise) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, x, noise, text).compile()
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        params, opt_state, value = compiled(params, opt_state, x, noise, text)
        jax.block_until_ready((params, value))
        times.append(time.perf_counter() - start)
    return {"seconds": times[1:], "flops": compiled.cost_analysis()["flops"], "rate": rate}


def time_diffusers(side: int, steps: int) -> dict:
    import torch
    from diffusers import UNet2DConditionModel

    from benchmarks.bench_sd15 import to_torch
    from benchmarks.sd15 import UNET

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET).train()
    x, noise, text = inputs(side)
    x, noise, text = to_torch(x), to_torch(noise), torch.from_numpy(text)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, weight_decay=DECAY)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        loss = ((unet(x, torch.tensor([500]), text).sample - noise) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    return {"seconds": times[1:]}


LIBRARIES = {"jaxdiff": time_jaxdiff, "diffusers": time_diffusers}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=32, help="of the latents")
    parser.add_argument("--steps", type=int, default=3, help="timed in each turn, after one that warms up")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each library")
    parser.add_argument("--only", choices=LIBRARIES, help="one turn of this library, printed as JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(LIBRARIES[args.only](args.side, args.steps)))
        return
    seconds: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    results: dict = {}
    for _ in range(args.rounds):
        for name in LIBRARIES:
            command = [sys.executable, "-m", "benchmarks.bench_train", "--only", name]
            command += ["--side", str(args.side), "--steps", str(args.steps)]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(process.stdout.splitlines()[-1])
            seconds[name] += result["seconds"]
            results |= result
            print(name, [round(s, 2) for s in result["seconds"]], file=sys.stderr, flush=True)
    ours, theirs = (statistics.median(seconds[name]) for name in LIBRARIES)
    flops, rate = results["flops"], results["rate"]
    share = f"{flops / 1e9:.0f} GFLOP, {flops / ours / rate:.0%} of {rate / 1e9:.0f}"
    description = f"training step of SD 1.5's UNet, batch 1, {args.side}x{args.side} latents, AdamW"
    print(f"| {description} | {ours:.2f} s | {theirs:.2f} s | {ours / theirs:.2f} | {share} GFLOP/s |")


if __name__ == "__main__":
    main()
