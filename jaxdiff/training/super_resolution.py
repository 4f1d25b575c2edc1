"""The stage "super_resolution": an upscaling network learns to enlarge images that were made small and damaged.

It trains no part of a text-to-image model, so its network is made here and not in `init`.
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

UPSAMPLES = {2: 1, 4: 2, 8: 3, 16: 4}  # number of doublings of a fresh network, by its scale
DEGRADATION = ("clean", "blur", "noise", "jpeg", "second")
NAME = "upscaler"  # of the network among the parameters


def network_config(config: Any) -> RRDBConfig:
    """The config of the network to train: of `init_from.upscaler`, or of a fresh one."""
    options = config.super_resolution
    if config.init_from.upscaler:
        with naming("init_from.upscaler"):
            return open_upscaler(config.init_from.upscaler)[0]
    if options.scale not in UPSAMPLES:
        raise OptionsError(f"super_resolution.scale {options.scale} must be one of {', '.join(map(str, UPSAMPLES))}.")
    sizes = {name: options[name] for name in ("num_block", "num_feat", "num_grow_ch")}
    return RRDBConfig(**sizes, upsamples=UPSAMPLES[options.scale])


def check(config: Any) -> RRDBConfig:
    """Raise OptionsError for settings that do not fit this stage; returns the network's config."""
    if tuple(config.trainable) != DEFAULT_TRAINABLE:
        raise OptionsError(f"trainable {tuple(config.trainable)} means nothing to this stage: leave it out.")
    parts = [name for name, path in config.init_from.items() if path and name != NAME]
    if parts or config.model:
        name = f"init_from.{parts[0]}" if parts else f"model.{next(iter(config.model))}"
        raise OptionsError(
            f"{name} means nothing to the stage super_resolution, which trains an upscaler: leave it out."
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
    options = config.super_resolution
    return Degradation(scale, config.seed, **{name: options[name] for name in DEGRADATION})


def super_resolution_stage(module: RRDBNet) -> Stage:
    """The absolute error of the enlarged image, as in Real-ESRGAN's first phase, without a discriminator.

    Batches hold "image" uint8 [B, H, W, 3], and "hint" uint8 [B, H / scale, W / scale, 3], its degraded version.
    """

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        image, small = (batch[name].astype(jnp.float32) / 255.0 for name in ("image", "hint"))
        x: Any = module.apply({"params": params[NAME]}, small)
        return jnp.abs(x - image).mean(), {"psnr": psnr(x, image).mean()}

    def prepare(batch: Mapping[str, Any]) -> Batch:
        return {name: batch[name] for name in ("image", "hint")}

    return Stage("super_resolution", (NAME,), loss, prepare, {NAME: module.dtype})


def init_network(module: RRDBNet, key: Key) -> Params:
    """Initial parameters close to linear interpolation: three channels carry the colours, the others add little.

    A doubling repeats each pixel and then filters with [1, 2, 1] / 4 along both sides. This saves some hundred steps
    of training, compared with random kernels.
    """
    image = jnp.zeros((1, module.config.unshuffle, module.config.unshuffle, 3))
    params = jax.device_get(jax.jit(module.init)(key, image)["params"])
    identity, interpolation = np.zeros((3, 3)), np.outer([1, 2, 1], [1, 2, 1]) / 16
    identity[1, 1] = 1
    filters = {"conv_first": identity, "conv_body": 0 * identity, "conv_hr": identity, "conv_last": identity}
    filters |= {f"conv_up{i}": interpolation for i in range(1, module.config.upsamples + 1)}
    for name, taps in filters.items():
        kernel = np.array(params[name]["kernel"])  # [3, 3, in, out]
        kernel[..., :3] = 0.003 * kernel[..., :3]
        for channel in range(3):
            kernel[:, :, channel, channel] = taps
        params[name]["kernel"] = kernel
    return params


def make(config: Any, shapes_only: bool = False) -> Trainable:
    """The trainable of the config's network; with `shapes_only` no parameters are allocated."""
    network = check(config)
    module = RRDBNet(network, jnp.dtype(config.dtype))
    params: Params
    if shapes_only:
        params = param_shapes(module)
    elif config.init_from.upscaler:
        with naming("init_from.upscaler"):
            params = jax.device_get(load_upscaler(config.init_from.upscaler)[1])
    else:
        params = init_network(module, jax.random.key(config.seed, impl=PRNG))

    def export(folder: Path, params: Params) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_upscaler(folder / FILE, params[NAME])

    trainable = Trainable(super_resolution_stage(module), {NAME: params}, None, export)
    return trainable._replace(make_control_image=degradation(config, network.scale), upscaler=module)
