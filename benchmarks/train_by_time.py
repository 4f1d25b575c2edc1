"""Train the icons model's UNet within so many seconds on one accelerator, from packed latents held on the device.

    python -m benchmarks.train_by_time pack --latents runs/unet/latents-1a2b3c4d --out packed/ --megabytes 24
    python -m benchmarks.train_by_time train --packed packed/ --start runs/start --out results/ --seconds 540

`pack` writes what train.py precomputed (config.cache_latents, or --precompute) as .npz pieces of a bounded size, the
latents in 8 bits. `train` needs nothing but these, a diffusers folder to start from, and this repository. It draws
batches on the device, compiles one program, and takes its learning rate from the time left: linear warm-up over 2% of
the time, then linear decay, so that the decay ends when the time does. Every --every seconds it writes the weights,
float16 in pieces of at most 15 MB; in the end the better of two averages by the loss on latents set aside, and a sheet
of prompts. `python -m benchmarks.train_by_time join --out results/ --start runs/start --model model/` makes a diffusers
folder of the pieces. On an H100 some 9 minutes are a few million images; at --batch_size 16 it runs on a CPU.
"""

import argparse
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxdiff
from jaxdiff import parallel
from jaxdiff.data.store import Rows
from jaxdiff.io.images import grid, write_png
from jaxdiff.models.model import Model, init_params
from jaxdiff.training.ema import PowerAverages
from jaxdiff.training.init import starting_model
from jaxdiff.training.metrics import noise_levels
from jaxdiff.training.optimizer import optimizer
from jaxdiff.training.options import Options
from jaxdiff.training.stages import diffusion_stage
from jaxdiff.training.train_step import accumulated_grad

SIGMAS = (0.05, 0.1)  # lengths of the averages that are kept, as shares of the training
TRAINED = ("unet", "text_encoder")
PIECE = 15 * 2**20  # bytes of a file of weights
WARMUP = 0.02  # of the time


def pack(latents: Path, out: Path, megabytes: float) -> None:
    """Write latents int8 [n, h, w, C], tokens uint16 [n, L] and the scale [C] of one step as .npz pieces."""
    info = json.loads((latents / "latents.json").read_text())
    rows = Rows([str(latents / part) for part in info["parts"]])
    examples = [rows[i][1] for i in np.random.default_rng(0).permutation(len(rows))]
    values = np.stack([row["latents"] for row in examples]).astype(np.float32)
    scale = np.quantile(np.abs(values), 0.9999, axis=(0, 1, 2)) / 127
    quantized = np.clip(np.round(values / scale), -127, 127).astype(np.int8)
    tokens = np.stack([row["tokens"] for row in examples]).astype(np.uint16)
    out.mkdir(parents=True, exist_ok=True)
    pieces = int(np.ceil((quantized.nbytes + tokens.nbytes) / (megabytes * 2**20)))
    for i, rows_of in enumerate(np.array_split(np.arange(len(quantized)), pieces)):
        np.savez_compressed(out / f"{i:02d}.npz", latents=quantized[rows_of], tokens=tokens[rows_of], scale=scale)
    error = np.abs(quantized * scale - values).mean() / np.abs(values).mean()
    print(f"{len(quantized)} latents in {pieces} pieces; mean error of 8 bits {error:.4f} of the mean value.")


