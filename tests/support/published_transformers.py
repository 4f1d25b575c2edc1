"""The transformer families' networks as published: their configs and numbers of parameters.

The values are those of each model's `config.json` on huggingface.co, as diffusers' conversion scripts and loaders spell
them out too: FLUX.1 in `convert_flux_to_diffusers.py`, SD 3.5 in `convert_sd3_to_diffusers.py`, FLUX.2 klein in
`convert_flux2_to_diffusers.py`; Z-Image's are the defaults of its class. What is not named is the default of the class.
The numbers are those of each published safetensors file, without the table of positions that SD 3.5's hold as well.
"""

from typing import NamedTuple

from jaxdiff.config import (
    Config,
    Flux2Config,
    Flux2VAEConfig,
    FluxConfig,
    Qwen3Config,
    SD3Config,
    T5Config,
    VAEConfig,
    ZImageConfig,
)


class Published(NamedTuple):
    """A network of a published model."""

    config: type[Config]
    values: dict  # of its config.json
    parameters: int


SD35 = {"in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
        "attention_head_dim": 64, "qk_norm": "rms_norm"}  # fmt: skip
KLEIN = {"in_channels": 128, "attention_head_dim": 128, "guidance_embeds": False}
TRANSFORMERS = {
    "FLUX.1-dev": Published(FluxConfig, {"guidance_embeds": True}, 11_901_408_320),
    "FLUX.1-schnell": Published(FluxConfig, {"guidance_embeds": False}, 11_891_178_560),
    "stable-diffusion-3.5-medium": Published(
        SD3Config,
        {
            **SD35, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
        },
        2_243_171_520,
    ),
    "stable-diffusion-3.5-large": Published(
        SD3Config,
        {**SD35, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
         "pos_embed_max_size": 192},
        8_056_627_520,
    ),
    "Z-Image": Published(ZImageConfig, {}, 6_154_908_736),  # base and Turbo alike
    "FLUX.2-klein-4B": Published(
        Flux2Config,
        {**KLEIN, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        3_875_544_576,
    ),
    "FLUX.2-klein-9B": Published(
        Flux2Config,
        {**KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        9_078_581_248,
    ),
}  # fmt: skip
QWEN3 = {
    "vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "rope_theta": 1_000_000,
}  # fmt: skip
TEXT_ENCODERS = {
    "T5-XXL": Published(
        T5Config,
        {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64,
         "feed_forward_proj": "gated-gelu"},
        4_762_310_656,
    ),
    # Of Z-Image and FLUX.2 klein 4B, and of klein 9B; the number of the latter with its head, which is not read.
    "Qwen3-4B": Published(
        Qwen3Config,
        {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
        4_022_468_096,
    ),
    "Qwen3-8B": Published(
        Qwen3Config, {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288}, 8_190_735_360 - 151936 * 4096
    ),
}  # fmt: skip
LEVELS = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
AUTOENCODERS = {
    # Of FLUX.1, SD 3.5 and Z-Image alike but for their scales.
    "16 channels": Published(
        VAEConfig, {**LEVELS, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}, 83_819_683
    ),
    # With the statistics of its patches, and without the count of batches that PyTorch's has.
    "FLUX.2": Published(Flux2VAEConfig, {**LEVELS, "latent_channels": 32}, 84_046_371),
}
PUBLISHED = {**TRANSFORMERS, **TEXT_ENCODERS, **AUTOENCODERS}
