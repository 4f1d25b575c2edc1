"""Diffusers folders in and out: `model_index.json`, and a folder of config and weights for each module."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxdiff.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    Config,
    ConfigError,
    SchedulerConfig,
    UNetConfig,
    VAEConfig,
    read_json,
)
from jaxdiff.io.weights import WeightsError, load_tensors, save_tensors
from jaxdiff.models.model import Model, build, param_shapes
from jaxdiff.tokenizer import Tokenizer
from jaxdiff.typing import Params

BUNDLED = Path(__file__).parent.parent / "bundled"
CONFIGS: dict[str, type[Config]] = {
    "text_encoder": CLIPTextConfig,
    "unet": UNetConfig,
    "vae": VAEConfig,
    "vision_encoder": CLIPVisionConfig,
}
WEIGHTS = {  # file names as diffusers (first two) and transformers write them
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vision_encoder": "model.safetensors",
}
COMPONENTS = (*CONFIGS, "tokenizer", "scheduler", "model_index.json")
DTYPES = ("float32", "bfloat16", "float16")


def find(name_or_path: str | Path) -> Path:
    """The folder of a model: a path, or the name of a bundled model. Raises ConfigError naming what there is."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    bundled = BUNDLED / str(name_or_path)
    if str(name_or_path).isidentifier() and bundled.is_dir():
        return bundled
    known = ", ".join(sorted(p.name for p in BUNDLED.glob("*/"))) or "none"
    raise ConfigError(f"{name_or_path} is no folder and no bundled model (bundled: {known}): give a diffusers folder.")


def check_dtype(dtype: Any) -> Any:
    """A floating type by name or as a type. Raises ConfigError listing the known."""
    name = "float32" if dtype is None else dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; known are {', '.join(DTYPES)}.")
    return jnp.dtype(name)


def load_model(folder: Path, dtype: Any = None, *, remat: bool = False) -> Model:
    """The model of a folder without its weights; computes in `dtype`."""
    read_json(folder / "model_index.json")
    text, tokenizer = CLIPTextConfig.load(folder / "text_encoder" / "config.json"), Tokenizer.load(folder / "tokenizer")
    length = min(tokenizer.max_length, text.max_position_embeddings)
    vision = folder / "vision_encoder"
    return build(
        text,
        UNetConfig.load(folder / "unet" / "config.json"),
        VAEConfig.load(folder / "vae" / "config.json"),
        dataclasses.replace(tokenizer, max_length=length),
        SchedulerConfig.load(folder / "scheduler" / "scheduler_config.json"),
        CLIPVisionConfig.load(vision / "config.json") if vision.is_dir() else None,
        dtype=check_dtype(dtype),
        remat=remat,
    )


def load(name_or_path: str | Path, *, dtype: Any = None, remat: bool = False) -> tuple[Model, Params]:
    """Open a model.

    Args:
        name_or_path: a diffusers folder, or the name of a bundled model ("icons").
        dtype: type to compute in and to hold the parameters in: "float32" (default), "bfloat16" or "float16".
        remat: recompute activations in the backward pass, for gradients through large models.

    Returns:
        The model, static under `jit`, and its parameters on the default device. Each tensor goes from the
        memory-mapped file straight to its place, so that the peak is the parameters and one tensor.

    Raises:
        ConfigError, WeightsError: one sentence naming the file and the mend.
    """
    folder, dtype = find(name_or_path), check_dtype(dtype)
    model = load_model(folder, dtype, remat=remat)
    try:
        shapes = param_shapes(model)
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise ConfigError(f"the configs in {folder} do not make a model ({e}).") from None
    return model, {name: load_tensors(folder / name / WEIGHTS[name], shapes[name], dtype) for name in shapes}


def model_index(model: Model) -> dict[str, Any]:
    """`model_index.json`: the pipeline and the classes that PyTorch diffusers opens the folder with."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", model.scheduler.class_name],
        "text_encoder": ["transformers", model.text_encoder and model.text_encoder.config.to_dict()["architectures"][0]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save(folder: str | Path, model: Model, params: Params, *, dtype: Any = None) -> None:
    """Write a diffusers folder that PyTorch diffusers and `load` open; whole or not at all.

    Args:
        folder: made; if it is a model's folder already, its model is replaced and other files in it stay; any other
            non-empty folder is refused.
        dtype: type of the tensors written; as they are by default.

    Raises:
        WeightsError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "model_index.json").exists() and (folder.is_file() or any(folder.iterdir())):
        raise WeightsError(f"{folder} exists and is no model's folder: name another one to save to.")
    dtype = None if dtype is None else check_dtype(dtype)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            new = Path(temporary) / "new"
            write_model(new, model, params, dtype)
            exchange(folder, new, Path(temporary) / "old")
    except OSError as e:
        raise WeightsError(
            f"{folder} cannot be written ({e.strerror or e}): choose another place or free it."
        ) from None


def exchange(folder: Path, new: Path, old: Path) -> None:
    """Put `new` in the place of `folder`, if there is one, along with its files that are no part of a model."""
    if not folder.exists():
        new.rename(folder)
        return
    for other in folder.iterdir():  # a model card, samples
        if other.name not in COMPONENTS:
            copy = shutil.copytree if other.is_dir() else shutil.copy2
            copy(other, new / other.name)
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise


def write_model(folder: Path, model: Model, params: Params, dtype: Any) -> None:
    for name, module in model.modules.items():
        write_json(folder / name / "config.json", module.config.to_dict())
        save_tensors(folder / name / WEIGHTS[name], params[name], dtype)
    assert model.tokenizer is not None
    model.tokenizer.save(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler.to_dict())
    write_json(folder / "model_index.json", model_index(model))


def replace_config(model: Model, name: str, **changes: Any) -> Model:
    """The model with some values of one module's config changed, such as a measured `scaling_factor`."""
    module = getattr(model, name)
    return dataclasses.replace(model, **{name: module.copy(config=dataclasses.replace(module.config, **changes))})
