"""train.py --plan: memory and communication of a run, on a mesh that may be larger than this machine."""

import os
import subprocess
import sys
from typing import Any

from jaxdiff.cli.errors import UsageError

QUICK, FULL = "quick", "full"


def run(config: Any, kind: str, devices: int, argv: list[str]) -> int:
    """Print the plan of a config of train.py; returns the exit code.

    Args:
        config: see jaxdiff/training/defaults.py.
        kind: "quick", or "full", which compiles the step to add its memory and communication.
        devices: number of devices of the whole mesh; 0: those of this machine.
        argv: the command line, run again with simulated devices if this machine has fewer.
    """
    import jax

    if kind not in (QUICK, FULL):
        raise UsageError(f"--plan={kind} must be {QUICK} or {FULL}.")
    devices = devices or jax.device_count()
    if devices < 1:
        raise UsageError(f"--plan_devices={devices} must be at least 1.")
    if kind == FULL and devices > jax.device_count():
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        # The program never runs, so skip optimisations.
        flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        return subprocess.run([sys.executable, *argv], env=env).returncode
    print(text(config, kind, devices))
    return 0


def text(config: Any, kind: str, devices: int) -> str:
    """The plan of a config; a full one needs `devices` devices, which may be simulated."""
    import jax

    from jaxdiff import parallel
    from jaxdiff.training import memory_plan
    from jaxdiff.training.options import Options
    from jaxdiff.training.train_step import abstract_state, cast_frozen, sharded

    options = Options.from_config(config)
    options.check(devices)
    mesh: Any = memory_plan.abstract_mesh(devices, options.fsdp, options.tensor)
    if kind == FULL:
        mesh = parallel.mesh(options.fsdp, options.tensor, jax.devices()[:devices])
    stage, shapes, example = describe(config)
    trained = {name: shapes[name] for name in stage.trainable}
    state = abstract_state(trained, options, mesh)
    frozen = {name: x for name, x in shapes.items() if name not in trained}
    frozen = sharded(mesh, jax.eval_shape(lambda params: cast_frozen(params, options), frozen))
    batch = memory_plan.abstract_batch(stage, example, options.batch_size, mesh)
    step = memory_plan.compiled_step(stage, state, frozen, batch, options, mesh) if kind == FULL else None
    return memory_plan.report(memory_plan.memory(state, frozen, batch), step, mesh, trained)


def describe(config: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(stage, shapes of all parameters, one example) of a config, without reading weights or images."""
    import numpy as np

    from jaxdiff.io.configs import replace_config
    from jaxdiff.models.model import param_shapes
    from jaxdiff.text.tokenizer import train_bpe
    from jaxdiff.training import trainables
    from jaxdiff.training.checks import check_sizes, image_size
    from jaxdiff.training.init import described_model

    if config.stage == "super_resolution":
        from jaxdiff.training import super_resolution

        trainable = super_resolution.make(config, shapes_only=True)
        side = config.crop or config.data.image_size
        image, scale = np.zeros((1, side, side, 3), np.uint8), trainable.upscaler.config.scale
        return trainable.stage, trainable.params, {"image": image, "hint": image[:, ::scale, ::scale]}
    sizes = config.tokenizer
    model = described_model(
        config.model.to_dict(), config.init_from.to_dict(), lambda: train_bpe(["a"], 520, sizes.max_length),
        dtype=config.dtype, remat=config.remat,
    )  # fmt: skip
    check_sizes(config, model)
    if not (config.init_from.model or config.init_from.text_encoder):
        model = replace_config(model, "text_encoder", vocab_size=sizes.vocab_size)
    plan_config = config.copy_and_resolve_references()
    plan_config.controlnet.init_from = ""  # it has the UNet's shape: no need to read its weights
    plan_config.adversary.init_from = ""
    trainable = trainables.described(plan_config, model, param_shapes(model))
    side = image_size(config, model)
    input_side = config.crop or side
    example: dict[str, Any] = {"image": np.zeros((1, input_side, input_side, 3), np.uint8), "text": [""]}
    if config.cache_latents:
        latents = np.zeros((1, *[side // model.vae.config.factor] * 2, model.vae.config.latent_channels), np.float16)
        example = {**{k: v for k, v in trainable.stage.prepare(example).items() if k != "image"}, "latents": latents}
    return trainable.stage, trainable.params, example
