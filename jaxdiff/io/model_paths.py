"""Finding a model by its path, its bundled name, in an object store or on the Hugging Face hub."""

import re
from pathlib import Path

from absl import logging

from jaxdiff import stores
from jaxdiff.config import ConfigError, read_json
from jaxdiff.errors import say_once
from jaxdiff.io import hub

BUNDLED = Path(__file__).parent.parent / "bundled"
SINGLE_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")  # in any letter case
MARKS = ("_class_name", "model_type", "architectures")  # keys of a network's config.json
HUB = r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?"  # owner/name@revision


def bundled() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def find(name_or_path: str | Path, variant: str | None = None) -> Path:
    """The local folder or file of a model, downloaded if necessary.

    Args:
        name_or_path: a path, a bundled name, a store's path, or "owner/name" on the hub, with "@v1.0" for a branch, tag
            or commit.
        variant: of the weights to download, see `load`.

    Raises:
        ConfigError: there is no such model, or it cannot be fetched.
    """
    if stores.wrong(name_or_path) or stores.is_store(name_or_path):
        try:
            name_or_path = stores.fetch(str(name_or_path), lambda names: hub.chosen(names, variant))
        except stores.StoreError as e:
            raise ConfigError(str(e)) from None
    path, name = Path(name_or_path), str(name_or_path)
    one_file = path.suffix.lower() in SINGLE_FILES
    if not name:
        raise ConfigError("the model's name is empty: give a folder, a file or a name, or leave it out.")
    if name in bundled() and path.exists():
        if not _is_model(path):
            logging.warning("%s is the bundled model; ./%s is not a model.", name, name)
            return BUNDLED / name
        say_once(f"{name} is the folder here (./{name}), not the bundled model of that name.")
    if path.is_dir() or (path.is_file() and one_file):
        return path
    if path.is_file():
        hint = " A transformer's .gguf goes with such a folder, as --transformer." if path.suffix == ".gguf" else ""
        known = f"known are {', '.join(SINGLE_FILES)}, and diffusers folders"
        raise ConfigError(f"{path} is not a model file: {known}.{hint}")
    if name in bundled():
        return BUNDLED / name
    if (match := re.fullmatch(HUB, name)) and not one_file:
        return hub.fetch(match[1], match[2], variant)
    if one_file:
        raise ConfigError(f"The model's file {name} does not exist: check the path, or fetch the file first.")
    known = ", ".join(bundled()) or "none"
    raise ConfigError(
        f"{name} is neither a folder nor a bundled model (bundled: {known}): give a diffusers folder, a .safetensors "
        "or .ckpt file, or owner/name on the Hugging Face hub."
    )


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a model or a network, and not another program's config.json."""
    if (folder / "model_index.json").exists():
        return True
    try:
        return any(mark in read_json(folder / "config.json") for mark in MARKS)
    except ConfigError:
        return False
