"""The LoRAs that prompts may name: those of a folder that was named when the server started."""

import functools
from collections.abc import Callable
from pathlib import Path

from jaxdiff.errors import ArgumentError
from jaxdiff.io.lora import Lora, Weighted, merge_named, read_lora
from jaxdiff.io.tensor_files import SAFETENSORS
from jaxdiff.models.model import Model
from jaxdiff.text.other_programs import split_tags
from jaxdiff.text.prompt_files import PromptError
from jaxdiff.typing import Params

MAX_CACHED = 4  # files in memory


def lora_files(folder: str | Path | None) -> dict[str, Path]:
    """The .safetensors files of a folder, by what <lora:…> calls them."""
    if folder is None:
        return {}
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SAFETENSORS and p.is_file())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


class Loras:
    """Parameters with the LoRAs of a prompt; the latest ones are kept, as a copy of the parameters is large."""

    def __init__(
        self, model: Model, params: Params, files: dict[str, Path], place: Callable[[Params], Params] = lambda p: p
    ) -> None:
        self.files, self._params, self._place = files, params, place
        self._latest: tuple[Weighted, Params] = ((), params)
        self._read: Callable[[Path], Lora] = functools.lru_cache(MAX_CACHED)(functools.partial(read_lora, model))

    def split(self, prompt: str) -> tuple[str, Weighted]:
        """A prompt without the tags of LoRAs, and the LoRAs. Raises ArgumentError for unknown names."""
        try:
            text, tags = split_tags(prompt)
        except PromptError as e:
            raise ArgumentError("prompt", f"cannot be used: {e}") from None
        for tag in tags:
            if tag.name not in self.files:
                known = ", ".join(list(self.files)[:10]) or "none"
                raise ArgumentError(
                    "prompt", f"names the LoRA {tag.name!r}, which is not available; known are {known}."
                )
        return text, tuple((self.files[tag.name], tag.text_encoder, tag.unet) for tag in tags)

    def params_with(self, loras: Weighted) -> Params:
        """The model's parameters with these LoRAs."""
        if not loras:
            return self._params
        if self._latest[0] != loras:
            self._latest = ((), self._params)  # frees the previous copy first
            files = {path: self._read(path) for path, *_ in loras}
            self._latest = loras, self._place(merge_named(self._params, files, loras))
        return self._latest[1]
