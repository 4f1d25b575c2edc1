"""Declarations of settings with their defaults and ranges, and error sentences for invalid values.

A setting is a `dataclasses.Field`, so that one declaration serves the dataclasses of options.py and the tree of
defaults.py. A plain default only declares its type.
"""

import contextlib
import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxdiff.config import ConfigError
from jaxdiff.errors import JaxdiffError, WeightsError

MAX_INT = 2**31 - 1  # devices count in 32 bits
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False", tuple: "a tuple"}
# Settings by their names in other programs.
FOREIGN_NAMES = {
    "lr": "learning_rate", "epochs": "steps", "iterations": "steps", "gradient_accumulation": "accumulate",
    "gradient_accumulation_steps": "accumulate", "gradient_checkpointing": "remat", "mixed_precision": "dtype",
    "precision": "dtype", "max_grad_norm": "clip_norm", "resolution": "data.image_size", "size": "data.image_size",
    "train_data_dir": "data.path", "dataset": "data.path", "validation_prompt": "eval.prompts",
    "network_dim": "lora.rank", "network_alpha": "lora.alpha", "max_train_steps": "steps", "max_train_epochs": "steps",
    "num_train_epochs": "steps", "lr_scheduler": "schedule", "lr_warmup_steps": "warmup_steps",
    "checkpointing_steps": "checkpoint_every", "save_every_n_steps": "checkpoint_every",
    "validation_steps": "eval_every", "instance_data_dir": "data.path", "instance_prompt": "data.captions",
    "class_data_dir": "prior_preservation.path", "enable_bucket": "data.buckets", "noise_offset": "offset_noise",
    "optimizer_type": "optimizer", "use_8bit_adam": "moment_dtype", "caption_column": "data.text_column",
    "placeholder_token": "textual_inversion.token", "initializer_token": "textual_inversion.initial",
    "pretrained_model_name_or_path": "init_from.model",
}  # fmt: skip


class OptionsError(JaxdiffError, ValueError):
    """Settings that do not fit each other, the model or the devices. The message begins with the setting's name."""


@contextlib.contextmanager
def naming(setting: str) -> Iterator[None]:
    """Prefix errors about the file or folder of a setting with its flag."""
    try:
        yield
    except OptionsError:
        raise
    except (ConfigError, WeightsError) as e:
        raise type(e)(f"--config.{setting}: {e}") from None


def setting(
    default: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    choices: Iterable[str] = (),
    kind: type | None = None,
    items: type = str,
    path: bool = False,
) -> Any:
    """A setting: its default and its range.

    Args:
        low, high: inclusive bounds of a number, or of each number in a tuple.
        above, below: the same, exclusive.
        choices: all values of a text; none: any text.
        kind: its type if the default is None, that is, derived from other settings.
        items: the type of a tuple's elements; `object` allows any.
        path: whether it is a path, in which ~ is expanded.
    """
    rule = {"low": low, "high": high, "above": above, "below": below, "choices": tuple(choices), "items": items}
    return dataclasses.field(default=default, metadata={**rule, "kind": kind or type(default), "path": path})


def check_value(name: str, value: Any, field: Any) -> None:
    """Raise OptionsError, with the setting's name, value and range, if the value is invalid."""
    rule, kind = field.metadata, field.metadata["kind"]
    if value is None and field.default is None:
        return
    is_sequence = isinstance(value, tuple | list)
    valid = is_sequence if kind is tuple else _is(kind, value)
    if not valid or not all(_is(rule["items"], x) for x in (value if is_sequence else ())):
        raise OptionsError(f"{name} {value!r} must be {describe(field)}.")
    for x in value if is_sequence else (value,):
        if (rule["choices"] and x not in rule["choices"]) or (isinstance(x, numbers.Real) and not _within(rule, x)):
            raise OptionsError(f"{name} {value!r} must be {_range(rule) or 'finite'}.")


def describe(field: Any) -> str:
    """The type and range of a setting, in words.

    >>> describe(setting(64, 1)), describe(setting(0.9, 0, below=1)), describe(setting(()))
    ('a whole number, at least 1', 'a number, at least 0 and below 1', 'a tuple of text, such as "(\\'a castle\\',)"')
    """
    rule, kind = field.metadata, field.metadata["kind"]
    if kind is not tuple:
        return ", ".join(filter(None, (KINDS[kind], _range(rule))))
    if rule["items"] not in (str, float):
        return KINDS[kind]
    if rule["items"] is str and not rule["choices"]:
        return """a tuple of text, such as "('a castle',)\""""
    return f"a tuple, each {_range(rule)}"


def _is(kind: type, value: Any) -> bool:
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


def _within(rule: Mapping[str, Any], x: Any) -> bool:
    return math.isfinite(x) and rule["low"] <= x <= rule["high"] and rule["above"] < x < rule["below"]


def _range(rule: Mapping[str, Any]) -> str:
    """The range in words; "" if there is none."""
    if rule["choices"]:
        return "one of " + ", ".join(x if x else "'' (none)" for x in rule["choices"])
    if math.isfinite(rule["low"]) and math.isfinite(rule["high"]):
        return f"from {rule['low']} to {rule['high']}"
    bounds = (("at least", "low"), ("above", "above"), ("at most", "high"), ("below", "below"))
    return " and ".join(f"{word} {rule[bound]:.4g}" for word, bound in bounds if math.isfinite(rule[bound]))


def fields(cls: type) -> dict[str, Any]:
    """The settings of a dataclass by name."""
    return {field.name: field for field in dataclasses.fields(cls)}


def check_fields(options: Any) -> None:
    """`check_value` of all fields of a dataclass."""
    for name, field in fields(type(options)).items():
        check_value(name, getattr(options, name), field)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full name, setting) for a tree of settings and plain defaults; an empty group is yielded as it is."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            is_declared = isinstance(value, Mapping | dataclasses.Field)
            yield f"{prefix}{name}", value if is_declared else setting(value)


def suggest(name: str, known: Sequence[str]) -> str:
    """Suggestions for an unknown setting, in words.

    >>> suggest("lr", ["learning_rate", "lora.rank"]), suggest("data.imagesize", ["data.image_size", "seed"])
    ('did you mean learning_rate?', 'did you mean data.image_size?')
    """
    known = sorted(known, key=len)
    name_end, ends = name.rpartition(".")[2], {k: k.rpartition(".")[2] for k in known}
    alias = FOREIGN_NAMES.get(name_end)
    similar = difflib.get_close_matches(name_end, set(ends.values()), 5, 0.7)
    suggestions = [
        *([next((k for k in known if k == alias or k.endswith(f".{alias}")), alias)] if alias else []),
        *(k for k in known if ends[k] == name_end),
        *difflib.get_close_matches(name, known, 3, 0.7),
        *(k for k in known if ends[k] in similar),
        *(k for k in known if name_end in ends[k].split("_")),
    ]
    if not suggestions:
        return "docs/training.md says where all are listed."
    return f"did you mean {' or '.join(list(dict.fromkeys(suggestions))[:3])}?"
