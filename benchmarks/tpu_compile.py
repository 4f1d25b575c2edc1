"""What the compiler for TPUs makes of Stable Diffusion, without a TPU: memory, FLOPs, bytes, kernels and messages.

    python -m benchmarks.tpu_compile [--chips v5e v6e] [--cases sd1 sdxl ...] [--batches 1 4]

Needs `libtpu`, of the version that jax[tpu] names. Compiles ahead of time, in bfloat16 and at the published shapes:
drawing in 20 steps with guidance (`sd1` at 512 pixels, `sdxl` at 1024), also with parameters divided over 8 chips
(`sd1-fsdp`, `sdxl-fsdp`), in 28 steps with their texts encoded before and parameters divided over 8 chips of v5e or 4
of v6e (`flux`) or over 4 (`z_image`), and a training step of each U-Net with float32 weights: all of it divided over 8
chips (`sd1-full`, `sdxl-full`), and a LoRA of rank 16 on one (`sd1-lora`, `sdxl-lora`). A program takes minutes to an
hour. Prints a table with a row for each; the least time is what its FLOPs take at the chip's published rate, or its
bytes at its published bandwidth, whichever is longer. Batches are a chip's; messages are those of one step and, of a
program that draws, of what is done once.
"""

import argparse
import os
import time
from typing import Any, NamedTuple

STEPS = 20


class Chip(NamedTuple):
    """Published figures of one chip (docs.cloud.google.com/tpu/docs/v5e and /v6e)."""

    one: str  # a topology of a host's chips
    eight: str
    memory: float  # bytes
    flops: float  # bfloat16, a second
    bandwidth: float  # bytes a second


CHIPS = {
    "v5e": Chip("v5e:2x2", "v5e:2x4", 16e9, 197e12, 819e9),
    "v6e": Chip("v6e:2x2", "v6e:2x4", 32e9, 918e12, 1640e9),
}
FAMILIES = {"sd1": 512, "sdxl": 1024}
CASES = (*(f"{family}{what}" for family in FAMILIES for what in ("", "-fsdp", "-lora", "-full")), "flux", "z_image")
TRANSFORMERS = {  # the published network, tokens of a text and their width, whether there is a negative text, steps
    "flux": ("FLUX.1-dev", (512, 4096), False, 28),
    "z_image": ("Z-Image", (512, 2560), True, 28),
}
COLUMNS = (
    "program", "chip", "batch", "arguments GB", "temporary GB", "TFLOP", "GB moved", "kernels", "messages",
    "least ms", "compiling s",
)  # fmt: skip


def devices(chip: Chip, count: int) -> list[Any]:
    from jax.experimental import topologies

    name = chip.one if count == 1 else chip.eight
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:count]


def model_of(family: str, small: bool, remat: str = "") -> tuple[Any, Any]:
    """The published model that computes in bfloat16, and the shapes of its float32 parameters."""
    from jaxdiff.io.infer_config import pipeline_options, scheduler_config
    from jaxdiff.io.model_paths import BUNDLED
    from jaxdiff.models.model import build, param_shapes
    from jaxdiff.text.tokenizer import Tokenizer
    from tests.support.published import FULL, small_model

    if small:
        model = small_model(family)
        return model, param_shapes(model)
    text, text_2 = FULL[family][2:]
    tokenizer = Tokenizer.load(BUNDLED / "clip_tokenizer")
    model = build(
        text, *FULL[family][:2], tokenizer, scheduler_config(family, None), text_2=text_2,
        tokenizer_2=text_2 and tokenizer, options=pipeline_options(family), dtype="bfloat16", remat=remat,
    )  # fmt: skip
    return model, param_shapes(model)


