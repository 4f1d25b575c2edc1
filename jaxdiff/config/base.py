"""What every config shares: reading and writing the dict of a `config.json`."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Self

from jaxdiff.errors import JaxdiffError


class ConfigError(JaxdiffError, ValueError):
    """A config that cannot be read, or that describes what this library does not build."""


def _frozen(value: Any) -> Any:
    """Lists become tuples, so that a config is hashable and may be static under `jit`."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Config:
    """Base: reading from and writing to the dict of a `config.json`."""

    CLASS_NAME: ClassVar[str] = ""
    NULLABLE: ClassVar[tuple[str, ...]] = ()  # fields of another default that may be None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        names = {f.name for f in dataclasses.fields(cls)}
        # null means "the default" in these files, but for NULLABLE and the few fields whose own default is None.
        return cls(**{k: _frozen(v) for k, v in values.items() if k in names and (v is not None or k in cls.NULLABLE)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read one JSON file; raises ConfigError in one sentence naming the file."""
        return cls.from_dict(read_json(path))

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": self.CLASS_NAME, **dataclasses.asdict(self)}


def read_json(path: str | Path) -> dict[str, Any]:
    """One JSON object from a file; raises ConfigError naming the file and what is wrong with it."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: is the folder a complete diffusers folder?") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read as JSON ({e}): download or save it again.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a JSON object: download or save it again.")
    return values
