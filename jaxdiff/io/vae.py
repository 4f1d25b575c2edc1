"""Autoencoders from their own files: for previews, and to replace the one of a model."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

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
from jaxdiff.io.modules import CONFIG, existing, find_weights, load_module, without_config
from jaxdiff.io.original_layout import UNET_PREFIX, VAE_PREFIX
from jaxdiff.io.single_file import original_vae, vae_like
from jaxdiff.io.strays import pass_over, without_strays
from jaxdiff.io.tensor_files import TensorSource, load_tensors, open_tensors, without_prefix
from jaxdiff.models.model import Model, autoencoder
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.typing import Params

PREFIXES = (VAE_PREFIX, "vae.", "")
DIFFUSERS = "encoder.down_blocks.0.resnets.0.conv1.weight"  # a tensor under diffusers' names
_TINY = r"\d+\.(conv|weight)"
NAMES = rf"({'|'.join(map(re.escape, PREFIXES))})((en|de)coder\.(conv_in|down|mid|up|layers\.{_TINY})|{_TINY})"


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
    """The config and unread tensors of a tiny autoencoder's file; None if a config.json beside it describes it.

    Raises:
        WeightsError: the file is something else.
    """
    if pair := taesd.open_pair(path):
        return pair
    source = _without_tiny_prefix(open_tensors(path))
    if taesd.FIRST_LAYER not in source.shapes:
        kinds.refuse(source, "a tiny autoencoder")
    if not without_config(path):
        return None
    with as_weights_error(source):
        return taesd.infer_config(source), source


def _without_tiny_prefix(source: TensorSource) -> TensorSource:
    """A tiny autoencoder's tensors under diffusers' names, whatever stands before them; others as they are."""
    for prefix in filter(None, PREFIXES):
        if f"{prefix}{taesd.FIRST_LAYER}" in source.shapes:
            pass_over(source, [name for name in source.shapes if not name.startswith(prefix)])
            return without_prefix(source, prefix)
    return source


def _from_pair(config: TinyVAEConfig, source: TensorSource, dtype: Any) -> tuple[AutoencoderTiny, Params]:
    tiny = AutoencoderTiny(config, dtype=check_dtype(dtype))
    shapes = module_shapes(tiny, example_image, source.path)
    return tiny, load_tensors(without_strays(source, shapes), shapes, tiny.dtype)


def load_vae(
    model: Model, params: Params, path: str | Path, *, variant: str | None = None, mesh: Mesh | None = None
) -> tuple[Model, Params]:
    """A model with its autoencoder replaced, and parameters to match; the arguments stay as they are.

    Args:
        path: an autoencoder's folder or its file of weights; without `config.json` beside it, and in the original
            layout (with or without `first_stage_model.`; a whole checkpoint too), the latents are taken to be scaled as
            the model's own; or a tiny autoencoder as `load_tiny_vae` has it.
        variant: of a folder's weights, such as "fp16".
        mesh: what the parameters are divided over as they are read; see `load`.

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix; it may be of latents that do not fit.
    """
    described, source = described_vae(model, path, own="vae" in params, variant=variant)
    shapes = module_shapes(described.vae, example_image, source.path)
    return described, {**params, "vae": load_tensors(source, shapes, described.denoising.dtype, mesh)}


def described_vae(
    model: Model, path: str | Path, *, own: bool = True, variant: str | None = None
) -> tuple[Model, TensorSource]:
    """The model of `load_vae`, and the unread tensors of its new autoencoder.

    Args:
        own: whether the model has an autoencoder of its own, with whose latents the new one's are compared.
    """
    path, config = Path(path), model.vae.config
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give the folder or file of an autoencoder.")
    found, source = open_vae(path, config, variant)
    changed = dataclasses.replace(model, vae=autoencoder(found, model.denoising.dtype, model.vae.remat))
    if not own:
        with as_config_error(f"{path} does not fit the model"):
            check_channels(changed, "it")
    elif (found.factor, found.latent_channels) != (config.factor, config.latent_channels):
        raise ConfigError(
            f"{path} has {found.latent_channels} latent channels, each of {found.factor} pixels, the model "
            f"{config.latent_channels} of {config.factor}: take an autoencoder of its family."
        )
    return changed, source


def check_vae(path: str | Path) -> None:
    """Raise ConfigError or WeightsError if a path holds no autoencoder, before any weights are read."""
    if existing(path, VAEConfig).is_dir():
        read_config(Path(path) / CONFIG, *VAES)
    else:
        _open(path)


def is_vae(path: Path) -> bool:
    """Whether a path is one autoencoder's file or folder, and not of a whole model."""
    if path.is_dir():
        return (path / CONFIG).is_file()
    return path.is_file() and not any(name.startswith(UNET_PREFIX) for name in open_tensors(path).shapes)


def _open(path: Path | str) -> TensorSource:
    """The unread tensors of an autoencoder's file. Raises WeightsError if it is something else."""
    source = open_tensors(path)
    if not any(re.match(NAMES, name) for name in source.shapes):
        kinds.refuse(source, "an autoencoder alone")
        raise WeightsError(f"{path} holds no autoencoder: give the file of one.")
    return source


def open_vae(
    path: Path, like: VAEConfig | TinyVAEConfig, variant: str | None = None
) -> tuple[VAEConfig | TinyVAEConfig, TensorSource]:
    """The config and the unread tensors of the autoencoder at a path that exists; see `load_vae`.

    Args:
        like: the config of the autoencoder whose place it takes: what neither tensors nor `config.json` tell is as
            there.
    """
    if path.is_file():
        if pair := taesd.open_pair(path):
            return _alone(*pair)
        source = _without_tiny_prefix(_open(path))
        if taesd.FIRST_LAYER in source.shapes and (found := _open_tiny(path)):
            return _alone(*found)
        known = like if isinstance(like, VAEConfig) else VAEConfig(scaling_factor=like.scaling_factor)
        for prefix in PREFIXES:
            if f"{prefix}encoder.down.0.block.0.conv1.weight" in source.shapes:
                return original_vae(source, prefix, known)
            if prefix and f"{prefix}{DIFFUSERS}" in source.shapes:
                pass_over(source, [name for name in source.shapes if not name.startswith(prefix)])
                source = without_prefix(source, prefix)
        if without_config(path):
            return _alone(vae_like(vae_from_names(source), known), source)
    file = (path if path.is_dir() else path.parent) / CONFIG
    config: Any = read_config(file, *VAES)
    shapes = module_shapes(autoencoder(config, jnp.float32), example_image, file)  # complains
    if path.is_file():
        return config, without_strays(source, shapes)
    return config, open_tensors(find_weights(path, "vae", variant))


def _alone(config: Any, source: TensorSource) -> tuple[Any, TensorSource]:
    """A config and the tensors that are of its autoencoder."""
    shapes = module_shapes(autoencoder(config, jnp.float32), example_image, source.path)
    return config, without_strays(source, shapes)