def shapes_of(tree: Any, sharding: Any, dtype: str | None = None) -> Any:
    """Shapes in place of arrays; those of floats in `dtype`."""
    import jax
    import jax.numpy as jnp

    def one(x: Any) -> Any:
        kept_dtype = x.dtype if dtype is None or not jnp.issubdtype(x.dtype, jnp.floating) else dtype
        return jax.ShapeDtypeStruct(x.shape, kept_dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def sampling(family: str, chip: Chip, batch: int, small: bool, fsdp: int = 1) -> tuple[Any, Any, dict[str, int]]:
    """The program that draws, and that of its decoder on one chip, lowered; and the sizes of the program's mesh."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxdiff import parallel
    from jaxdiff.models.model import decode
    from jaxdiff.sampling.generate import sampler, with_noise
    from jaxdiff.sampling.resolve import resolve_images, resolve_settings
    from jaxdiff.training.train_step import sharded

    model, params = model_of(family, small)
    chips = devices(chip, fsdp)
    side = None if small else FAMILIES[family]
    settings = resolve_settings(model, steps=STEPS, height=side, width=side, scheduler="dpmpp_2m")
    request = resolve_images(model, settings, ["a castle"] * batch * fsdp)
    one = NamedSharding(parallel.data_mesh(chips[:1]), PartitionSpec())
    params = shapes_of(params, one, "bfloat16")
    latents = jax.ShapeDtypeStruct((batch, *settings.latents), jnp.float32, sharding=one)
    decoder = jax.jit(lambda params, x: decode(model, params, x)).lower(params, latents)
    mesh = parallel.mesh(fsdp, 1, chips)
    parts = (settings.scheduler, settings.clip_skip, settings.hires_upscale, settings.tile)
    program = sampler(model, *parts, mesh if fsdp > 1 else tuple(chips)).program
    call = shapes_of(jax.tree.map(jnp.asarray, settings.call), parallel.replicated(mesh))
    images = shapes_of(jax.eval_shape(lambda: with_noise(request)), parallel.batch_sharding(mesh))
    return program.lower(sharded(mesh, params), call, images), decoder, dict(mesh.shape)


def transforming(family: str, chip: Chip, batch: int, small: bool) -> tuple[Any, Any, dict[str, int]]:
    """As `sampling`, of a transformer divided over a host's chips, with the texts' embeddings as inputs."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxdiff import parallel
    from jaxdiff.config import SchedulerConfig, VAEConfig
    from jaxdiff.models.conditioning import Conditioning
    from jaxdiff.models.model import MODULES, Model, autoencoder, decode, param_shapes
    from jaxdiff.sampling.generate import sampler
    from jaxdiff.sampling.inputs import ImageInputs
    from jaxdiff.sampling.resolve import resolve_settings
    from jaxdiff.training.train_step import sharded
    from tests.support.published_transformers import AUTOENCODERS, PUBLISHED

    name, text, negative, steps = TRANSFORMERS[family]
    published, vae = PUBLISHED[name], AUTOENCODERS["16 channels"]
    values = {"num_layers": 1, "num_single_layers": 1, "n_layers": 1, "n_refiner_layers": 1} if small else {}
    known = published.config.from_dict(published.values).to_dict()
    config = published.config.from_dict({**published.values, **{k: v for k, v in values.items() if k in known}})
    scheduler = SchedulerConfig.from_dict({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    model = Model(
        None, None, autoencoder(VAEConfig.from_dict({**vae.values, "scaling_factor": 0.3611}), "bfloat16"), None,
        scheduler, transformer=MODULES[published.config](config, dtype=jnp.bfloat16),
    )  # fmt: skip
    count = 8 if family == "flux" and chip.eight.startswith("v5e") else 4
    chips, side = devices(chip, count), 256 if small else 1024
    one = NamedSharding(parallel.data_mesh(chips[:1]), PartitionSpec())
    params = shapes_of(param_shapes(model), one, "bfloat16")
    settings = resolve_settings(model, steps=steps, height=side, width=side)
    mesh, rows = parallel.mesh(count, 1, chips), batch * count
    split = parallel.batch_sharding(mesh)

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=split)

    cond = Conditioning(array(*text), array(768) if family == "flux" else None, None, array(text[0]))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="threefry2x32"), rows))
    inputs = ImageInputs(
        None, None, array(), None, array(*settings.latents), shapes_of(keys, split), array(),
        conditions=(cond, cond if negative else None),
    )  # fmt: skip
    latents = jax.ShapeDtypeStruct((batch, *settings.latents), jnp.float32, sharding=one)
    decoder = jax.jit(lambda params, x: decode(model, params, x)).lower(params, latents)
    parts = (settings.scheduler, settings.clip_skip, settings.hires_upscale, settings.tile)
    program = sampler(model, *parts, mesh).program
    call = shapes_of(jax.tree.map(jnp.asarray, settings.call), parallel.replicated(mesh))
    return program.lower(sharded(mesh, params), call, inputs), decoder, dict(mesh.shape)


