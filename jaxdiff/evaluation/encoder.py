"""CLIP's two encoders (Radford et al. 2021): features of images and texts in one space.

An `Encoder` is static, and its parameters are a plain dict, as with `jaxdiff.models.model.Model`.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxdiff.config import CLIPTextConfig, CLIPVisionConfig, Config, ConfigError, read_json
from jaxdiff.errors import WeightsError
from jaxdiff.io.configs import as_config_error, module_shapes, read_config
from jaxdiff.io.model_paths import BUNDLED, bundled
from jaxdiff.io.modules import find_weights, load_tokenizer
from jaxdiff.io.tensor_files import TensorSource, load_tensors, open_tensors
from jaxdiff.models.clip import CLIP_MEAN, CLIP_STD, CLIPTextModel, CLIPVisionModel, TextOutput
from jaxdiff.text.tokenizer import Tokenizer
from jaxdiff.typing import Array, Params

TEXT, VISION = "text_encoder", "vision_encoder"
# Of a transformers folder: the mean and deviation by which pixels are normalised.
PREPROCESSOR = "preprocessor_config.json"
# Prefixes of the tensors of a CLIPModel's halves; the only other tensor is a temperature.
HALVES = {TEXT: ("text_model.", "text_projection."), VISION: ("vision_model.", "visual_projection.")}
EXPECTED_FOLDER = (
    "a folder of a CLIP model as transformers saves it (config.json, model.safetensors, the tokenizer's files), or one "
    "with text_encoder, vision_encoder and tokenizer"
)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """CLIP's encoders and what goes into them; hashable, hence static under `jit`. Holds no parameters."""

    text: CLIPTextModel
    vision: CLIPVisionModel
    tokenizer: Tokenizer
    mean: tuple[float, ...] = CLIP_MEAN  # of pixels in [0, 1], by channel
    std: tuple[float, ...] = CLIP_STD

    @property
    def size(self) -> int:
        """Side in pixels of the vision encoder's input."""
        return self.vision.config.image_size


def image_features(encoder: Encoder, params: Params, pixels: Array) -> Array:
    """Images uint8 [B, S, S, 3], S = `encoder.size` -> features float32 [B, D], not of unit length."""
    x = jnp.asarray(pixels, jnp.float32) / 255.0
    x = (x - jnp.asarray(encoder.mean)) / jnp.asarray(encoder.std)
    features: Array = encoder.vision.apply({"params": params[VISION]}, x)  # type: ignore[assignment]
    return features.astype(jnp.float32)


def text_features(encoder: Encoder, params: Params, tokens: Array) -> Array:
    """Token ids int32 [B, L] -> features float32 [B, D], not of unit length."""
    output: TextOutput = encoder.text.apply({"params": params[TEXT]}, tokens)  # type: ignore[assignment]
    return (output.pooled if output.projected is None else output.projected).astype(jnp.float32)


encode_images = jax.jit(image_features, static_argnums=0)
encode_tokens = jax.jit(text_features, static_argnums=0)


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, int]:
    """Token ids int32 [N, L] of N texts, and the number of texts that were truncated.

    Unlike the tokenizer, it does not warn of each truncated text, which would flood the log for a data set.
    """
    ids = np.full((len(texts), tokenizer.max_length), tokenizer.pad_id, np.int32)
    encoded = tokenizer.encode(texts)
    for row, tokens in zip(ids, encoded, strict=True):
        tokens = tokens[: tokenizer.max_length - 2]
        row[: len(tokens) + 2] = [tokenizer.bos_id, *tokens, tokenizer.eos_id]
    return ids, sum(len(tokens) > tokenizer.max_length - 2 for tokens in encoded)


def check_finite(features: Array) -> np.ndarray:
    """Features as a NumPy array. Raises WeightsError if one is not finite."""
    values = np.asarray(features)
    if not np.isfinite(values).all():
        raise WeightsError("The encoder's features are not finite, so its weights are damaged: give another --encoder.")
    return values


def encode_texts(encoder: Encoder, params: Params, texts: list[str], batch_size: int = 64) -> tuple[np.ndarray, int]:
    """Features float32 [N, D] of N texts, and the number of texts that were truncated.

    Texts are encoded in batches; the last one is padded, so that one compiled program serves all.

    Raises:
        WeightsError: features are not finite.
    """
    if not texts:
        return np.zeros((0, encoder.vision.config.projection_dim), np.float32), 0
    ids, truncated = token_ids(encoder.tokenizer, texts)
    features = []
    for i in range(0, len(texts), batch_size):
        batch = ids[i : i + batch_size]
        padded = batch[np.arange(batch_size) % len(batch)]
        features.append(check_finite(encode_tokens(encoder, params, padded))[: len(batch)])
    return np.concatenate(features), truncated


def square(image: Image.Image, size: int) -> np.ndarray:
    """An RGB image resized (bicubic) so that its shorter side is `size`, and cropped at its centre.

    Only the crop is computed, so that a long strip does not become a huge image.

    Returns:
        uint8 [size, size, 3].
    """
    if image.size == (size, size):
        return np.array(image)
    shorter = min(image.size)
    sides = [side * size // shorter for side in image.size]  # width and height that it would be resized to
    scales = [side / new for side, new in zip(image.size, sides, strict=True)]
    starts = [(new - size) // 2 for new in sides]
    low = [scale * start for scale, start in zip(scales, starts, strict=True)]
    high = [min(scale * (n + size), side) for scale, n, side in zip(scales, starts, image.size, strict=True)]
    box = (low[0], low[1], high[0], high[1])
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box))


