"""The configs of a model: frozen dataclasses that read and write the `config.json` of each Hugging Face folder.

A key missing from a file takes the default that the PyTorch class of the same name gives it, and keys that only
PyTorch needs are ignored, so that every published file of a supported architecture opens.
"""

from jaxdiff.config.base import Config, ConfigError, read_json
from jaxdiff.config.generator import GeneratorConfig
from jaxdiff.config.networks import (
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    Flux2VAEConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from jaxdiff.config.pipeline import PipelineOptions
from jaxdiff.config.scheduler import SchedulerConfig
from jaxdiff.config.transformers import Flux2Config, FluxConfig, Qwen3Config, SD3Config, T5Config, ZImageConfig

__all__ = [
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "Config",
    "ConfigError",
    "ControlNetConfig",
    "Flux2Config",
    "Flux2VAEConfig",
    "FluxConfig",
    "GeneratorConfig",
    "PipelineOptions",
    "Qwen3Config",
    "SD3Config",
    "SchedulerConfig",
    "T5Config",
    "TinyVAEConfig",
    "UNetConfig",
    "VAEConfig",
    "ZImageConfig",
    "read_json",
]
