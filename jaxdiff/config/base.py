"""The base class of all configs: reading and writing the dict of a `config.json`."""

import dataclasses
import functools
import json
import math
import types
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from jaxdiff.errors import JaxdiffError
from jaxdiff.files import not_fetched


class ConfigError(JaxdiffError, ValueError):
    """A config that cannot be read or is not supported."""


def _frozen(value: Any) -> Any:
    """Lists as tuples, so that a config is hashable and can be static under `jit`."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


# Fields that count layers, which are bounded in case a file is damaged.
LAYERS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers", "num_encoder_blocks",
          "num_decoder_blocks")  # fmt: skip
MOST_LAYERS = 1000
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value has a field's type; integers count as floats, booleans as neither."""
    if isinstance(kind, types.UnionType):
        return any(_has_type(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        item, *others = get_args(kind)
        has_length = others == [...] or (isinstance(value, tuple) and len(value) == 1 + len(others))
        return isinstance(value, tuple) and has_length and all(_has_type(v, item) for v in value)
    if isinstance(value, bool) or kind is bool:
        return kind is bool and value in (False, True)
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind))


def _type_name(kind: Any) -> str:
    """A field's type in words."""
    if isinstance(kind, types.UnionType):
        return " or ".join(_type_name(k) for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is tuple:
        return f"a list, each of which is {_type_name(get_args(kind)[0])}"
    return KINDS.get(kind, str(kind))


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


@dataclasses.dataclass(frozen=True)
class Config:
    """Base: reading from and writing to the dict of a `config.json`."""

    CLASS_NAME: ClassVar[str] = ""
    NULLABLE: ClassVar[tuple[str, ...]] = ()  # fields whose default is not None, but for which null means None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The config with the values of a `config.json`; unknown keys are ignored.

        Raises:
            ConfigError: a value has the wrong type, is not finite, or asks for more than MOST_LAYERS layers.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        # null means "the default" in these files, except for NULLABLE and for fields whose default is None.
        known = {k: _frozen(v) for k, v in values.items() if k in defaults and (v is not None or k in cls.NULLABLE)}
        for key, value in known.items():
            if not _has_type(value, kind := _types(cls)[key]):  # type: ignore[arg-type]
                raise ConfigError(f"{key} is {values[key]!r} and must be {_type_name(kind)}.")
            if isinstance(value, float) and not math.isfinite(value) and value != defaults[key]:
                raise ConfigError(f"{key} is {value} and must be finite.")
            if key in LAYERS and max(value if isinstance(value, tuple) else (value,), default=0) > MOST_LAYERS:
                raise ConfigError(f"{key} is {values[key]!r} and must be at most {MOST_LAYERS}.")
        return cls(**known)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read one JSON file; raises ConfigError in one sentence naming the file."""
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ConfigError as e:
            raise ConfigError(f"{path}: {e}") from None

    def to_dict(self) -> dict[str, Any]:
        """The values for a `config.json`."""
        return {"_class_name": self.CLASS_NAME, **dataclasses.asdict(self)}


def read_json(path: str | Path) -> dict[str, Any]:
    """One JSON object from a file; raises ConfigError naming the file and what is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if (reason := not_fetched(text[:200].encode())) is not None:
            raise ConfigError(f"{path} {reason}")
        values = json.loads(text)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: is the folder a complete diffusers folder?") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} cannot be read as JSON ({e}): download or save it again.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a JSON object: download or save it again.")
    return values
