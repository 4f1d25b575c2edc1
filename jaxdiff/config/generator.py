"""The config of a GAN's generator, which takes the place of the UNet in a model's folder."""

import dataclasses
from typing import Any, ClassVar, Self

from jaxdiff.config.base import Config, ConfigError


@dataclasses.dataclass(frozen=True)
class GeneratorConfig(Config):
    """The generator of a text-conditional GAN; see jaxdiff/models/generator.py."""

    CLASS_NAME: ClassVar[str] = "TextConditionalGenerator"
    # Inputs of a UNet that a generator does not have.
    addition_embed_type: ClassVar[None] = None
    class_embed_type: ClassVar[None] = None
    num_class_embeds: ClassVar[None] = None
    time_cond_proj_dim: ClassVar[None] = None

    sample_size: int = 16  # latents along a side, the only size that it draws
    in_channels: int = 8  # of the noise and of the latents
    block_out_channels: tuple[int, ...] = (64, 128, 256)  # of each level, from full resolution down to the first one
    layers_per_block: int = 1
    num_attention_heads: int = 4  # of cross-attention to the text, at all levels but full resolution
    cross_attention_dim: int = 192  # width of the text's states
    noise_dim: int = 128  # width of the projected noise
    style_dim: int = 256  # width of the style, made from noise and text, which scales channels

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        config = super().from_dict(values)
        numbers = (x for x in dataclasses.asdict(config).values() if isinstance(x, int))
        sizes = (*config.block_out_channels, *numbers)
        if not config.block_out_channels or min(sizes) < 1:
            raise ConfigError(f"The {cls.CLASS_NAME}'s config has sizes below 1, or no block_out_channels.")
        if config.sample_size % 2 ** (len(config.block_out_channels) - 1):
            raise ConfigError(
                f"sample_size {config.sample_size} must be divisible by 2 for each of block_out_channels but the first."
            )
        return config
