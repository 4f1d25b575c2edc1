"""ControlNets in and out: diffusers folders and files."""

from pathlib import Path
from typing import Any

from jaxdiff.config import ControlNetConfig
from jaxdiff.io.modules import load_module, save_module
from jaxdiff.models.controlnet import ControlNet, example_inputs
from jaxdiff.typing import Params


def load_controlnet(path: str | Path, *, dtype: Any = None, variant: str | None = None) -> tuple[ControlNet, Params]:
    """A ControlNet and its parameters.

    Args:
        path: a folder as diffusers writes it, or its file of weights with `config.json` beside it.
        dtype: type to compute in and to hold the parameters in, "float32" by default.
        variant: of a folder's weights, such as "fp16".

    Raises:
        ConfigError, WeightsError: one sentence naming the file and the mend.
    """
    return load_module(path, ControlNetConfig, ControlNet, example_inputs, dtype, variant)


def save_controlnet(folder: str | Path, controlnet: ControlNet, params: Params, *, dtype: Any = None) -> None:
    """Write a ControlNet as a folder that PyTorch diffusers opens; raises WeightsError if it cannot be written."""
    save_module(folder, controlnet, params, dtype=dtype)
