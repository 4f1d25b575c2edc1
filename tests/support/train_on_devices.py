"""Run with simulated devices: the losses of some updates, and what the compiled step sends, on several meshes.

Usage: python -m tests.support.train_on_devices FILE [PORT PROCESS PROCESSES], with as many devices
as XLA_FLAGS simulates. With a port it is one of several processes that share their devices, and writes FILE of its own.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from jaxdiff import parallel
from jaxdiff.config.upscaler import RRDBConfig
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.models.rrdb import RRDBNet
from jaxdiff.training import collectives, memory_plan
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.loop import Stage
from jaxdiff.training.optimizer import optimizer
from jaxdiff.training.options import Options
from jaxdiff.training.stages import clip_params, clip_stage, diffusion_stage
from jaxdiff.training.super_resolution import init_network, super_resolution_stage
from jaxdiff.training.train_step import abstract_state, init_state, make_train_step
from jaxdiff.training.trainables import make
from jaxdiff.training.vae_decoder import split_decoder, vae_decoder_stage

BATCH, STEPS, CLIP_STEPS = 8, 6, 3
PLAIN: dict = {"learning_rate": 1e-3, "warmup_steps": 0, "schedule": "constant", "b2": 0.999}
WIDTH = 128  # of the kernels that optimizers are tried on: Adafactor factors from here on, 8 bits from 4096 elements
OPTIMIZERS: dict[str, dict] = {
    "int8": {"moment_dtype": "int8"},
    "adafactor": {"optimizer": "adafactor"},
    "lion, bfloat16": {"optimizer": "lion", "moment_dtype": "bfloat16"},
    "muon": {"optimizer": "muon"},
}
MESHES = {"one": (1, 1), "data": (1, 1), "fsdp": (8, 1), "all": (2, 2)}  # name -> sizes of fsdp and tensor


def model_and_params():
    """A tiny model whose axes the meshes divide."""
    from tests.support.stages import whole_model
    from tests.support.tiny import tiny_params

    model = whole_model()
    return model, clip_params(tiny_params(model))


def against_an_adversary(model, params):
    """The stage of a decoder and its discriminator, which normalises by the whole batch, with their parameters.

    Train it at a small rate: where a norm follows, gradients of what it takes away are rounding alone, and Adam makes
    steps of the whole rate of them.
    """
    net = PatchDiscriminator(8, 2)
    fresh = net.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return vae_decoder_stage(model, net, weight=0.5, start=1), {**split_decoder(params), "discriminator": fresh}


def against_text(model, params):
    """The stage of a GAN, with both penalties, and its parameters.

    Train it at a small rate too: what is added to all scores has a gradient of rounding alone.
    """
    from tests.support.stages import settings

    small = {"features": 8, "layers": 1}
    changes = {"loss": "relativistic", "r1": 0.5, "r2": 0.5, **small}
    made = make(settings("gan", adversary=changes, generator=small, data={"image_size": 16}), model, params)
    return made.stage, made.params


def enlarging():
    """The stage of an upscaling network that doubles, and its parameters."""
    module = RRDBNet(RRDBConfig(1, 8, 4, upsamples=1), jnp.dtype("float32"))
    return super_resolution_stage(module), {"upscaler": init_network(module, jax.random.key(0))}


def batches(steps: int):
    """The same examples of the whole batch on every host, each host its part of them."""
    from tests.support.stages import pairs

    rng = np.random.default_rng(0)
    rows = BATCH // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    for i in range(steps):
        batch = {"latents": rng.normal(size=(BATCH, 8, 8, 4)).astype(np.float32), **pairs(BATCH)}
        batch["hint"] = batch["image"][:, ::2, ::2]
        yield {k: np.roll(v, i, axis=0)[mine] for k, v in batch.items()}


def train(stage, params, mesh, steps: int, rate: float = 1e-3, **compiler) -> dict:
    """Losses, how parameters, averages and moments are divided, and what one step sends."""
    options = Options(steps=steps, batch_size=BATCH, **PLAIN | {"learning_rate": rate})
    trained = {k: params[k] for k in stage.trainable}
    frozen = {k: v for k, v in params.items() if k not in stage.trainable}
    with mock.patch.object(multihost_utils, "process_allgather", wraps=multihost_utils.process_allgather) as gather:
        state = init_state(trained, optimizer(options), mesh)
        frozen = parallel.put_global(frozen, parallel.param_sharding(mesh, frozen))
    before, losses = specs(state), []
    step = make_train_step(stage.loss, options, mesh, state, stage.dtypes, stage.reads_state)
    first = parallel.global_batch(mesh, next(batches(1)))
    compiled = step.lower(state, frozen, first).compile(compiler)
    for batch in batches(steps):
        state, metrics = compiled(state, frozen, parallel.global_batch(mesh, batch))
        losses.append(float(metrics["loss"]))
    assert specs(state) == before
    after = parallel.fetch(state.params)
    rows = collectives.collectives(compiled.as_text(), mesh.shape)
    sizes = {f"{r.kind} {','.join(r.axes)}": r.size for r in rows}
    planned = memory_plan.bytes_each(abstract_state(trained, options, mesh))
    assert planned == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    rows = parallel.sharded_groups(mesh, {**trained, **frozen})
    return {
        "losses": losses,
        "specs": sorted(set(before)),
        "sends": sizes,
        "trained": sum(x.nbytes for x in jax.tree.leaves(trained)),
        "divided": sum(row.size for row in rows if "fsdp" in row.spec),
        "norm": float(optax.tree.norm(after)),
        "moved": float(optax.tree.norm(jax.tree.map(lambda new, old: new - np.asarray(old), after, trained))),
        "gathered": gather.call_count,  # between hosts, to start
    }


def in_half_precision(folder: Path) -> dict:
    """CLIP in bfloat16, its parameters gathered in their own type and in that, and what XLA's partitioner has gathered.

    Not what the compiled program gathers: the compiler for CPUs widens every collective of bfloat16.
    """
    from tests.support.stages import whole_model

    stage, mesh, report = clip_stage(whole_model(dtype=jnp.bfloat16)), parallel.mesh(fsdp=8), {}
    params = {name: x for name, x in model_and_params()[1].items() if name in stage.trainable}
    for name, dtypes in (("float32", {}), ("bfloat16", stage.dtypes)):
        dump = {"xla_dump_to": str(folder / name), "xla_dump_hlo_pass_re": "spmd-partitioning"}
        # What is rounded to bfloat16 stays rounded, so that two programs that round the same compute the same.
        report[name] = train(stage._replace(dtypes=dtypes), params, mesh, 3, xla_allow_excess_precision=False, **dump)
        (partitioned,) = (folder / name).glob("*jit_step*.after_spmd-partitioning*.txt")
        rows = collectives.collectives(partitioned.read_text(), mesh.shape)
        report[name]["gathers"] = sum(row.size for row in rows if row.kind == "all-gather")
    return report


def squares() -> tuple[Stage, dict, list[dict]]:
    """A stage that compiles in no time, with kernels that every mesh divides: (stage, parameters, batches)."""
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(2, WIDTH, WIDTH)).astype(np.float32) / np.sqrt(WIDTH)
    to_q = {"kernel": kernels[0], "bias": np.zeros(WIDTH, np.float32)}
    params = {"net": {"attn1": {"to_q": to_q}, "ff": {"net_2": {"kernel": kernels[1]}}}}

    def loss(params, batch, keys):
        q, out = params["net"]["attn1"]["to_q"], params["net"]["ff"]["net_2"]
        return ((jnp.tanh(batch["x"] @ q["kernel"] + q["bias"]) @ out["kernel"] - batch["y"]) ** 2).mean(), {}

    drawn = rng.normal(size=(4, 2, BATCH, WIDTH)).astype(np.float32)
    return Stage("net", ("net",), loss), params, [{"x": x, "y": y} for x, y in drawn]


def moved(changes: dict, meshes: list, folder: Path) -> dict:
    """Four updates, half of them on each mesh, with a checkpoint in between."""
    (stage, params, steps), report = squares(), {"losses": [], "restored": True}
    options = Options(steps=4, batch_size=BATCH, ema_sigmas=(0.05, 0.1), **PLAIN, **changes)
    state = init_state(params, optimizer(options), meshes[0])
    for i, mesh in enumerate(meshes):
        if i:
            before, like = jax.device_get(state), init_state(params, optimizer(options), mesh)
            with Checkpoints(folder) as checkpoints:
                checkpoints.save(2, state, 0)
            with Checkpoints(folder) as checkpoints:
                state, _ = checkpoints.restore(like)
            same = jax.tree.map(lambda a, b: bool((a == np.asarray(b)).all()), before, state)
            alike = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), like, state)
            report["restored"] = all(jax.tree.leaves((same, alike)))
        step = make_train_step(stage.loss, options, mesh, state)
        chosen = steps if len(meshes) == 1 else steps[2 * i : 2 * i + 2]
        for batch in chosen:
            state, metrics = step(state, {}, parallel.global_batch(mesh, batch))
            report["losses"].append(float(metrics["loss"]))
    floats = [x for x in jax.tree.leaves(parallel.fetch(state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    return report | {"specs": sorted(set(specs(state.opt_state))), "norm": float(optax.tree.norm(floats))}


def specs(state) -> list[str]:
    return [str(x.sharding.spec) for x in jax.tree.leaves(state)]


def main(file: Path, port: str = "", process: str = "0", processes: str = "1") -> None:
    if port:
        jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
    model, params = model_and_params()
    report: dict = {"devices": jax.device_count()}
    if port:
        # Parameters reach over both.
        report["hosts"] = train(clip_stage(model), params, parallel.mesh(fsdp=4, tensor=2), CLIP_STEPS)
    else:
        unet = diffusion_stage(model, trainable=("unet", "text_encoder"))
        for name, (fsdp, tensor) in MESHES.items():
            mesh = parallel.mesh(fsdp, tensor, jax.devices()[:1] if name == "one" else None)
            report[name] = train(unet, params, mesh, STEPS)
            if name in ("one", "all"):
                report[f"clip {name}"] = train(clip_stage(model), params, mesh, CLIP_STEPS)
                report[f"adversary {name}"] = train(*against_an_adversary(model, params), mesh, CLIP_STEPS, 1e-6)
                report[f"gan {name}"] = train(*against_text(model, params), mesh, CLIP_STEPS, 1e-6)
                report[f"upscaler {name}"] = train(*enlarging(), mesh, CLIP_STEPS)
        one, *others = (
            parallel.mesh(*MESHES[n], jax.devices()[:1] if n == "one" else None) for n in ("one", "fsdp", "all")
        )
        report["optimizers"] = {
            name: [moved(changes, meshes, file.parent / name) for meshes in ([one], others)]
            for name, changes in OPTIMIZERS.items()
        }
        jax.config.update("jax_enable_compilation_cache", False)  # what is read back from it is not dumped
        compilation_cache.reset_cache()
        report["half"] = in_half_precision(file.parent / "hlo")
    file.write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
