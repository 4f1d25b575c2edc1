"""Folders of the transformer families: the parts of each pipeline, and checks that they fit together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdiff.config import CLIPTextConfig, Config, ConfigError, Qwen3Config, T5Config
from jaxdiff.config.pipeline import PipelineOptions
from jaxdiff.io.modules import CONFIG
from jaxdiff.models.model import FAMILIES, Model
from jaxdiff.models.text_encoding import FLUX2_LAYERS
from jaxdiff.text.plain_tokenizer import PlainTokenizer

INDEX = "model_index.json"
# By family with a transformer: the default guidance scale of its pipeline, and the configs of its text encoders.
GUIDANCE = {"": PipelineOptions.guidance_scale, "flux": 3.5, "sd3": 7.0, "z_image": 5.0, "flux2": 4.0}
ENCODERS: dict[str, dict[str, type[Config]]] = {
    "flux": {"text_encoder": CLIPTextConfig, "text_encoder_2": T5Config},
    "sd3": {"text_encoder": CLIPTextConfig, "text_encoder_2": CLIPTextConfig, "text_encoder_3": T5Config},
    "z_image": {"text_encoder": Qwen3Config},
    "flux2": {"text_encoder": Qwen3Config},
}
PIPELINES = {
    "flux": "FluxPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "z_image": "ZImagePipeline",
    "flux2": "Flux2KleinPipeline",
}


def check_encoders(folder: Path, configs: Mapping[str, Any]) -> None:
    """Raise ConfigError if a transformer's text encoder is missing or of another class; T5 is optional in SD 3."""
    family = FAMILIES[type(configs["transformer"])]
    for name, cls in ENCODERS[family].items():
        if configs[name] is None and name != "text_encoder_3":
            needed = f"which {PIPELINES[family]} needs ({cls.CLASS_NAME})"
            raise ConfigError(f"{folder / INDEX} lists no {name}, {needed}: fetch the whole model.")
        if configs[name] is not None and not isinstance(configs[name], cls):
            raise ConfigError(
                f"{folder / name / CONFIG} is not of a {cls.CLASS_NAME}, which {PIPELINES[family]} needs: put the one "
                "of the published model there."
            )
    for name, expected, actual in text_widths(family, configs):
        if expected != actual:
            raise ConfigError(
                f"{folder} has a transformer that reads texts of {name} {expected} and text encoders that make "
                f"{actual}: they are of different models, fetch the whole model again."
            )


def text_widths(family: str, configs: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Names of a transformer's text widths, the widths in its config, and those of its text encoders."""
    c, (first, second, third) = configs["transformer"], (configs[f"text_encoder{end}"] for end in ("", "_2", "_3"))
    if family == "flux":
        return [
            ("joint_attention_dim", c.joint_attention_dim, second.d_model),
            ("pooled_projection_dim", c.pooled_projection_dim, first.hidden_size),
        ]
    if family == "sd3":
        pooled = first.projection_dim + second.projection_dim
        states = c.joint_attention_dim if third is None else third.d_model
        return [
            ("joint_attention_dim", c.joint_attention_dim, max(states, first.hidden_size + second.hidden_size)),
            ("pooled_projection_dim", c.pooled_projection_dim, pooled),
        ]
    if family == "flux2":
        return [("joint_attention_dim", c.joint_attention_dim, len(FLUX2_LAYERS) * first.hidden_size)]
    return [("cap_feat_dim", c.cap_feat_dim, first.hidden_size)]


def transformer_index(model: Model) -> dict[str, Any]:
    """`model_index.json` of a family with a transformer."""
    index: dict[str, Any] = {
        "_class_name": PIPELINES[model.family],
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", model.scheduler.class_name],
        "transformer": ["diffusers", model.transformer.config.CLASS_NAME],
        "vae": ["diffusers", model.vae.config.CLASS_NAME],
    }
    for name in ENCODERS[model.family]:
        index[name] = encoder_class(getattr(model, name))
        tokenizer = name.replace("text_encoder", "tokenizer")
        index[tokenizer] = tokenizer_class(getattr(model, tokenizer))
    if model.family in ("flux", "sd3"):
        index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    if model.family == "flux2":
        index["is_distilled"] = model.options.is_distilled
    if model.options.guidance_scale != GUIDANCE[model.family]:
        index["_guidance_scale"] = model.options.guidance_scale
    for name in ("steps", "max_sequence_length"):
        if (value := getattr(model.options, name)) != getattr(PipelineOptions, name):
            index[f"_{name}"] = value
    return index


def tokenizer_class(tokenizer: Any) -> list[str | None]:
    if tokenizer is None:
        return [None, None]
    if not isinstance(tokenizer, PlainTokenizer):
        return ["transformers", "CLIPTokenizer"]
    return ["transformers", "T5TokenizerFast" if tokenizer.thinking is None else "Qwen2Tokenizer"]


def encoder_class(encoder: Any) -> list[str | None]:
    return [None, None] if encoder is None else ["transformers", encoder.config.to_dict()["architectures"][0]]
