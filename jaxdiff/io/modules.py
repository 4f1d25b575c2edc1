"""Single networks in and out: a folder of `config.json` and weights, as diffusers writes one for each network."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.config import Config, ConfigError, TinyVAEConfig, read_json
from jaxdiff.io.pretrained import check_dtype, find_weights, write_json
from jaxdiff.io.weights import WeightsError, load_tensors, save_tensors
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.typing import Array, Params

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def module_shapes(module: Any, inputs: Callable[[Any], tuple[Array, ...]], source: Path) -> Params:
    """The shapes of a module's parameters; raises ConfigError if its config, read from `source`, makes no network."""
    try:
        return jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs(module.config))["params"])
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as e:
        raise ConfigError(f"{source} does not describe a {module.config.CLASS_NAME} ({e}).") from None


def load_module(
    path: str | Path,
    config_class: type[Config],
    module_class: Callable[..., Any],
    inputs: Callable[[Any], tuple[Array, ...]],
    dtype: Any = None,
    variant: str | None = None,
) -> tuple[Any, Params]:
    """One network and its parameters.

    Args:
        path: a folder as diffusers' `save_pretrained` writes it, or its file of weights with `config.json` beside it.
        config_class, module_class: what `config.json` is read as, and the module made of it.
        inputs: from the config to inputs that the module can be initialised with.
        dtype: type to compute in and to hold the parameters in, "float32" by default.
        variant: of a folder's weights, such as "fp16".

    Raises:
        ConfigError, WeightsError: one sentence naming the file and the mend.
    """
    path, dtype = Path(path), check_dtype(dtype)
    if not path.exists():
        raise ConfigError(f"{path} is missing: give a {config_class.CLASS_NAME}'s folder or its .safetensors file.")
    file = (path if path.is_dir() else path.parent) / CONFIG
    values = read_json(file)
    found = values.get("_class_name", config_class.CLASS_NAME)
    if found != config_class.CLASS_NAME:
        raise ConfigError(f"{file} is of a {found}: give the folder of a {config_class.CLASS_NAME}.")
    module = module_class(config_class.from_dict(values), dtype=dtype)
    shapes = module_shapes(module, inputs, file)
    return module, load_tensors(find_weights(path, "unet", variant) if path.is_dir() else path, shapes, dtype)


def save_module(folder: str | Path, module: Any, params: Params, *, dtype: Any = None) -> None:
    """Write a folder that PyTorch diffusers and `load_module` open, over such a folder or a new one.

    Raises:
        WeightsError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).exists()):
        raise WeightsError(f"{folder} exists and is no network's folder: name another one to save to.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
            new = Path(temporary)
            save_tensors(new / WEIGHTS, params, None if dtype is None else check_dtype(dtype))
            write_json(new / CONFIG, module.config.to_dict())
            for name in (WEIGHTS, CONFIG):
                os.replace(new / name, folder / name)
    except OSError as e:
        raise WeightsError(
            f"{folder} cannot be written ({e.strerror or e}): choose another place or free it."
        ) from None


def load_tiny_vae(path: str | Path, *, dtype: Any = None, variant: str | None = None) -> tuple[AutoencoderTiny, Params]:
    """A tiny autoencoder (TAESD) for previews, and its parameters: see `load_module`."""

    def inputs(c: TinyVAEConfig) -> tuple[Array, ...]:
        return (jnp.zeros((1, c.factor, c.factor, c.in_channels)),)

    return load_module(path, TinyVAEConfig, AutoencoderTiny, inputs, dtype, variant)
