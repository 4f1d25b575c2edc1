"""Networks of every kind: their configs, and of small ones inputs and weights too, which need no PyTorch to be made."""

import zlib

import numpy as np

from jaxdiff.config import UNetConfig

# SDXL's own shapes.
XL_LEVELS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
SDXL = UNetConfig(
    sample_size=128,
    down_block_types=XL_LEVELS,
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)

SMALL_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}
UNETS = {  # name -> config: every branch of the architecture once
    "sd1": SMALL_UNET | {"layers_per_block": 2},
    "sd2": SMALL_UNET | {"attention_head_dim": (2, 8), "use_linear_projection": True},
    "sdxl": SMALL_UNET
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    },
    "upscaler": SMALL_UNET
    | {"in_channels": 7, "num_class_embeds": 10, "only_cross_attention": (True, False), "use_linear_projection": True},
    "only_cross": SMALL_UNET | {"only_cross_attention": True},
    "inpainting": SMALL_UNET | {"in_channels": 9},
    "distilled": SMALL_UNET | {"time_cond_proj_dim": 16, "flip_sin_to_cos": False, "freq_shift": 1},
    "no_middle": SMALL_UNET | {"mid_block_type": None},  # segmind/tiny-sd
    "class_timestep": SMALL_UNET | {"class_embed_type": "timestep"},
}
VAES = {
    "sd1": {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
    "sixteen_channels": {
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "latent_channels": 16,
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
}
SMALL_TEXT = {
    "vocab_size": 600,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 598,
    "eos_token_id": 599,
}
TEXTS = {
    "vit_l": SMALL_TEXT,
    "old_eos": SMALL_TEXT | {"eos_token_id": 2},
    "openclip": SMALL_TEXT | {"hidden_act": "gelu", "projection_dim": 20, "with_projection": True},
}
SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 20,
}
TOKENS = np.array([[598, 5, 9, 599, 599, 599], [598, 77, 500, 12, 31, 599]], np.int32)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this PyTorch name, in PyTorch's layout: no value is zero or one, so that a forgotten one shows."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    fan_in = np.prod(shape[1:]) if len(shape) > 1 else 4
    offset = "norm" in name and len(shape) == 1
    return (rng.standard_normal(shape) * fan_in**-0.5 + offset).astype(np.float32)


def uniform_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def unet_inputs(config: dict, side: int = 8) -> dict[str, np.ndarray]:
    """Random inputs of a UNet of this config, in the names and layout of jaxdiff."""
    rng = np.random.default_rng(1)
    inputs = {
        "x": rng.standard_normal((2, side, side, config.get("in_channels", 4))),
        "t": np.array([3.0, 761.5]),
        "embeddings": rng.standard_normal((2, 7, config["cross_attention_dim"])),
    }
    if config.get("addition_embed_type"):
        inputs["pooled"] = rng.standard_normal((2, 20))
        inputs["time_ids"] = np.array([[64, 64, 0, 0, 64, 64], [32, 48, 8, 0, 64, 64.0]])
    if config.get("time_cond_proj_dim"):
        inputs["guidance"] = rng.standard_normal((2, config["time_cond_proj_dim"]))
    inputs = {k: v.astype(np.float32) for k, v in inputs.items()}
    if config.get("num_class_embeds"):
        inputs["class_labels"] = np.array([3, 7], np.int32)
    elif config.get("class_embed_type"):
        inputs["class_labels"] = np.array([20.0, 350.0], np.float32)
    return inputs