def training(family: str, stage: str, chip: Chip, batch: int, small: bool) -> tuple[Any, dict[str, int]]:
    """A training step on latents and tokens, lowered, and the sizes of its mesh."""
    import jax
    import jax.numpy as jnp

    from jaxdiff import parallel
    from jaxdiff.training.defaults import base
    from jaxdiff.training.options import Options
    from jaxdiff.training.train_step import abstract_state, make_train_step, sharded
    from jaxdiff.training.trainables import described

    count = 8 if stage == "unet" else 1
    model, params = model_of(family, small, remat="full")
    config = base()
    config.stage, config.lora.rank = stage, 16
    trainable = described(config, model, params)
    mesh = parallel.mesh(count, 1, devices(chip, count))
    options = Options(steps=1, batch_size=count * batch, fsdp=count)
    state = abstract_state({k: trainable.params[k] for k in trainable.stage.trainable}, options, mesh)
    frozen = {k: x for k, x in trainable.params.items() if k not in trainable.stage.trainable and k != "vae"}
    side = model.unet.config.side
    arrays = {"latents": ((side, side, model.unet.config.in_channels), jnp.float32)}
    for name, tokenizer in (("tokens", model.tokenizer), ("tokens_2", model.tokenizer_2)):
        if tokenizer is not None:
            arrays[name] = ((tokenizer.max_length,), jnp.int32)
    sharding = parallel.batch_sharding(mesh)
    rows = {k: jax.ShapeDtypeStruct((count * batch, *s), d, sharding=sharding) for k, (s, d) in arrays.items()}
    step: Any = make_train_step(trainable.stage.loss, options, mesh, state, trainable.stage.dtypes)
    return step.lower(state, sharded(mesh, frozen), rows), dict(mesh.shape)


def row(case: str, name: str, batch: int, small: bool) -> list[Any]:
    from jaxdiff.training.collectives import collectives

    family, _, variant = case.partition("-")
    chip, start = CHIPS[name], time.perf_counter()
    draws, steps = variant in ("", "fsdp"), STEPS
    if family in TRANSFORMERS:
        lowered, decoder, mesh = transforming(family, chip, batch, small)
        steps = TRANSFORMERS[family][3]
    elif not draws:
        lowered, mesh = training(family, {"full": "unet", "lora": "lora"}[variant], chip, batch, small)
    else:
        lowered, decoder, mesh = sampling(family, chip, batch, small, 8 if variant else 1)
    compiled = lowered.compile()
    seconds, text, memory = time.perf_counter() - start, compiled.as_text(), compiled.memory_analysis()
    cost = {key: compiled.cost_analysis()[key] for key in ("flops", "bytes accessed")}
    if draws:  # the compiler counts a loop's body once
        decoder_cost = decoder.compile().cost_analysis()
        cost = {key: steps * (cost[key] - decoder_cost[key]) + decoder_cost[key] for key in cost}
    messages = collectives(text, mesh)
    least_time = max(cost["flops"] / chip.flops, cost["bytes accessed"] / chip.bandwidth)
    return [
        case, name, batch, f"{memory.argument_size_in_bytes / 1e9:.2f}", f"{memory.temp_size_in_bytes / 1e9:.2f}",
        f"{cost['flops'] / 1e12:.2f}", f"{cost['bytes accessed'] / 1e9:.1f}", text.count('"tpu_custom_call"'),
        ", ".join(f"{c.kind} {c.size / 1e9:.2f} GB" for c in messages) or "none", f"{1e3 * least_time:.0f}",
        f"{seconds:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5e"], choices=CHIPS)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--small", action="store_true", help="small models of the families, to try the script")
    args = parser.parse_args()
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for case in args.cases:
        for chip in args.chips:
            for batch in args.batches:
                try:
                    cells = row(case, chip, batch, args.small)
                except Exception as e:  # XLA's own type for what does not fit is not public
                    if "RESOURCE_EXHAUSTED" not in str(e):
                        raise
                    cells = [case, chip, batch, "does not fit"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
