"""Loading autoencoders from their own files: for previews, and to replace a model's autoencoder."""

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
from jaxdiff.io.modules import CONFIG, find_weights, load_module, require_path, without_config
from jaxdiff.io.original_layout import UNET_PREFIX, VAE_PREFIX
from jaxdiff.io.single_file import original_vae, vae_like
from jaxdiff.io.strays import warn_skipped, without_strays
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
        path: a folder, or its file of weights, with or without `config.json` beside it; or one of its author's pair of
            files, `taesd_encoder` and `taesd_decoder`, in the same folder as .safetensors or .pth. Without
            `config.json` the config is inferred from the tensors.
        dtype, variant: see `load_module`.

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix.
    """
    if Path(path).is_file() and (opened := _open_tiny(path)):
        config, source = opened
        tiny = AutoencoderTiny(config, dtype=check_dtype(dtype))
        shapes = module_shapes(tiny, example_image, source.path)
        return tiny, load_tensors(without_strays(source, shapes), shapes, tiny.dtype)
    return load_module(path, TinyVAEConfig, AutoencoderTiny, example_image, dtype, variant)


def check_tiny_vae(path: str | Path) -> None:
    """Raise ConfigError or WeightsError if a path is not a tiny autoencoder; no weights are read."""
    if require_path(path, TinyVAEConfig).is_dir():
        read_config(Path(path) / CONFIG, TinyVAEConfig)
    else:
        _open_tiny(path)


def _open_tiny(path: str | Path) -> tuple[TinyVAEConfig, TensorSource] | None:
    """The config and unread tensors of a tiny autoencoder's file; None if it has a config.json beside it.

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
    """A tiny autoencoder's tensors without any prefix of diffusers' names; other files unchanged."""
    for prefix in filter(None, PREFIXES):
        if f"{prefix}{taesd.FIRST_LAYER}" in source.shapes:
            warn_skipped(source, [name for name in source.shapes if not name.startswith(prefix)])
            return without_prefix(source, prefix)
    return source


def load_vae(
    model: Model, params: Params, path: str | Path, *, variant: str | None = None, mesh: Mesh | None = None
) -> tuple[Model, Params]:
    """The model and parameters with the autoencoder replaced; the arguments are not modified.

    Args:
        path: an autoencoder's folder or its file of weights, or a tiny autoencoder as for `load_tiny_vae`. Without
            `config.json` beside it, and in the original layout (with or without `first_stage_model.`, or in a whole
            checkpoint), the latents are assumed to be scaled like the model's own.
        variant: of a folder's weights, such as "fp16".
        mesh: to shard the parameters over as they are read; see `load`.

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix, also if the latents do not fit.
    """
    described, source = described_vae(model, path, own="vae" in params, variant=variant)
    shapes = module_shapes(described.vae, example_image, source.path)
    return described, {**params, "vae": load_tensors(source, shapes, described.denoising.dtype, mesh)}


def described_vae(
    model: Model, path: str | Path, *, own: bool = True, variant: str | None = None
) -> tuple[Model, TensorSource]:
    """The model of `load_vae`, and the unread tensors of its new autoencoder.

    Args:
        own: whether the model has its own autoencoder, with whose latents the new one's are compared.
    """
    path, config = Path(path), model.vae.config
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give the folder or file of an autoencoder.")
    new_config, source = open_vae(path, config, variant)
    new_model = dataclasses.replace(model, vae=autoencoder(new_config, model.denoising.dtype, model.vae.remat))
    if not own:
        with as_config_error(f"{path} does not fit the model"):
            check_channels(new_model, "it")
    elif (new_config.factor, new_config.latent_channels) != (config.factor, config.latent_channels):
        raise ConfigError(
            f"{path} has {new_config.latent_channels} latent channels, each of {new_config.factor} pixels, the model "
            f"{config.latent_channels} of {config.factor}: take an autoencoder of its family."
        )
    return new_model, source


def check_vae(path: str | Path) -> None:
    """Raise ConfigError or WeightsError if a path is not an autoencoder; no weights are read."""
    if require_path(path, VAEConfig).is_dir():
        read_config(Path(path) / CONFIG, *VAES)
    else:
        _open(path)


def is_vae(path: Path) -> bool:
    """Whether a path is the file or folder of an autoencoder rather than of a whole model."""
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
    """The config and the unread tensors of the autoencoder at an existing path; see `load_vae`.

    Args:
        like: the config of the autoencoder that it replaces, for values that cannot be inferred.
    """
    if path.is_file():
        if pair := taesd.open_pair(path):
            return _with_own_tensors(*pair)
        source = _without_tiny_prefix(_open(path))
        if taesd.FIRST_LAYER in source.shapes and (opened := _open_tiny(path)):
            return _with_own_tensors(*opened)
        kl_config = like if isinstance(like, VAEConfig) else VAEConfig(scaling_factor=like.scaling_factor)
        for prefix in PREFIXES:
            if f"{prefix}encoder.down.0.block.0.conv1.weight" in source.shapes:
                return original_vae(source, prefix, kl_config)
            if prefix and f"{prefix}{DIFFUSERS}" in source.shapes:
                warn_skipped(source, [name for name in source.shapes if not name.startswith(prefix)])
                source = without_prefix(source, prefix)
        if without_config(path):
            return _with_own_tensors(vae_like(vae_from_names(source), kl_config), source)
    file = (path if path.is_dir() else path.parent) / CONFIG
    config: Any = read_config(file, *VAES)
    shapes = module_shapes(autoencoder(config, jnp.float32), example_image, file)  # raises for invalid configs
    if path.is_file():
        return config, without_strays(source, shapes)
    return config, open_tensors(find_weights(path, "vae", variant))


def _with_own_tensors(config: Any, source: TensorSource) -> tuple[Any, TensorSource]:
    """A config and its autoencoder's tensors without strays."""
    shapes = module_shapes(autoencoder(config, jnp.float32), example_image, source.path)
    return config, without_strays(source, shapes)
