"""What peft writes beside a LoRA's tensors about its strength: `adapter_config.json`, or the metadata of diffusers.

peft keeps a layer's alpha out of the file of tensors. Its class `LoraConfig` says what each setting means.
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
STEM = "adapter_model"  # of the file of tensors beside it
MODULES = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
CLASSES = {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2"}
WEIGHTS_CHANGED = ("pissa", "corda", "olora", "loftq", "lora_ga")  # beginnings that change the model's own weights
KINDS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
UNSUPPORTED = (  # settings that change what a layer computes
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "use_bdlora", "use_qalora",
)  # fmt: skip
_OF_PEFT = re.compile(rf"(({'|'.join(MODULES)})\.)?base_model\.").match  # what begins names of tensors

Config = dict[str, Any]


def read_configs(source: TensorSource) -> tuple[dict[str, Config], str | None]:
    """peft's settings by module, without what is empty, and the only module that they are for, where they say so.

    Raises:
        WeightsError: they are damaged, or call for what is not supported.
    """
    text = source.metadata.get("lora_adapter_metadata")
    beside = source.path.parent / FILE
    module = None
    try:
        if text is not None:  # "unet.r", or "r" in a file of one network alone
            found: dict[str, Config] = {}
            for key, value in json.loads(text).items():
                first, _, rest = key.partition(".")
                for name in (first,) if rest and first in MODULES else MODULES:
                    found.setdefault(name, {})[rest if first in MODULES else key] = value
        elif source.path.stem == STEM or any(map(_OF_PEFT, source.shapes)):
            if not beside.is_file():
                logging.warning(
                    "%s has no %s beside it, which says its alpha: taken to be its rank.", source.path, FILE
                )
                return {}, None
            config = read_json(beside)
            found = dict.fromkeys(MODULES, config)
            kind = (config.get("auto_mapping") or {}).get("base_model_class")
            module = source.path.parent.name if source.path.parent.name in MODULES else CLASSES.get(str(kind))
        else:
            return {}, None
        configs = {
            name: {k: v for k, v in config.items() if v or isinstance(v, (int, float))}
            for name, config in found.items()
        }
        for config in configs.values():
            _check(source.path, config)
    except (AttributeError, TypeError, ValueError) as e:
        if isinstance(e, WeightsError):
            raise
        raise WeightsError(
            f"{beside if text is None else source.path} has damaged metadata ({e}): fetch it again."
        ) from None
    return configs, module


def _check(path: Path, config: Config) -> None:
    """Raise WeightsError for settings under which a LoRA's layers mean something else."""
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
    """A layer's alpha, multiplied by what use_rslora adds to it; its rank where nothing is said.

    Args:
        config: its module's, of `read_configs`.
        names: of `peft_names`. The other counts where only with it the settings say the rank that the matrices have.
        rank: of its matrices.
    """
    try:
        ranks = [_by_pattern(config.get("rank_pattern", {}), name, config.get("r", rank)) for name in names]
        name = names[ranks.index(rank)] if rank in ranks else names[0]
        given = config.get("lora_alpha", config.get("alpha", rank))  # peft's LoHa and LoKr call it alpha
        value = float(_by_pattern(config.get("alpha_pattern", {}), name, given))
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
    """What peft called a layer when it wrote a tensor, and what it calls it in another version of transformers.

    Versions differ in whether a text encoder's layers are called `text_model.encoder…` or `encoder…`.

    >>> peft_names("encoder.layers.0.mlp.fc1", "base_model.model.encoder.layers.0.mlp.fc1.lora_A.weight")
    ('encoder.layers.0.mlp.fc1', 'text_model.encoder.layers.0.mlp.fc1')
    """
    full = f"text_model.{name}"
    return (full, name) if "text_model" in tensor else (name, full)


def is_feedforward(config: Mapping[str, Any], name: str) -> bool:
    """Whether an (IA)³ of peft is of a layer's inputs, by its name of `peft_names`."""
    chosen = config.get("feedforward_modules", [])
    return re.fullmatch(chosen, name) is not None if isinstance(chosen, str) else name.endswith(tuple(chosen))


def warn_of_patterns(source: TensorSource, config: Mapping[str, Any], names: Sequence[tuple[str, str]]) -> None:
    """Name alphas by pattern that peft gives to none of the layers, since they are for the other of `peft_names`."""
    for pattern in config.get("alpha_pattern", {}):
        own, others = ([_matches(pattern, pair[i]) for pair in names] for i in (0, 1))
        if any(others) and not any(own):
            logging.warning(
                "%s: the alpha_pattern %s fits none of the layers, such as %s: as in peft, it changes nothing.",
                *(source.path, pattern, names[others.index(True)][0]),
            )


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """What the first pattern says that matches the end of a layer's name, as peft has it (`get_pattern_key`)."""
    return next((x for pattern, x in patterns.items() if _matches(pattern, name)), default)


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
