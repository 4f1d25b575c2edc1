"""The configs of a model: frozen dataclasses that read and write the `config.json` of each Hugging Face folder.

A key missing from a file takes the default that the PyTorch class of the same name gives it, and keys that only
PyTorch needs are ignored, so that every published file of a supported architecture opens.
"""

from jaxdiff.config.base import Config, ConfigError, read_json
from jaxdiff.config.networks import (
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from jaxdiff.config.pipeline import PipelineOptions
from jaxdiff.config.scheduler import SchedulerConfig

__all__ = [
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "Config",
    "ConfigError",
    "ControlNetConfig",
    "PipelineOptions",
    "SchedulerConfig",
    "TinyVAEConfig",
    "UNetConfig",
    "VAEConfig",
    "read_json",
]
