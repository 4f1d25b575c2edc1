"""Which files a LoRA consists of."""

from pathlib import Path

from jaxdiff.errors import WeightsError
from jaxdiff.io.lora_config import MODULES, STEM

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
