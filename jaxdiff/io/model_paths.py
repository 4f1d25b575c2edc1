"""Where a model is found: at a path, among those that ship with the package, or on the Hugging Face hub."""

import re
from pathlib import Path

from jaxdiff.config import ConfigError
from jaxdiff.io.hub import fetch

BUNDLED = Path(__file__).parent.parent / "bundled"
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth")


def bundled() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def find(name_or_path: str | Path, variant: str | None = None) -> Path:
    """A model's folder or file: a path, a bundled model's name, or "owner/name" on the hub, which is then fetched.

    Args:
        name_or_path: "owner/name@v1.0" is the hub's model at that branch, tag or commit.
        variant: of the weights to be fetched, see `load`.

    Raises:
        ConfigError: it is none of these, or cannot be fetched; the sentence says what there is.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if path.is_dir() or (path.is_file() and path.suffix in SINGLE_FILES):
        return path
    if path.is_file():
        raise ConfigError(f"{path} is not a model file: known are {', '.join(SINGLE_FILES)}, and diffusers folders.")
    if name in bundled():
        return BUNDLED / name
    if (hub := re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", name)) and path.suffix not in SINGLE_FILES:
        return fetch(hub[1], hub[2], variant)
    if path.suffix in SINGLE_FILES:
        raise ConfigError(f"The model's file {name} does not exist: check the path, or fetch the file first.")
    known = ", ".join(bundled()) or "none"
    raise ConfigError(
        f"{name} is neither a folder nor a bundled model (bundled: {known}): give a diffusers folder, a .safetensors "
        "or .ckpt file, or owner/name on the Hugging Face hub."
    )
