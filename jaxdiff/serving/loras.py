"""The LoRAs that prompts may name: those of a folder that was named when the server started."""

import functools
from collections.abc import Callable
from pathlib import Path

from absl import logging

from jaxdiff.config import ConfigError
from jaxdiff.errors import ArgumentError, WeightsError
from jaxdiff.io import lora_folders
from jaxdiff.io.lora import Lora, Weighted, merge_named, read_lora
from jaxdiff.io.tensor_files import open_tensors
from jaxdiff.models.model import Model
from jaxdiff.text.other_programs import split_tags
from jaxdiff.text.prompt_files import PromptError
from jaxdiff.typing import Params

MAX_CACHED = 4  # files in memory


def lora_files(folder: str | Path | None) -> dict[str, Path]:
    """The LoRAs of a folder, by what <lora:…> calls them; a warning names files that cannot be read."""
    files: dict[str, Path] = {}
    for path, name in ({} if folder is None else lora_folders.files_below(folder)).items():
        try:
            open_tensors(path)
            files[name] = path  # of several of one name, that of safetensors comes last
        except (ConfigError, WeightsError) as e:
            logging.warning("%s It is left out of --lora_dir.", e)
    return files


class Loras:
    """Parameters with the LoRAs of a prompt; the latest ones are kept, as a copy of the parameters is large."""

    def __init__(
        self, model: Model, params: Params, files: dict[str, Path], place: Callable[[Params], Params] = lambda p: p
    ) -> None:
        self.files, self._params, self._place = files, params, place
        self._latest: tuple[Weighted, Params] = ((), params)
        self._read: Callable[[Path], Lora] = functools.lru_cache(MAX_CACHED)(functools.partial(read_lora, model))

    def split(self, prompt: str) -> tuple[str, Weighted]:
        """A prompt without the tags of LoRAs, and the LoRAs. Raises ArgumentError for those that cannot be used."""
        try:
            text, tags = split_tags(prompt)
        except PromptError as e:
            raise ArgumentError("prompt", f"cannot be used: {e}") from None
        return text, tuple((self._find(tag.name), tag.text_encoder, tag.unet) for tag in tags)

    def _find(self, name: str) -> Path:
        names = {path: known for known, path in self.files.items()}
        matches = lora_folders.named(names, name)
        if len(matches) > 1:
            both = " or ".join(f"<lora:{names[path]}>" for path in matches[:2])
            raise ArgumentError("prompt", f"names the LoRA {name!r}, which may be several: write {both}.")
        if not matches:
            known = ", ".join(list(self.files)[:10]) or "none"
            raise ArgumentError("prompt", f"names the LoRA {name!r}, which is not available; known are {known}.")
        try:
            self._read(matches[0])
        except (ConfigError, WeightsError) as e:
            logging.warning("%s", e)
            raise ArgumentError("prompt", f"names the LoRA {name!r}, which does not fit this model.") from None
        return matches[0]

    def params_with(self, loras: Weighted) -> Params:
        """The model's parameters with these LoRAs."""
        if not loras:
            return self._params
        if self._latest[0] != loras:
            self._latest = ((), self._params)  # frees the previous copy first
            files = {path: self._read(path) for path, *_ in loras}
            self._latest = loras, self._place(merge_named(self._params, files, loras))
        return self._latest[1]
