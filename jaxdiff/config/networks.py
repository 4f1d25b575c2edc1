"""The config of each network; defaults are those of the PyTorch class of the same name."""

import dataclasses
from typing import Any, ClassVar, Self

from jaxdiff.config.base import Config, ConfigError


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(Config):
    """CLIP text encoder (Radford et al. 2021, section 2.4); defaults are transformers' own."""

    CLASS_NAME: ClassVar[str] = "CLIPTextModel"
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77  # tokens of one prompt, start and end tokens included
    hidden_act: str = "quick_gelu"  # or "gelu" (OpenCLIP)
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    with_projection: bool = False  # whether pooled output goes through `text_projection`
    bos_token_id: int = 49406
    eos_token_id: int = 49407  # 2 in old files: then the highest id in the row marks the end
    pad_token_id: int = 1  # kept for saving; the tokenizer pads

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        projected = any("WithProjection" in a for a in values.get("architectures") or ())
        return super().from_dict({"with_projection": projected, **values})

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        projected = values.pop("with_projection")
        return {
            "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
            "model_type": "clip_text_model",
            **values,
        }


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """CLIP vision transformer (Radford et al. 2021, section 2.4)."""

    CLASS_NAME: ClassVar[str] = "CLIPVisionModelWithProjection"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, square
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def to_dict(self) -> dict[str, Any]:
        return {
            "architectures": [self.CLASS_NAME],
            "model_type": "clip_vision_model",
            **dataclasses.asdict(self),
        }


