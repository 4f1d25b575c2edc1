"""What a training step of Stable Diffusion 1.5's UNet sends on 8 devices, and what that projects to on more.

    python -m benchmarks.scaling [--meshes 1x1 8x1 2x2] [--side 64]

Compiles the step for simulated devices and allocates nothing; each mesh (fsdp x tensor) takes one or two minutes.
docs/scaling.md holds the output and says what the projection takes for granted.
"""

import argparse
import os
from typing import NamedTuple

DEVICES, TEXT = 8, (77, 768)


class Chip(NamedTuple):
    """Published figures, of Google Cloud's pages on each (docs.cloud.google.com/tpu/docs/v5p and /v5e)."""

    name: str
    peak: float  # bfloat16 FLOP/s
    ici: float  # bytes/s that a chip sends to its neighbours: half of the bidirectional bandwidth
    dcn: float  # bytes/s that a chip's share of the data centre's network sends
    slice: int  # chips that speak over ICI, at most
    images: int  # a chip and step


CHIPS = (
    Chip("v5p", 459e12, 1200e9 / 2, 50e9 / 8, 6144, 8),
    Chip("v5e", 197e12, 400e9 / 2, 6.4e12 / 256 / 8, 256, 4),
)
MFU, REACHED = 0.4, 0.7  # assumed: shares of the peak, and of the links' bandwidth


def project(chip: Chip, chips: int, gradient: float, flops: float) -> tuple[float, float, float]:
    """Seconds to compute, to sum gradients within slices and between them.

    Gradients are scattered and gathered by rings within a slice, and each chip sums its part with its counterparts in
    the other slices. Divided parameters (fsdp) send as much: a gather and a scatter in place of the sum's two halves.

    Args:
        gradient: bytes.
        flops: of one image.
    """
    within = min(chips, chip.slice)
    slices = chips // within
    compute = chip.images * flops / (chip.peak * MFU)
    inside = 2 * (within - 1) / within * gradient / (chip.ici * REACHED)
    between = 2 * (slices - 1) / slices * gradient / within / (chip.dcn * REACHED)
    return compute, inside, between


def projection(gradient: float, flops: float) -> str:
    """A Markdown table of weak scaling."""
    head = "| chip | images a chip | chips | compute | ICI | DCN | efficiency, nothing hidden | all hidden |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for chip in CHIPS:
        for chips in (8, 64, 256, 1024, 4096):
            compute, inside, between = project(chip, chips, gradient, flops)
            sent = inside + between
            lines.append(
                f"| {chip.name} | {chip.images} | {chips:,} | {compute * 1e3:.0f} ms | {inside * 1e3:.1f} ms | "
                f"{between * 1e3:.1f} ms | {compute / (compute + sent):.0%} | {compute / max(compute, sent):.0%} |"
            )
    return "\n".join(lines)


def compile_step(fsdp: int, tensor: int, side: int):
    """(mesh, what `jaxdiff.training.memory_plan.compiled_step` tells) of a batch of one image a device."""
    import jax
    import jax.numpy as jnp

    from jaxdiff import parallel
    from jaxdiff.config import UNetConfig
    from jaxdiff.models.unet import UNet2DConditionModel
    from jaxdiff.training import memory_plan
    from jaxdiff.training.loop import Stage
    from jaxdiff.training.options import Options
    from jaxdiff.training.train_step import abstract_state

    unet = UNet2DConditionModel(UNetConfig(sample_size=64, cross_attention_dim=TEXT[1], attention_head_dim=8))

    def loss(params, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (side, side, 4)))(keys)
        times = 1000 * jax.vmap(jax.random.uniform)(keys)
        out = unet.apply({"params": params["unet"]}, batch["latents"] + noise, times, batch["text"])
        return ((out - noise) ** 2).mean(), {}

    mesh, options = parallel.mesh(fsdp, tensor), Options(steps=1, batch_size=DEVICES, fsdp=fsdp, tensor=tensor)
    shapes = {"latents": (DEVICES, side, side, 4), "text": (DEVICES, *TEXT)}
    batch = {k: jax.ShapeDtypeStruct(v, jnp.float32, sharding=parallel.batch_sharding(mesh)) for k, v in shapes.items()}
    x, t, text = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, side, side, 4), (1,), (1, *TEXT)))
    params = {"unet": jax.eval_shape(unet.init, jax.random.key(0), x, t, text)["params"]}
    state = abstract_state(params, options, mesh)
    return mesh, memory_plan.compiled_step(Stage("unet", ("unet",), loss), state, {}, batch, options, mesh)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--meshes", nargs="+", default=["1x1", "8x1", "2x2"], help="fsdp x tensor, of 8 devices")
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    from jaxdiff.training import collectives

    for text in args.meshes:
        mesh, step = compile_step(*map(int, text.split("x")), args.side)
        shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        print(
            f"\n{shape}: {step.flops / 1e12:.2f} TFLOP and {step.temporary / 1e9:.1f} GB beside the state, a device\n"
        )
        print(collectives.collectives_table(step.sent), flush=True)
        if dict(mesh.shape) == {"data": DEVICES, "fsdp": 1, "tensor": 1}:
            print("\n" + projection(step.sent[0].size, step.flops))


if __name__ == "__main__":
    main()
