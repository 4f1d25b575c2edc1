"""The configs of the transformer families' networks; defaults are those of the PyTorch class of the same name."""

import dataclasses
from typing import Any, ClassVar, Self

from jaxdiff.config.base import Config


@dataclasses.dataclass(frozen=True)
class FluxConfig(Config):
    """FLUX.1's transformer."""

    CLASS_NAME: ClassVar[str] = "FluxTransformer2DModel"
    patch_size: int = 1  # latents are folded into 2 x 2 patches beforehand
    in_channels: int = 64  # four times the channels of the latents
    out_channels: int | None = None
    num_layers: int = 19  # double blocks: separate parameters for text and image
    num_single_layers: int = 38  # single blocks: text and image as one sequence
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # width of T5's states
    pooled_projection_dim: int = 768  # width of CLIP's pooled state
    guidance_embeds: bool = False  # dev: the guidance scale is an input
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels // 4


@dataclasses.dataclass(frozen=True)
class Flux2Config(Config):
    """FLUX.2's transformer."""

    CLASS_NAME: ClassVar[str] = "Flux2Transformer2DModel"
    patch_size: int = 1
    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360  # width of three layers' states side by side
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Hidden width of a feed-forward."""
        return int(self.width * self.mlp_ratio)

    @property
    def latent_channels(self) -> int:
        return self.in_channels // 4


@dataclasses.dataclass(frozen=True)
class SD3Config(Config):
    """The transformer of Stable Diffusion 3 and 3.5."""

    CLASS_NAME: ClassVar[str] = "SD3Transformer2DModel"
    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96  # patches along a side of the table of positions
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None  # or "rms_norm" (3.5)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels


@dataclasses.dataclass(frozen=True)
class ZImageConfig(Config):
    """Z-Image's transformer."""

    CLASS_NAME: ClassVar[str] = "ZImageTransformer2DModel"
    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560  # width of Qwen3's states
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    @property
    def width(self) -> int:
        return self.dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels


@dataclasses.dataclass(frozen=True)
class T5Config(Config):
    """T5's encoder."""

    CLASS_NAME: ClassVar[str] = "T5EncoderModel"
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # only "gated-gelu" (version 1.1) is supported

    def to_dict(self) -> dict[str, Any]:
        return {
            "architectures": [self.CLASS_NAME],
            "model_type": "t5",
            "is_encoder_decoder": False,
            "use_cache": False,
            **dataclasses.asdict(self),
        }


@dataclasses.dataclass(frozen=True)
class Qwen3Config(Config):
    """Qwen3's decoder."""

    CLASS_NAME: ClassVar[str] = "Qwen3ForCausalLM"
    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0  # published models have 1000000
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        rope = values.get("rope_parameters") or {}
        theta = rope.get("rope_theta") if isinstance(rope, dict) else None
        return super().from_dict({**({} if theta is None else {"rope_theta": theta}), **values})

    def to_dict(self) -> dict[str, Any]:
        return {"architectures": [self.CLASS_NAME], "model_type": "qwen3", **dataclasses.asdict(self)}