def load_packed(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(latents int8 [N, h, w, C], tokens int32 [N, L], scale [C]) of all pieces that are there."""
    pieces = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    latents, tokens = (np.concatenate([p[name] for p in pieces]) for name in ("latents", "tokens"))
    return latents, tokens.astype(np.int32), pieces[0]["scale"].astype(np.float32)


def rate_factor(share: float) -> float:
    """The learning rate's factor when this share of the time is over.

    >>> [rate_factor(share) for share in (0.01, 0.02, 0.51, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    return min(share / WARMUP, max(0.0, (1 - share) / (1 - WARMUP)))


def make_step(model: Model, options: Options, scale: np.ndarray, held_out: int) -> Any:
    """(trained parameters, optimizer's state, frozen, latents, tokens, step, factor) -> the first two and numbers.

    The last `held_out` latents are never trained on.
    """
    stage, tx, mesh = diffusion_stage(model, trainable=TRAINED), optimizer(options), parallel.mesh()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, frozen, latents, tokens, number, factor):
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        rows = jax.random.randint(key, (options.batch_size,), 0, len(latents) - held_out)
        batch = {"latents": latents[rows] * scale, "tokens": tokens[rows]}
        keys = jax.random.split(jax.random.fold_in(key, 1), options.batch_size)
        grads, metrics = accumulated_grad(stage.loss, params, frozen, batch, keys, 1, mesh, stage.dtypes)
        updates, state = tx.update(grads, state, params)
        updates = jax.tree.map(lambda u: factor * u, updates)  # the rate, and with it the decay of weights
        return optax.apply_updates(params, updates), state, (metrics["loss"], optax.tree.norm(grads))

    return step, tx


def averages(state: Any) -> tuple[Any, ...]:
    """The averages of lengths SIGMAS within an optimizer's state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PowerAverages))
    return next(x.averages for x in leaves if isinstance(x, PowerAverages))


def write_pieces(out: Path, trained: Any) -> None:
    """The trained parameters as float16, in files of at most PIECE bytes, each written whole or not at all."""
    flat = np.concatenate([np.asarray(x, np.float16).ravel() for x in jax.tree.leaves(trained)])
    for i, start in enumerate(range(0, len(flat), PIECE // 2)):
        path = out / f"weights-{i}.npy"
        with open(out / f".{path.name}", "wb") as file:
            np.save(file, flat[start : start + PIECE // 2])
        os.replace(out / f".{path.name}", path)


def join(out: Path, start: str, folder: Path) -> None:
    """Make a diffusers folder of the pieces, with all else from the model that training started from."""
    model, params = jaxdiff.load(start)
    flat = np.concatenate([np.load(path) for path in sorted(out.glob("weights-*.npy"))])
    leaves, tree = jax.tree.flatten({name: params[name] for name in TRAINED})
    ends = np.cumsum([x.size for x in leaves])
    if len(flat) != ends[-1]:
        raise SystemExit(f"{out} holds {len(flat)} numbers, {start} has {ends[-1]}: give the model trained from.")
    parts = [flat[end - x.size : end].reshape(x.shape).astype(np.float32) for end, x in zip(ends, leaves, strict=True)]
    jaxdiff.save(folder, model, {**params, **jax.tree.unflatten(tree, parts)})


def unreachable() -> Any:
    raise AssertionError("a whole model brings its tokenizer")


def train(args: argparse.Namespace) -> None:
    start_time, out = time.monotonic(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    key = jax.random.key(args.seed)
    # Computes in args.dtype; the parameters are float32, not rounded to it.
    model, params = starting_model({}, {"model": args.start}, unreachable, key, dtype=args.dtype)
    params = jax.tree.map(jnp.asarray, params)
    if args.fresh:
        params |= {"unet": jax.jit(lambda key: init_params(model, key)["unet"])(key)}
    latents, tokens, scale = load_packed(Path(args.packed))
    if len(latents) <= args.held_out:
        raise SystemExit(f"--packed {args.packed} holds {len(latents)} latents: lower --held_out {args.held_out}.")
    options = Options(
        steps=10**9, batch_size=args.batch_size, learning_rate=args.learning_rate, optimizer=args.optimizer,
        weight_decay=args.weight_decay, warmup_steps=0, schedule="constant", ema_sigmas=SIGMAS, seed=args.seed,
        lr_multipliers=(("text_encoder", args.text_rate),),
    )  # fmt: skip
    step, tx = make_step(model, options, scale, args.held_out)
    held_out = {"latents": latents[-args.held_out :] * scale, "tokens": tokens[-args.held_out :]}
    measure = noise_levels(
        model, [{k: v[i : i + 64] for k, v in held_out.items()} for i in range(0, args.held_out, 64)]
    )
    trained = {name: params[name] for name in TRAINED}
    frozen = {name: x for name, x in params.items() if name not in TRAINED}
    state, held_on_device = jax.jit(tx.init)(trained), [jnp.asarray(x) for x in (latents, tokens)]
    trained = jax.tree.map(jnp.copy, trained)
    print(
        f"{len(latents)} latents on {jax.devices()[0].device_kind}, ready after {time.monotonic() - start_time:.0f} s"
    )
    number, first, written, pending = 0, 0.0, time.monotonic(), None
    deadline = start_time + args.seconds - args.reserve
    while (now := time.monotonic()) < deadline and number < args.steps:
        share = (now - first) / (deadline - first) if first else 0.0
        factor = rate_factor(max(share, (number + 1) / args.steps))
        trained, state, numbers = step(trained, state, frozen, *held_on_device, number, jnp.float32(factor))
        number += 1
        if pending is not None:
            loss, grad_norm = (float(x) for x in pending)  # waits for the step before this one
            first = first or time.monotonic()
            if number % args.log_every == 0:
                speed = args.batch_size * (number - 1) / max(time.monotonic() - first, 1e-9)
                row = {
                    "step": number,
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "factor": factor,
                    "images_per_second": speed,
                }
                with open(out / "log.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps(row | {"seconds": time.monotonic() - start_time}) + "\n")
                print(json.dumps(row), flush=True)
        pending = numbers
        if time.monotonic() - written > args.every:
            write_pieces(out, averages(state)[0])
            written = time.monotonic()
    jax.block_until_ready(trained)
    write_pieces(out, averages(state)[0])  # before anything else that may not end in time
    losses = [measure({**params, **average})["eval_loss"] for average in averages(state)]
    best = averages(state)[int(np.argmin(losses))]
    write_pieces(out, best)
    result = {
        "steps": number,
        "images": number * args.batch_size,
        "eval_loss": dict(zip(map(str, SIGMAS), losses, strict=True)),
    }
    result |= {
        "device": jax.devices()[0].device_kind,
        "seconds": time.monotonic() - start_time,
        "arguments": vars(args),
    }
    (out / "done.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result), flush=True)
    images = jaxdiff.generate(model, {**params, **best}, args.prompts, seed=0, steps=20, guidance_scale=args.guidance)
    write_png(out / "sheet.png", grid(images, min(8, len(images))))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("--latents", type=Path, required=True, help="folder with latents.json")
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--megabytes", type=float, default=24, help="of a piece, before compression")
    joining = commands.add_parser("join")
    joining.add_argument("--out", type=Path, required=True, help="what `train` wrote")
    joining.add_argument("--start", required=True, help="what `train` started from")
    joining.add_argument("--model", type=Path, required=True, help="folder to write")
    training = commands.add_parser("train")
    training.add_argument("--packed", required=True)
    training.add_argument("--start", required=True, help="a model's folder: all parts but those trained stay")
    training.add_argument("--out", required=True)
    training.add_argument("--seconds", type=float, default=540, help="from the start of this command to its end")
    training.add_argument("--reserve", type=float, default=45, help="seconds of these for what comes after training")
    training.add_argument("--steps", type=float, default=float("inf"), help="at most so many, decaying over them")
    training.add_argument("--held_out", type=int, default=512, help="latents that are not trained on but measured")
    training.add_argument("--every", type=float, default=120, help="seconds between two writings of the weights")
    training.add_argument("--batch_size", type=int, default=1024)
    training.add_argument("--learning_rate", type=float, default=1e-3)
    training.add_argument("--weight_decay", type=float, default=0.01)
    training.add_argument("--text_rate", type=float, default=0.2, help="factor of the text encoder's learning rate")
    training.add_argument("--optimizer", default="muon")
    training.add_argument("--dtype", default="bfloat16")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--fresh", action="store_true", help="begin with a UNet of random weights")
    training.add_argument("--guidance", type=float, default=2.0)
    training.add_argument("--log_every", type=int, default=50)
    training.add_argument("--prompts", nargs="*", default=["a castle", "a dog", "a pen", "sunglasses", "a teddy bear"])
    args = parser.parse_args(argv)
    if args.command == "pack":
        pack(args.latents, args.out, args.megabytes)
    elif args.command == "join":
        join(args.out, args.start, args.model)
    else:
        train(args)


if __name__ == "__main__":
    main()
