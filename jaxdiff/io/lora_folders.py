"""Which files a LoRA consists of, and which one of a folder a prompt names."""

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
    """The files of a LoRA: the one given, or those of a folder that diffusers or peft wrote, a sub-folder a network.

    Raises:
        WeightsError: the folder holds none, or several LoRAs.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [folder]
    for name in FILES:
        if (folder / name).is_file():
            return [folder / name]
    inner = [next(f for n in FILES if (f := d / n).is_file()) for d in sorted(folder.iterdir()) if _holds_lora(d)]
    found = inner or sorted(folder.glob("*.safetensors"))
    if len(found) == 1 or (found and all(f.parent.name in MODULES for f in found)):
        return found
    listed = (
        f"several LoRAs ({found[0].relative_to(folder)}, {found[1].relative_to(folder)}, …)" if found else "no LoRA"
    )
    raise WeightsError(f"{folder} holds {listed}: give its file, such as {FILES[0]}.")


def _holds_lora(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in FILES)


def files_below(folder: str | Path) -> dict[Path, str]:
    """The files of LoRAs in a folder and those inside, and what <lora:…> calls each: its path without the suffix."""
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return {path: path.relative_to(folder).with_suffix("").as_posix() for path in found}


def named(files: Mapping[Path, str], name: str) -> list[Path]:
    """The files that a name may mean: of that path, else called so, else that say so in their metadata."""
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
