"""Autoencoders from their own files: for previews, and to replace the one of a model."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxdiff.config import ConfigError, TinyVAEConfig, VAEConfig
from jaxdiff.io import taesd
from jaxdiff.io.configs import VAES, check_dtype, example_image, module_shapes, read_config
from jaxdiff.io.modules import CONFIG, load_module
from jaxdiff.io.original_layout import VAE_PREFIX
from jaxdiff.io.single_file import load_original_vae
from jaxdiff.io.tensor_files import TensorSource, load_tensors, open_tensors
from jaxdiff.models.model import Model, autoencoder
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.typing import Params


def load_tiny_vae(path: str | Path, *, dtype: Any = None, variant: str | None = None) -> tuple[AutoencoderTiny, Params]:
    """A tiny autoencoder (TAESD) for previews, and its parameters.

    Args:
        path: a folder or file as `load_module` has it; or one of its author's pair of files, `taesd_encoder` and
            `taesd_decoder`, which lie side by side as .safetensors or .pth: the config follows from their tensors.
        dtype, variant: see `load_module`.

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix.
    """
    path = Path(path)
    if path.is_file() and (pair := taesd.open_pair(path)):
        return _from_pair(*pair, dtype)
    return load_module(path, TinyVAEConfig, AutoencoderTiny, example_image, dtype, variant)


def _from_pair(config: TinyVAEConfig, source: TensorSource, dtype: Any) -> tuple[AutoencoderTiny, Params]:
    tiny = AutoencoderTiny(config, dtype=check_dtype(dtype))
    return tiny, load_tensors(source, module_shapes(tiny, example_image, source.path), tiny.dtype)


def load_vae(model: Model, params: Params, path: str | Path, *, variant: str | None = None) -> tuple[Model, Params]:
    """A model with its autoencoder replaced, and parameters to match; the arguments stay as they are.

    Args:
        path: an autoencoder's folder, or its file of weights with `config.json` beside it; a file in the original
            layout (with or without `first_stage_model.`; a whole checkpoint too), whose latents are then taken to be
            scaled as the model's own; or a tiny autoencoder as `load_tiny_vae` has it.
        variant: of a folder's weights, such as "fp16".

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix; it may be of latents that do not fit.
    """
    path, own = Path(path), model.vae.config
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give the folder or file of an autoencoder.")
    vae, tree = _read_vae(path, model, variant)
    found = vae.config
    if (found.factor, found.latent_channels) != (own.factor, own.latent_channels):
        raise ConfigError(
            f"{path} has {found.latent_channels} latent channels, each of {found.factor} pixels, the model "
            f"{own.latent_channels} of {own.factor}: take an autoencoder of its family."
        )
    return dataclasses.replace(model, vae=vae), {**params, "vae": tree}


def _read_vae(path: Path, model: Model, variant: str | None) -> tuple[Any, Params]:
    """The autoencoder at a path, and its parameters. See `load_vae`."""
    own, dtype = model.vae.config, model.unet.dtype
    if path.is_file():
        if pair := taesd.open_pair(path):
            return _from_pair(*pair, dtype)
        source = open_tensors(path)
        for prefix in (VAE_PREFIX, ""):
            if f"{prefix}encoder.down.0.block.0.conv1.weight" in source.shapes:
                like = own if isinstance(own, VAEConfig) else VAEConfig(scaling_factor=own.scaling_factor)
                config, tree = load_original_vae(source, prefix, like, dtype)
                return autoencoder(config, dtype, model.vae.remat), tree
    folder = path if path.is_dir() else path.parent
    kind = type(read_config(folder / CONFIG, *VAES))
    return load_module(path, kind, lambda c, dtype: autoencoder(c, dtype), example_image, dtype, variant)
