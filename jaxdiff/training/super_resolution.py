"""The stage "super_resolution": an upscaling network learns to enlarge images that were made small and damaged.

It trains no part of a text-to-image model, which is why what it starts from is made here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config.upscaler import RRDBConfig
from jaxdiff.data.degradation import Degradation
from jaxdiff.io.upscaler import FILE, load_upscaler, open_upscaler, save_upscaler
from jaxdiff.models.rrdb import RRDBNet, param_shapes
from jaxdiff.training.loop import Stage
from jaxdiff.training.metrics import psnr
from jaxdiff.training.options import OptionsError
from jaxdiff.training.ranges import naming
from jaxdiff.training.train_step import Batch, Metrics
from jaxdiff.training.trainables import DEFAULT_TRAINABLE, Trainable
from jaxdiff.typing import PRNG, Array, Key, Params

UPSAMPLES = {2: 1, 4: 2, 8: 3, 16: 4}  # doublings of a fresh network, by its scale
DEGRADATION = ("clean", "blur", "noise", "jpeg", "second")
NAME = "upscaler"  # of the network among the parameters


def network_config(config: Any) -> RRDBConfig:
    """The network that is trained: that of `init_from.upscaler`, or a fresh one of the sizes given."""
    c = config.super_resolution
    if config.init_from.upscaler:
        with naming("init_from.upscaler"):
            return open_upscaler(config.init_from.upscaler)[0]
    if c.scale not in UPSAMPLES:
        raise OptionsError(f"super_resolution.scale {c.scale} must be one of {', '.join(map(str, UPSAMPLES))}.")
    sizes = {name: c[name] for name in ("num_block", "num_feat", "num_grow_ch")}
    return RRDBConfig(**sizes, upsamples=UPSAMPLES[c.scale])


def check(config: Any) -> RRDBConfig:
    """Raise OptionsError for settings that do not fit this stage; returns the network's config."""
    if tuple(config.trainable) != DEFAULT_TRAINABLE:
        raise OptionsError(f"trainable {tuple(config.trainable)} means nothing to this stage: leave it out.")
    given = [name for name, path in config.init_from.items() if path and name != NAME]
    if given or config.model:
        what = f"init_from.{given[0]}" if given else f"model.{next(iter(config.model))}"
        raise OptionsError(
            f"{what} means nothing to the stage super_resolution, which trains an upscaler: leave it out."
        )
    network = network_config(config)
    step, side, crop = network.scale * network.unshuffle, config.data.image_size, config.crop
    for name, size in (("data.image_size", side), ("crop", crop or side)):
        if size < 2 * step or size % step:
            raise OptionsError(f"{name} {size} must be a multiple of {step}, and at least twice that.")
    if crop > side:
        raise OptionsError(f"crop {crop} must be at most data.image_size, {side}.")
    return network


def degradation(config: Any, scale: int) -> Degradation:
    c = config.super_resolution
    return Degradation(scale, config.seed, **{name: c[name] for name in DEGRADATION})


def super_resolution_stage(module: RRDBNet) -> Stage:
    """Absolute error of the enlarged image: Real-ESRGAN's first round, without an adversary.

    Batches hold "image" uint8 [B, H, W, 3], and "hint" uint8 [B, H / scale, W / scale, 3], made of it.
    """

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        image, small = (batch[name].astype(jnp.float32) / 255.0 for name in ("image", "hint"))
        x: Any = module.apply({"params": params[NAME]}, small)
        return jnp.abs(x - image).mean(), {"psnr": psnr(x, image).mean()}

    def prepare(batch: Mapping[str, Any]) -> Batch:
        return {name: batch[name] for name in ("image", "hint")}

    return Stage("super_resolution", (NAME,), loss, prepare, {NAME: module.dtype})


def fresh(module: RRDBNet, key: Key) -> Params:
    """Parameters that begin as a linear enlargement: the colours pass through three channels, and others add little.

    Each pixel repeated, then [1, 2, 1] / 4 along both sides, is that enlargement for one doubling. Learning starts some
    hundred steps further than from wholly random kernels.
    """
    image = jnp.zeros((1, module.config.unshuffle, module.config.unshuffle, 3))
    params = jax.device_get(jax.jit(module.init)(key, image)["params"])
    centre, linear = np.zeros((3, 3)), np.outer([1, 2, 1], [1, 2, 1]) / 16
    centre[1, 1] = 1
    ups = {f"conv_up{i}": linear for i in range(1, module.config.upsamples + 1)}
    for name, taps in {
        "conv_first": centre,
        "conv_body": 0 * centre,
        **ups,
        "conv_hr": centre,
        "conv_last": centre,
    }.items():
        kernel = np.array(params[name]["kernel"])  # [3, 3, in, out]
        kernel[..., :3] = 0.003 * kernel[..., :3]
        for channel in range(3):
            kernel[:, :, channel, channel] = taps
        params[name]["kernel"] = kernel
    return params


def make(config: Any, shapes_only: bool = False) -> Trainable:
    """The network that the config names, with what trains and exports it; `shapes_only` allocates no parameters."""
    network = check(config)
    module = RRDBNet(network, jnp.dtype(config.dtype))
    params: Params
    if shapes_only:
        params = param_shapes(module)
    elif config.init_from.upscaler:
        with naming("init_from.upscaler"):
            params = jax.device_get(load_upscaler(config.init_from.upscaler)[1])
    else:
        params = fresh(module, jax.random.key(config.seed, impl=PRNG))

    def export(folder: Path, params: Params) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_upscaler(folder / FILE, params[NAME])

    trainable = Trainable(super_resolution_stage(module), {NAME: params}, None, export)
    return trainable._replace(make_control_image=degradation(config, network.scale), upscaler=module)
