"""Autoencoders from their own files: for previews, and to replace the one of a model."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from jaxdiff.config import ConfigError, TinyVAEConfig, VAEConfig
from jaxdiff.errors import WeightsError
from jaxdiff.io import kinds, taesd
from jaxdiff.io.configs import (
    VAES,
    as_config_error,
    check_channels,
    check_dtype,
    example_image,
    module_shapes,
    read_config,
)
from jaxdiff.io.infer_config import as_weights_error
from jaxdiff.io.infer_diffusers import vae_from_names
from jaxdiff.io.modules import CONFIG, existing, load_module, without_config
from jaxdiff.io.original_layout import VAE_PREFIX
from jaxdiff.io.single_file import load_original_vae, vae_like
from jaxdiff.io.tensor_files import TensorSource, load_tensors, open_tensors
from jaxdiff.models.model import Model, autoencoder
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.typing import Params

PREFIXES = (VAE_PREFIX, "vae.", "")
NAMES = rf"({'|'.join(map(re.escape, PREFIXES))})((en|de)coder\.(conv_in|down|mid|up|layers\.\d+\.(conv|weight))|\d+\.)"


def load_tiny_vae(path: str | Path, *, dtype: Any = None, variant: str | None = None) -> tuple[AutoencoderTiny, Params]:
    """A tiny autoencoder (TAESD) for previews, and its parameters.

    Args:
        path: a folder, or its file of weights, with `config.json` beside it or without; or one of its author's pair of
            files, `taesd_encoder` and `taesd_decoder`, which lie side by side as .safetensors or .pth. Without
            `config.json` the config follows from the tensors.
        dtype, variant: see `load_module`.

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix.
    """
    if Path(path).is_file() and (found := _open_tiny(path)):
        return _from_pair(*found, dtype)
    return load_module(path, TinyVAEConfig, AutoencoderTiny, example_image, dtype, variant)


def check_tiny_vae(path: str | Path) -> None:
    """Raise ConfigError or WeightsError if a path holds no tiny autoencoder, before any weights are read."""
    if existing(path, TinyVAEConfig).is_dir():
        read_config(Path(path) / CONFIG, TinyVAEConfig)
    else:
        _open_tiny(path)


def _open_tiny(path: str | Path) -> tuple[TinyVAEConfig, TensorSource] | None:
    """The config and the unread tensors of a tiny autoencoder's file; None where a config.json beside it tells more.

    Raises:
        WeightsError: the file is something else.
    """
    if pair := taesd.open_pair(path):
        return pair
    source = open_tensors(path)
    kinds.refuse(source, "a tiny autoencoder")
    if not without_config(path):
        return None
    with as_weights_error(source):
        return taesd.infer_config(source), source


def _from_pair(config: TinyVAEConfig, source: TensorSource, dtype: Any) -> tuple[AutoencoderTiny, Params]:
    tiny = AutoencoderTiny(config, dtype=check_dtype(dtype))
    return tiny, load_tensors(source, module_shapes(tiny, example_image, source.path), tiny.dtype)


def load_vae(model: Model, params: Params, path: str | Path, *, variant: str | None = None) -> tuple[Model, Params]:
    """A model with its autoencoder replaced, and parameters to match; the arguments stay as they are.

    Args:
        path: an autoencoder's folder or its file of weights; without `config.json` beside it, and in the original
            layout (with or without `first_stage_model.`; a whole checkpoint too), the latents are taken to be scaled as
            the model's own; or a tiny autoencoder as `load_tiny_vae` has it.
        variant: of a folder's weights, such as "fp16".

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix; it may be of latents that do not fit.
    """
    path, own = Path(path), model.vae.config
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give the folder or file of an autoencoder.")
    vae, tree = _read_vae(path, model, variant)
    found = vae.config
    if "vae" not in params:  # no autoencoder of its own to compare with
        with as_config_error(f"{path} does not fit the model"):
            check_channels(dataclasses.replace(model, vae=vae), "it")
    elif (found.factor, found.latent_channels) != (own.factor, own.latent_channels):
        raise ConfigError(
            f"{path} has {found.latent_channels} latent channels, each of {found.factor} pixels, the model "
            f"{own.latent_channels} of {own.factor}: take an autoencoder of its family."
        )
    return dataclasses.replace(model, vae=vae), {**params, "vae": tree}


def check_vae(path: str | Path) -> None:
    """Raise ConfigError or WeightsError if a path holds no autoencoder, before any weights are read."""
    if existing(path, VAEConfig).is_dir():
        read_config(Path(path) / CONFIG, *VAES)
    else:
        _open(path)


def _open(path: Path | str) -> TensorSource:
    """The unread tensors of an autoencoder's file. Raises WeightsError if it is something else."""
    source = open_tensors(path)
    if not any(re.match(NAMES, name) for name in source.shapes):
        kinds.refuse(source, "an autoencoder alone")
        raise WeightsError(f"{path} holds no autoencoder: give the file of one.")
    return source


def _read_vae(path: Path, model: Model, variant: str | None) -> tuple[Any, Params]:
    """The autoencoder at a path, and its parameters. See `load_vae`."""
    own, dtype = model.vae.config, model.unet.dtype
    if path.is_file():
        if pair := taesd.open_pair(path):
            return _from_pair(*pair, dtype)
        if (source := _open(path)) and without_config(path) and taesd.FIRST_LAYER in source.shapes:
            return load_tiny_vae(path, dtype=dtype)
        like = own if isinstance(own, VAEConfig) else VAEConfig(scaling_factor=own.scaling_factor)
        for prefix in PREFIXES:
            if f"{prefix}encoder.down.0.block.0.conv1.weight" in source.shapes:
                config, tree = load_original_vae(source, prefix, like, dtype)
                return autoencoder(config, dtype, model.vae.remat), tree
        if without_config(path):
            vae: Any = autoencoder(vae_like(vae_from_names(source), like), dtype, model.vae.remat)
            return vae, load_tensors(source, module_shapes(vae, example_image, path), dtype)
    folder = path if path.is_dir() else path.parent
    kind = type(read_config(folder / CONFIG, *VAES))
    return load_module(path, kind, lambda c, dtype: autoencoder(c, dtype), example_image, dtype, variant)
