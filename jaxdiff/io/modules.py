"""The parts of a diffusers folder: networks, each a folder with `config.json` and weights, and tokenizers."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxdiff.config import CLIPTextConfig, Config, ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.files import atomic_write, writing
from jaxdiff.io import cache
from jaxdiff.io.configs import check_dtype, module_shapes, read_config
from jaxdiff.io.tensor_files import load_tensors, save_tensors
from jaxdiff.text.plain_tokenizer import PlainTokenizer
from jaxdiff.text.tokenizer import Tokenizer
from jaxdiff.typing import Array, Params

STEMS = {  # names of weight files: first those that diffusers or transformers write, then others
    "unet": ("diffusion_pytorch_model", "diffusion_flax_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_flax_model"),
    "text_encoder": ("model", "pytorch_model", "flax_model"),
    "text_encoder_2": ("model", "pytorch_model", "flax_model"),
    "text_encoder_3": ("model", "pytorch_model", "flax_model"),
    "vision_encoder": ("model", "pytorch_model", "flax_model"),
}
SUFFIXES = (  # of those files, in order of preference; {} is the variant
    ".safetensors.index{}.json",
    "{}.safetensors",
    ".bin.index{}.json",
    "{}.bin",
    "{}.msgpack",
)
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def _weights(folder: Path, name: str, variant: str) -> Path | None:
    """The preferred file of a module's weights, or None; `variant` is ".fp16", "" for none or ".*" for any."""
    patterns = (stem + suffix.format(variant) for stem in STEMS.get(name, STEMS["unet"]) for suffix in SUFFIXES)
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def find_weights(folder: Path, name: str, variant: str | None = None) -> Path:
    """The file of a module's weights, or the index of several files.

    Args:
        folder: the module's.
        name: of the module, a key of `STEMS`.
        variant: "fp16" reads `….fp16.safetensors`; None reads files without a variant, else any.

    Raises:
        WeightsError: the folder has no such file.
    """
    for infix in (f".{variant}",) if variant else ("", ".*"):
        if path := _weights(folder, name, infix):
            return path
    if variant:
        raise WeightsError(f"{folder} holds no weights of the variant {variant!r}: leave it out, or name another.")
    raise WeightsError(f"{folder / STEMS[name][0]}.safetensors is missing: is the folder a complete diffusers folder?")


def variant_of(folder: Path, name: str, variant: str | None) -> str | None:
    """`variant` if the module has weights of it, else None."""
    return variant if variant and _weights(folder, name, f".{variant}") else None


def load_module(
    path: str | Path,
    config_class: type[Config],
    module_class: Callable[..., Any],
    inputs: Callable[[Any], tuple[Array, ...]],
    dtype: Any = None,
    variant: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Any, Params]:
    """One network and its parameters.

    Args:
        path: a folder as diffusers' `save_pretrained` writes it, or its file of weights next to `config.json`.
        config_class, module_class: of the config and the module.
        inputs: from the config to example inputs for initialising the module.
        dtype: dtype of computation and parameters, "float32" by default.
        variant: of a folder's weights, such as "fp16".
        mesh: to shard the parameters over, see `load_tensors`.

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix.
    """
    path, dtype = require_path(path, config_class), check_dtype(dtype)
    config_path = (path if path.is_dir() else path.parent) / CONFIG
    module = module_class(read_config(config_path, config_class), dtype=dtype)
    shapes = module_shapes(module, inputs, config_path)
    weights = find_weights(path, "unet", variant) if path.is_dir() else path
    return module, load_tensors(weights, shapes, dtype, mesh)


def require_path(path: str | Path, config_class: type[Config]) -> Path:
    """The path of a network; raises ConfigError if it does not exist."""
    if not str(path) or not Path(path).exists():
        raise ConfigError(f"{path} does not exist: give a {config_class.CLASS_NAME} folder or .safetensors file.")
    return Path(path)


def without_config(path: str | Path) -> bool:
    """Whether a network is one file without `config.json` beside it."""
    return Path(path).is_file() and not (Path(path).parent / CONFIG).is_file()


def save_module(folder: str | Path, module: Any, params: Params, *, dtype: Any = None) -> None:
    """Write a folder that PyTorch diffusers and `load_module` open; an existing one is replaced.

    Weights are written last, and those of another config are removed first: if the process is killed, the folder may
    lack weights, but never mixes weights and config of two networks. With the same config, the old weights stay until
    the new ones are complete.

    Raises:
        WeightsError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).exists()):
        raise WeightsError(f"{folder} exists and is not the folder of a network: save to another one.")
    with writing(folder, WeightsError, "choose another place or free it."):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / WEIGHTS) as weights, atomic_write(folder / CONFIG) as config:  # renamed first
            save_tensors(weights, params, None if dtype is None else check_dtype(dtype))
            write_json(config, module.config.to_dict())
            is_same_config = (folder / CONFIG).is_file() and (folder / CONFIG).read_bytes() == config.read_bytes()
            for old in (path for stem in STEMS["unet"] for path in folder.glob(f"{stem}*")):
                if not is_same_config or old.name != WEIGHTS:  # an old index would be read instead of the new file
                    old.unlink()


def load_tokenizer(folder: Path, text: Config | None, family: str = "", sd3_length: int = 256) -> Any:
    """The tokenizer of a text encoder, limited to the encoder's length; None if `text` is None.

    Args:
        family: see `Model.family`; only needed for models with a transformer. The chat template of Qwen3 allows
            thinking in Z-Image and disables it in FLUX.2.
        sd3_length: number of tokens for SD 3's T5.
    """
    if text is None:
        return None
    if not isinstance(text, CLIPTextConfig):
        thinking = {"z_image": True, "flux2": False}.get(family)
        return PlainTokenizer.load(folder, sd3_length if family == "sd3" else 512, thinking)
    tokenizer = Tokenizer.load(folder)
    length = min(tokenizer.max_length, text.max_position_embeddings)
    return dataclasses.replace(tokenizer, max_length=length, cache=cache.local_folder())


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
