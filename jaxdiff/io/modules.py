"""Single networks in and out: a folder of `config.json` and weights, as diffusers writes one for each network."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdiff.config import Config, ConfigError, TinyVAEConfig, VAEConfig
from jaxdiff.errors import WeightsError
from jaxdiff.files import atomic_write
from jaxdiff.io import taesd
from jaxdiff.io.configs import module_shapes, picture, read_config
from jaxdiff.io.original_layout import VAE_PREFIX
from jaxdiff.io.pretrained import VAES, check_dtype, find_weights, write_json
from jaxdiff.io.single_file import load_original_vae
from jaxdiff.io.tensor_files import open_tensors
from jaxdiff.io.torch_names import load_tensors, save_tensors
from jaxdiff.models.model import Model, autoencoder
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.typing import Array, Params

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


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
    module = module_class(read_config(file, config_class), dtype=dtype)
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
        with atomic_write(folder / CONFIG) as config, atomic_write(folder / WEIGHTS) as weights:
            save_tensors(weights, params, None if dtype is None else check_dtype(dtype))
            write_json(config, module.config.to_dict())
    except OSError as e:
        raise WeightsError(
            f"{folder} cannot be written ({e.strerror or e}): choose another place or free it."
        ) from None


def load_tiny_vae(path: str | Path, *, dtype: Any = None, variant: str | None = None) -> tuple[AutoencoderTiny, Params]:
    """A tiny autoencoder (TAESD) for previews, and its parameters.

    Args:
        path: a folder or file as `load_module` has it; or one of its author's pair of files, `taesd_encoder` and
            `taesd_decoder`, which lie side by side as .safetensors or .pth: the config follows from their tensors.
        dtype, variant: see `load_module`.

    Raises:
        ConfigError, WeightsError: one sentence naming the file and the mend.
    """
    if Path(path).is_file() and (pair := taesd.open_pair(path)):
        config, source = pair
        tiny = AutoencoderTiny(config, dtype=check_dtype(dtype))
        return tiny, load_tensors(source, module_shapes(tiny, picture, source.path), tiny.dtype)
    return load_module(path, TinyVAEConfig, AutoencoderTiny, picture, dtype, variant)


def load_vae(model: Model, params: Params, path: str | Path, *, variant: str | None = None) -> tuple[Model, Params]:
    """A model with another autoencoder in the place of its own, and parameters to match; those given stay as they are.

    Args:
        path: an autoencoder's folder, or its file of weights with `config.json` beside it; a file in the original
            layout (with or without `first_stage_model.`; a whole checkpoint too), whose latents are then taken to be
            scaled as the model's own; or a tiny autoencoder as `load_tiny_vae` has it.
        variant: of a folder's weights, such as "fp16".

    Raises:
        ConfigError, WeightsError: one sentence naming the file and the mend; it may be of latents that do not fit.
    """
    path, own, dtype = Path(path), model.vae.config, model.unet.dtype
    if not path.exists():
        raise ConfigError(f"{path} is missing: give an autoencoder's folder or file.")
    vae: Any = None
    tree: Params = {}
    if path.is_file():
        if taesd.open_pair(path):
            vae, tree = load_tiny_vae(path, dtype=dtype)
        source = open_tensors(path)
        for prefix in (VAE_PREFIX, ""):
            if f"{prefix}encoder.down.0.block.0.conv1.weight" in source.shapes:
                like = own if isinstance(own, VAEConfig) else VAEConfig(scaling_factor=own.scaling_factor)
                config, tree = load_original_vae(source, prefix, like, dtype)
                vae = autoencoder(config, dtype, model.vae.remat)
    if vae is None:
        folder = path if path.is_dir() else path.parent
        kind = type(read_config(folder / CONFIG, *VAES))
        vae, tree = load_module(path, kind, lambda c, dtype: autoencoder(c, dtype), picture, dtype, variant)
    found = vae.config
    if (found.factor, found.latent_channels) != (own.factor, own.latent_channels):
        raise ConfigError(
            f"{path} has {found.latent_channels} latent channels, each of {found.factor} pixels, the model "
            f"{own.latent_channels} of {own.factor}: take an autoencoder of its family."
        )
    return dataclasses.replace(model, vae=vae), {**params, "vae": tree}
