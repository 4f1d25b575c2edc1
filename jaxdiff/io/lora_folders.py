"""Finding the files of a LoRA."""

from pathlib import Path

from jaxdiff.errors import WeightsError
from jaxdiff.io.lora_config import MODULES, STEM

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