def has_encoder(folder: Path) -> bool:
    """Whether a model's folder holds CLIP's vision encoder."""
    return (folder / VISION / "config.json").is_file()


def load_encoder(path: str | Path, dtype: Any = jnp.float32) -> tuple[Encoder, Params]:
    """Open the encoders of a CLIP model.

    Args:
        path: a folder as transformers' CLIPModel saves it; or one with `text_encoder`, `vision_encoder` and
            `tokenizer`, such as a model that jaxdiff trained with them; or the name of a bundled model that has them.
        dtype: of computations and parameters.

    Raises:
        ConfigError, WeightsError: one sentence naming the file and what to do.
    """
    folder = Path(path)
    if not (has_encoder(folder) or (folder / "config.json").is_file()) and (
        str(path) in bundled() or not folder.is_dir()
    ):
        if str(path) not in bundled():
            raise ConfigError(f"{path} is not a folder: give {EXPECTED_FOLDER}.")
        folder = BUNDLED / str(path)
    if has_encoder(folder):
        return _from_parts(folder, jnp.dtype(dtype))
    if (folder / "config.json").is_file():
        return _from_clip_model(folder, jnp.dtype(dtype))
    raise ConfigError(f"{folder} holds no vision encoder to measure images with: give {EXPECTED_FOLDER}.")


def _from_parts(folder: Path, dtype: Any) -> tuple[Encoder, Params]:
    text: Any = read_config(folder / TEXT / "config.json", CLIPTextConfig)
    vision: Any = read_config(folder / VISION / "config.json", CLIPVisionConfig)
    files = {name: open_tensors(find_weights(folder / name, name)) for name in (TEXT, VISION)}
    return _build(folder, folder / "tokenizer", text, vision, files, dtype)


def _from_clip_model(folder: Path, dtype: Any) -> tuple[Encoder, Params]:
    path = folder / "config.json"
    values = read_json(path)
    if values.get("model_type") != "clip":
        raise ConfigError(f"{path} describes a {values.get('model_type')}, not a clip model: give {EXPECTED_FOLDER}.")
    with as_config_error(f"{path} does not describe a CLIPModel"):
        width = {"projection_dim": values.get("projection_dim") or CLIPTextConfig.projection_dim}
        text = CLIPTextConfig.from_dict({**_half_config(values, "text"), **width, "with_projection": True})
        vision = CLIPVisionConfig.from_dict({**_half_config(values, "vision"), **width})
    source = open_tensors(find_weights(folder, VISION))
    files = {name: _select_tensors(source, prefixes) for name, prefixes in HALVES.items()}
    preprocessor = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    with as_config_error(f"{folder / PREPROCESSOR} does not say how pixels are normalised"):
        mean, std = (
            tuple(map(float, preprocessor.get(key) or default))
            for key, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
        )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigError("image_mean and image_std must be three numbers, the second ones above 0")
    encoder, params = _build(folder, folder, text, vision, files, dtype)
    return dataclasses.replace(encoder, mean=mean, std=std), params


def _half_config(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The config of the text or the vision encoder; in old files with two copies, `*_config_dict` takes precedence."""
    return {**(values.get(f"{name}_config") or {}), **(values.get(f"{name}_config_dict") or {})}


def _select_tensors(source: TensorSource, prefixes: tuple[str, ...]) -> TensorSource:
    shapes = {name: shape for name, shape in source.shapes.items() if name.startswith(prefixes)}
    return dataclasses.replace(source, shapes=shapes)


def _build(
    folder: Path,
    tokenizer_folder: Path,
    text: CLIPTextConfig,
    vision: CLIPVisionConfig,
    files: dict[str, TensorSource],
    dtype: Any,
) -> tuple[Encoder, Params]:
    width = text.projection_dim if text.with_projection else text.hidden_size
    if width != vision.projection_dim:
        raise ConfigError(
            f"{folder}: the text encoder gives {width} numbers, the vision encoder {vision.projection_dim}, so they "
            f"cannot be compared: give {EXPECTED_FOLDER}."
        )
    tokenizer = load_tokenizer(tokenizer_folder, text)
    assert tokenizer is not None
    encoder = Encoder(CLIPTextModel(text, dtype=dtype), CLIPVisionModel(vision, dtype=dtype), tokenizer)
    params = {}
    for name, module, inputs in ((TEXT, encoder.text, _dummy_tokens), (VISION, encoder.vision, _dummy_pixels)):
        shapes = module_shapes(module, inputs, folder)
        params[name] = load_tensors(files[name], shapes, dtype)
    if tokenizer.vocab_size > text.vocab_size:
        raise WeightsError(
            f"{tokenizer_folder} has a tokenizer with {tokenizer.vocab_size} tokens, but the text encoder has "
            f"{text.vocab_size}: they belong to different models."
        )
    return encoder, params


def _dummy_tokens(c: Config) -> tuple[Array, ...]:
    return (jnp.zeros((1, 2), jnp.int32),)


def _dummy_pixels(c: Any) -> tuple[Array, ...]:
    return (jnp.zeros((1, c.image_size, c.image_size, 3)),)


def encoder_digest(encoder: Encoder, params: Params) -> str:
    """A digest of everything that the features of images depend on."""
    digest = hashlib.sha256(
        repr((encoder.vision.config, str(encoder.vision.dtype), encoder.mean, encoder.std)).encode()
    )
    for leaf in jax.tree.leaves(params[VISION]):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
