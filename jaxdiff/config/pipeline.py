"""The options in a pipeline's `model_index.json`."""

import dataclasses
import math
from typing import Any, Self

from jaxdiff.config.base import Config, ConfigError
from jaxdiff.config.scheduler import SchedulerConfig


@dataclasses.dataclass(frozen=True)
class PipelineOptions(Config):
    """The options in `model_index.json`, apart from the names of the networks."""

    force_zeros_for_empty_prompt: bool = True  # SDXL: without a negative prompt, zeros instead of the embedding of ""
    requires_aesthetics_score: bool = False  # SDXL refiner: its time ids end in a score, not in the target size
    max_noise_level: int = 350  # x4 upscaler: maximum noise on the low-resolution image, in timesteps
    low_res_scheduler: SchedulerConfig | None = None  # x4 upscaler: its noise schedule; a folder of its own
    is_distilled: bool = False  # FLUX.2: drawn without guidance
    # SD 3: tokens of T5, or of zeros instead; "_max_sequence_length" in the file: it is an argument in diffusers.
    max_sequence_length: int = 256
    guidance_scale: float = 7.5  # the model's default; "_guidance_scale" in the file, which diffusers ignores
    steps: int = 25  # the model's default; "_steps" in the file, which diffusers ignores
    # Perturbed-attention guidance: the model's default, and its layers; "_pag_scale" and "_pag_layers" in the file.
    pag_scale: float = 0.0
    pag_layers: tuple[str, ...] = ("mid",)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        scale, pag_scale = (values.get(f"_{name}", getattr(cls, name)) for name in ("guidance_scale", "pag_scale"))
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ConfigError(f"_guidance_scale {scale!r} in model_index.json must be a number, such as 7.5.")
        if type(pag_scale) not in (int, float) or not 0 <= pag_scale < math.inf:
            raise ConfigError(f"_pag_scale {pag_scale!r} in model_index.json must be a number from 0 on, such as 3.")
        layers = values.get("_pag_layers", cls.pag_layers)
        if not isinstance(layers, list | tuple) or not layers or not all(isinstance(x, str) and x for x in layers):
            raise ConfigError(f'_pag_layers {layers!r} in model_index.json must be a list of names, such as ["mid"].')
        steps = values.get("_steps", cls.steps)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ConfigError(f"_steps {steps!r} in model_index.json must be a whole number, such as 25.")
        max_length = values.get("_max_sequence_length", cls.max_sequence_length)
        if not isinstance(max_length, int) or isinstance(max_length, bool) or not 0 <= max_length <= 512:
            raise ConfigError(
                f"_max_sequence_length {max_length!r} in model_index.json must be from 0 to 512, such as 256."
            )
        others = {k: v for k, v in values.items() if k != "low_res_scheduler"}
        checked = {"guidance_scale": float(scale), "steps": steps, "max_sequence_length": max_length}
        return super().from_dict(others | checked | {"pag_scale": float(pag_scale), "pag_layers": tuple(layers)})
