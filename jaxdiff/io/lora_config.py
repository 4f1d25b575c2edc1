"""peft's settings of a LoRA, which determine its strength: `adapter_config.json`, or the metadata of diffusers.

peft does not store a layer's alpha among the tensors. Its class `LoraConfig` documents the settings.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from jaxdiff.config import read_json
from jaxdiff.errors import WeightsError
from jaxdiff.io.lycoris import OPEN
from jaxdiff.io.tensor_files import TensorSource

FILE = "adapter_config.json"
STEM = "adapter_model"  # of the file of tensors next to FILE
MODULES = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
CLASSES = {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2"}
WEIGHTS_CHANGED = ("pissa", "corda", "olora", "loftq", "lora_ga")  # initialisations that change the model's weights
KINDS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
UNSUPPORTED = (  # settings that change what a layer computes
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "use_bdlora", "use_qalora",
)  # fmt: skip
_OF_PEFT = re.compile(rf"(({'|'.join(MODULES)})\.)?base_model\.").match  # what begins names of tensors

Config = dict[str, Any]


def read_configs(source: TensorSource) -> tuple[dict[str, Config], str | None]:
    """peft's non-empty settings by module, and the only module they apply to, or None if they do not say.

    Raises:
        WeightsError: they are damaged or unsupported.
    """
    text = source.metadata.get("lora_adapter_metadata")
    config_path = source.path.parent / FILE
    module = None
    try:
        if text is not None:  # keys "unet.r", or "r" in a file of only one network
            by_module: dict[str, Config] = {}
            for key, value in json.loads(text).items():
                prefix, _, setting = key.partition(".")
                for name in (prefix,) if setting and prefix in MODULES else MODULES:
                    by_module.setdefault(name, {})[setting if prefix in MODULES else key] = value
        elif source.path.stem == STEM or any(map(_OF_PEFT, source.shapes)):
            if not config_path.is_file():
                logging.warning(
                    "%s has no %s beside it, which says its alpha: taken to be its rank.", source.path, FILE
                )
                return {}, None
            config = read_json(config_path)
            by_module = dict.fromkeys(MODULES, config)
            kind = (config.get("auto_mapping") or {}).get("base_model_class")
            module = source.path.parent.name if source.path.parent.name in MODULES else CLASSES.get(str(kind))
        else:
            return {}, None
        configs = {
            name: {k: v for k, v in config.items() if v or isinstance(v, (int, float))}
            for name, config in by_module.items()
        }
        for config in configs.values():
            _check(source.path, config)
    except (AttributeError, TypeError, ValueError) as e:
        if isinstance(e, WeightsError):
            raise
        raise WeightsError(
            f"{config_path if text is None else source.path} has damaged metadata ({e}): fetch it again."
        ) from None
    return configs, module


def _check(path: Path, config: Config) -> None:
    """Raise WeightsError for settings that change the meaning of a LoRA's tensors."""
    if (kind := config.get("peft_type", "LORA")) not in KINDS:
        raise WeightsError(f"{path} is a {kind} adapter by its {FILE}: give a {OPEN}.")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(WEIGHTS_CHANGED):
        raise WeightsError(
            f"{path} starts from other weights than the model's (init_lora_weights {start}): let peft save it as a "
            "plain LoRA, with path_initial_model_for_weight_conversion."
        )
    if other := [name for name in UNSUPPORTED if config.get(name)]:
        raise WeightsError(f"{path} needs {other[0]}, which is not supported: train a plain LoRA.")


def alpha(source: TensorSource, config: Mapping[str, Any], names: tuple[str, str], rank: int) -> float:
    """A layer's alpha with the factor of use_rslora; by default its rank.

    Args:
        config: of the layer's module, from `read_configs`.
        names: from `peft_names`. The second is used if only its settings match the matrices' rank.
        rank: of the layer's matrices.
    """
    try:
        ranks = [_by_pattern(config.get("rank_pattern", {}), name, config.get("r", rank)) for name in names]
        name = names[ranks.index(rank)] if rank in ranks else names[0]
        default = config.get("lora_alpha", config.get("alpha", rank))  # peft's LoHa and LoKr call it alpha
        value = float(_by_pattern(config.get("alpha_pattern", {}), name, default))
        if not math.isfinite(value):
            raise ValueError(f"alpha {value}")
    except (AttributeError, TypeError, ValueError, re.error) as e:
        raise WeightsError(f"{source.path} has damaged metadata ({e}): fetch it again.") from None
    if rank not in ranks:
        raise WeightsError(
            f"{source.path} has matrices of rank {rank} for {name}, its settings say {ranks[0]}: the two do not belong "
            f"together; fetch the file with its own {FILE}."
        )
    return value * math.sqrt(rank) if config.get("use_rslora") else value


def peft_names(name: str, tensor: str) -> tuple[str, str]:
    """The name that peft had for a layer when it wrote a tensor, and its name in other versions of transformers.

    Versions call a text encoder's layers either `text_model.encoder…` or `encoder…`.

    >>> peft_names("encoder.layers.0.mlp.fc1", "base_model.model.encoder.layers.0.mlp.fc1.lora_A.weight")
    ('encoder.layers.0.mlp.fc1', 'text_model.encoder.layers.0.mlp.fc1')
    """
    full = f"text_model.{name}"
    return (full, name) if "text_model" in tensor else (name, full)


def is_feedforward(config: Mapping[str, Any], name: str) -> bool:
    """Whether peft's (IA)³ scales the inputs of the layer with this name, from `peft_names`."""
    modules = config.get("feedforward_modules", [])
    return re.fullmatch(modules, name) is not None if isinstance(modules, str) else name.endswith(tuple(modules))


def warn_of_patterns(source: TensorSource, config: Mapping[str, Any], names: Sequence[tuple[str, str]]) -> None:
    """Warn of alpha patterns that match no layer by its first name from `peft_names`, but some by the second."""
    for pattern in config.get("alpha_pattern", {}):
        matches, other_matches = ([_matches(pattern, pair[i]) for pair in names] for i in (0, 1))
        if any(other_matches) and not any(matches):
            logging.warning(
                "%s: the alpha_pattern %s fits none of the layers, such as %s: as in peft, it changes nothing.",
                *(source.path, pattern, names[other_matches.index(True)][0]),
            )


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a layer's name, as in peft's `get_pattern_key`."""
    return next((x for pattern, x in patterns.items() if _matches(pattern, name)), default)


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
