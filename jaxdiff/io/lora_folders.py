"""Which files a LoRA consists of, and which file of a folder a prompt names."""

import functools
from collections.abc import Mapping
from pathlib import Path

from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.io.lora_config import MODULES, STEM
from jaxdiff.io.tensor_files import SAFETENSORS, open_tensors

SUFFIXES = (*SAFETENSORS, ".pt", ".bin", ".ckpt")  # in any letter case, of what a prompt may name

FILES = tuple(f"{stem}{end}" for stem in ("pytorch_lora_weights", STEM) for end in (".safetensors", ".bin"))


def adapter_files(path: str | Path) -> list[Path]:
    """The files of a LoRA: the given file, or those in a folder by diffusers or peft, which may have one per network.

    Raises:
        WeightsError: the folder holds no LoRA, or several.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [folder]
    if file := _lora_file(folder):
        return [file]
    subfolder_files = [file for subfolder in sorted(folder.iterdir()) if (file := _lora_file(subfolder))]
    files = subfolder_files or sorted(folder.glob("*.safetensors"))
    if len(files) == 1 or (files and all(f.parent.name in MODULES for f in files)):
        return files
    contents = (
        f"several LoRAs ({files[0].relative_to(folder)}, {files[1].relative_to(folder)}, …)" if files else "no LoRA"
    )
    raise WeightsError(f"{folder} holds {contents}: give its file, such as {FILES[0]}.")


def _lora_file(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def files_below(folder: str | Path) -> dict[Path, str]:
    """The LoRA files in a folder and its sub-folders, and what <lora:…> calls each: its path without the suffix."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return {path: path.relative_to(folder).with_suffix("").as_posix() for path in files}


def named(files: Mapping[Path, str], name: str) -> list[Path]:
    """The files that a name may mean: by their path, else by their file name, else by their metadata."""
    return (
        [path for path in files if files[path] == name]
        or [path for path in files if path.stem == name]
        or [path for path in files if output_name(path) == name]
    )


@functools.lru_cache(4096)
def output_name(path: Path) -> str | None:
    """The name that kohya's scripts write into a LoRA's metadata, which the AUTOMATIC1111 web UI also accepts."""
    try:
        return open_tensors(path).metadata.get("ss_output_name") if path.suffix.lower() in SAFETENSORS else None
    except (ConfigError, WeightsError):  # damaged: reported if a prompt names the file
        return None
