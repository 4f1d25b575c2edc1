"""Configs of networks from files, and their checks before a model is built from them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    Config,
    ConfigError,
    Flux2Config,
    Flux2VAEConfig,
    FluxConfig,
    GeneratorConfig,
    Qwen3Config,
    SD3Config,
    T5Config,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    ZImageConfig,
    read_json,
)
from jaxdiff.config.scheduler import PREDICTION_TYPES
from jaxdiff.models.layers import ACTIVATIONS
from jaxdiff.models.model import Model
from jaxdiff.models.model import module_shapes as shapes_of
from jaxdiff.typing import Array, Params

NETWORKS: dict[str, type[Config]] = {  # Stable Diffusion's, by folder name, which is also their key in `params`
    "text_encoder": CLIPTextConfig,
    "text_encoder_2": CLIPTextConfig,
    "unet": UNetConfig,
    "vae": VAEConfig,
    "vision_encoder": CLIPVisionConfig,
}
FRESH: dict[str, type[Config]] = {**NETWORKS, "transformer": SD3Config}  # what can be trained from scratch
FOLDERS: dict[str, tuple[type[Config], ...]] = {  # the networks that each folder of a model may hold
    "text_encoder": (CLIPTextConfig, Qwen3Config),
    "text_encoder_2": (CLIPTextConfig, T5Config),
    "text_encoder_3": (T5Config,),
    "unet": (UNetConfig, GeneratorConfig),
    "transformer": (FluxConfig, SD3Config, ZImageConfig, Flux2Config),
    "vae": (VAEConfig, TinyVAEConfig, Flux2VAEConfig),
    "vision_encoder": (CLIPVisionConfig,),
}
VAES = FOLDERS["vae"]
# Configs of transformers name no class: the start of their `model_type` instead.
MODEL_TYPES: dict[type[Config], str] = {T5Config: "t5", Qwen3Config: "qwen3"}
DTYPES = ("float32", "bfloat16", "float16")


@contextlib.contextmanager
def as_config_error(sentence: str) -> Iterator[None]:
    """Turn the errors that invalid config values raise into a ConfigError that begins with `sentence`."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(f"{sentence}: {e}") from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as e:
        raise ConfigError(f"{sentence} ({e!r}).") from None


def read_config(path: Path, *known: type[Config]) -> Config:
    """Read a network's `config.json` as the one of the `known` classes that it names; the first if it names none.

    Raises:
        ConfigError: the file is missing or damaged, names another class, or has an unsupported value.
    """
    values = read_json(path)
    model_type = str(values.get("model_type", "clip"))
    default = next((cls for cls in known if model_type == MODEL_TYPES.get(cls)), known[0])
    class_name = str(values.get("_class_name", default.CLASS_NAME)).removeprefix("Flax")
    for cls in known:
        if class_name == cls.CLASS_NAME and model_type.startswith(MODEL_TYPES.get(cls, "clip")):
            with as_config_error(f"{path} does not describe a {cls.CLASS_NAME}"):
                config = cls.from_dict(values)
                _check_activation(config)
            return config
    names = " or ".join(cls.CLASS_NAME for cls in known)
    described = values.get("model_type", class_name)
    raise ConfigError(f"{path} describes a {described}, but {names} is needed: choose a model that has one.")


def _check_activation(config: Config) -> None:
    for key in ("act_fn", "hidden_act"):
        name = getattr(config, key, "silu")
        if name not in tuple(ACTIVATIONS):
            raise ConfigError(f"{key} {name!r} is unknown; known are {', '.join(ACTIVATIONS)}.")


def module_shapes(module: Any, inputs: Callable[[Any], tuple[Array, ...]], source: Path) -> Params:
    """The shapes of a module's parameters. Raises ConfigError if its config, read from `source`, is invalid."""
    with as_config_error(f"{source} does not describe a {module.config.CLASS_NAME}"):
        arrays = inputs(module.config)
        return shapes_of(module, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))


def example_image(c: VAEConfig | TinyVAEConfig) -> tuple[Array, ...]:
    """The smallest input of an autoencoder."""
    return (jnp.zeros((1, c.factor, c.factor, c.in_channels)),)


def check_channels(model: Model, source: Path | str) -> None:
    """Raise ConfigError if the denoiser's input channels fit no supported task, or another autoencoder's latents.

    Channels beyond the latents are a mask and the masked image's latents, or a low-resolution image to upscale.
    """
    latent = model.vae.config.latent_channels
    if model.transformer is not None:
        if (channels := model.transformer.config.latent_channels) != latent:
            raise ConfigError(
                f"{source} has a transformer of {channels} latent channels and an autoencoder of {latent}: take the "
                "autoencoder of the transformer's family."
            )
        return
    channels = model.unet.config.in_channels
    tasks = {latent: "text to image", 2 * latent + 1: "inpainting", latent + 3: "upscaling"}
    if channels in tasks:
        return
    other_tasks = {2 * latent: ", as InstructPix2Pix does", latent + 1: ", as depth-to-image models do"}
    supported = ", ".join(f"{n} for {task}" for n, task in tasks.items())
    raise ConfigError(
        f"{source} has a UNet that takes {channels} channels{other_tasks.get(channels, '')}; supported are "
        f"{supported}: choose such a model."
    )


def check_dtype(dtype: Any) -> Any:
    """The dtype of this name or type, float32 for None. Raises ConfigError if it is not one of `DTYPES`."""
    name = "float32" if dtype is None else dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; known are {', '.join(DTYPES)}.")
    return jnp.dtype(name)


def check_prediction_type(name: str | None) -> None:
    """Raise ConfigError for a prediction type that is neither None nor one of `PREDICTION_TYPES`."""
    if name not in (None, *PREDICTION_TYPES):
        raise ConfigError(f"prediction_type {name!r} is unknown; known are {', '.join(PREDICTION_TYPES)}.")


def replace_config(model: Model, name: str, **changes: Any) -> Model:
    """The model with some values of one module's config changed, such as a measured `scaling_factor`."""
    module = getattr(model, name)
    return dataclasses.replace(model, **{name: module.copy(config=dataclasses.replace(module.config, **changes))})