# Further keys of a UNet's config -> the only supported value, which is diffusers' default.
FIXED_UNET: dict[str, Any] = {
    "attention_type": "default",
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_scale_factor": 1,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
PER_LEVEL = (  # keys of a UNet's config that are one value, or a list with one for each level
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "only_cross_attention",
)
FIXED_VAE: dict[str, Any] = {"latents_mean": None, "latents_std": None}
# Keys of a UNet's config that add an embedding -> known values -> other keys that they require.
EMBEDDINGS: dict[str, dict[str | None, tuple[str, ...]]] = {
    "addition_embed_type": {
        None: (),
        "text_time": ("addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    },
    "class_embed_type": {
        None: (),
        "timestep": (),
        "identity": (),
        "projection": ("projection_class_embeddings_input_dim",),
        "simple_projection": ("projection_class_embeddings_input_dim",),
    },
}


def _check_fixed(name: str, values: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raise ConfigError for the first unsupported value."""
    for key, supported in fixed.items():
        if values.get(key) not in (None, supported):
            raise ConfigError(
                f"The {name}'s config says {key}: {values[key]!r}, which is not supported ({supported!r} is): use a "
                "model of Stable Diffusion's architecture."
            )


@dataclasses.dataclass(frozen=True)
class UNetConfig(Config):
    """Denoising UNet of latent diffusion (Rombach et al. 2022, appendix E); defaults are diffusers' own."""

    CLASS_NAME: ClassVar[str] = "UNet2DConditionModel"
    NULLABLE: ClassVar[tuple[str, ...]] = ("mid_block_type",)
    sample_size: int | tuple[int, int] = 64  # default size in latents: the side of a square, or (height, width)
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"  # None: no middle block, as in tiny distilled models
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    # Despite its name, the *number of heads* of each level; `num_attention_heads` wins where a file gives it.
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    only_cross_attention: bool | tuple[bool, ...] = False
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False  # 1x1 convolution otherwise
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    act_fn: str = "silu"
    downsample_padding: int = 1
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    center_input_sample: bool = False
    # Extra conditions added to the time embedding.
    class_embed_type: str | None = None  # see `EMBEDDINGS`; None with num_class_embeds: a table
    num_class_embeds: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    addition_embed_type: str | None = None  # "text_time": SDXL's pooled text and time ids
    addition_time_embed_dim: int | None = None
    time_cond_proj_dim: int | None = None  # guidance embedding of distilled models

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        _check_fixed(cls.CLASS_NAME, values, FIXED_UNET)
        for key, known in EMBEDDINGS.items():
            kind = values.get(key)
            if kind not in list(known):
                names = ", ".join(map(repr, known))
                raise ConfigError(f"The {cls.CLASS_NAME}'s config says {key}: {kind!r}; known are {names}.")
            if lacking := [size for size in known[kind] if not values.get(size)]:
                raise ConfigError(f"The {cls.CLASS_NAME}'s config says {key}: {kind!r} but not {lacking[0]}.")
        levels = len(values.get("block_out_channels") or cls.block_out_channels)
        for key in PER_LEVEL:
            if isinstance(level_values := values.get(key), list | tuple) and len(level_values) != levels:
                raise ConfigError(
                    f"The {cls.CLASS_NAME}'s config says {key}: {list(level_values)}, but block_out_channels has "
                    f"length {levels}: give a value for each level."
                )
        width = values.get("cross_attention_dim")
        if isinstance(width, list | tuple):
            if len(set(width)) != 1:
                raise ConfigError(
                    f"The {cls.CLASS_NAME}'s config says cross_attention_dim: {width}; one width for all levels is "
                    "supported."
                )
            values = {**values, "cross_attention_dim": width[0]}
        return super().from_dict(values)

    @property
    def side(self) -> int:
        """The shorter side of `sample_size`, in latents."""
        return self.sample_size if isinstance(self.sample_size, int) else min(self.sample_size)

    @property
    def heads(self) -> int | tuple[int, ...]:
        return self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class VAEConfig(Config):
    """Autoencoder of latent diffusion (Rombach et al. 2022, section 3.1); defaults are diffusers' own."""

    CLASS_NAME: ClassVar[str] = "AutoencoderKL"
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32  # pixels
    scaling_factor: float = 0.18215  # latents = (mean - shift_factor) * scaling_factor
    shift_factor: float | None = None
    force_upcast: bool = True  # decoding in half precision overflows (SDXL)
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        _check_fixed(cls.CLASS_NAME, values, FIXED_VAE)
        return super().from_dict(values)

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class Flux2VAEConfig(VAEConfig):
    """FLUX.2's autoencoder, whose latents are normalised in 2 x 2 patches by measured means and deviations."""

    CLASS_NAME: ClassVar[str] = "AutoencoderKLFlux2"
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 32
    sample_size: int = 1024
    scaling_factor: float = 1.0  # not in the files
    force_upcast: bool = False
    batch_norm_eps: float = 1e-4

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        _check_fixed(cls.CLASS_NAME, values, {"decoder_block_out_channels": None, "patch_size": [2, 2]})
        return super().from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        ours = ("scaling_factor", "shift_factor", "force_upcast")
        return {name: value for name, value in super().to_dict().items() if name not in ours}


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """ControlNet (Zhang et al. 2023): the encoder of a UNet, and an encoder of the control image."""

    CLASS_NAME: ClassVar[str] = "ControlNetModel"
    NULLABLE: ClassVar[tuple[str, ...]] = ()  # a ControlNet always has a middle block
    conditioning_channels: int = 3  # of the control image
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"  # or "bgr"
    global_pool_conditions: bool = False

    @property
    def factor(self) -> int:
        """Pixels of the control image per latent along one side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for name in ("sample_size", "out_channels", "up_block_types", "center_input_sample", "time_cond_proj_dim"):
            del values[name]  # of the UNet alone
        return values


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig(Config):
    """The distilled autoencoder of previews (TAESD); defaults are diffusers' own."""

    CLASS_NAME: ClassVar[str] = "AutoencoderTiny"
    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)  # of each level
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)  # residual blocks of each level
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    act_fn: str = "relu"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    latent_magnitude: float = 3.0  # latents / (2 * latent_magnitude) + latent_shift is in [0, 1]
    latent_shift: float = 0.5
    scaling_factor: float = 1.0  # latents are those of the UNet divided by this, plus shift_factor
    shift_factor: float = 0.0

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return self.upsampling_scaling_factor ** (len(self.decoder_block_out_channels) - 1)
