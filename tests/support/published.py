"""The configs of published networks, and small models of their families."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from jaxdiff.config import CLIPTextConfig, UNetConfig, VAEConfig
from jaxdiff.io.infer_config import SCALING, pipeline_options, scheduler_config
from jaxdiff.io.single_file import save_single_file
from jaxdiff.models.model import build
from tests.support import tiny
from tests.support.networks import SDXL, XL_LEVELS

SD1 = UNetConfig(cross_attention_dim=768)
SD2 = UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
REFINER = dataclasses.replace(
    SDXL,
    down_block_types=(*XL_LEVELS, "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(384, 768, 1536, 1536),
    transformer_layers_per_block=(1, 4, 4, 4),  # published as 4; the first level has none
    attention_head_dim=(6, 12, 24, 24),
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560,
)
UPSCALER = UNetConfig(
    sample_size=128,
    in_channels=7,
    down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    block_out_channels=(256, 512, 512, 1024),
    cross_attention_dim=1024,
    use_linear_projection=True,
    only_cross_attention=(False, True, True, False),  # published as (True, True, True, False); level 0 has none
    num_class_embeds=1000,
)
VAE = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=512,
)
VAE_X4 = dataclasses.replace(
    VAE,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(128, 256, 512),
    scaling_factor=0.08333,
)
VIT_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
VIT_H = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    projection_dim=1024,
)
BIG_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
    with_projection=True,
)
SDXL_CONTROLNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": XL_LEVELS,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONTROLNETS = {  # what differs from the config's defaults
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": SDXL_CONTROLNET,
    "sdxl mid": SDXL_CONTROLNET | {"down_block_types": ("DownBlock2D",) * 3, "transformer_layers_per_block": 1},
    "sdxl small": SDXL_CONTROLNET
    | {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": 1},
    "small hint": {
        "cross_attention_dim": 768,
        "conditioning_embedding_out_channels": (16, 32),
        "conditioning_channels": 1,
    },
}
FULL = {  # family or variant -> UNet, VAE, text_encoder, text_encoder_2 as published
    "sd1": (SD1, VAE, VIT_L, None),
    "sd1 inpainting": (dataclasses.replace(SD1, in_channels=9), VAE, VIT_L, None),
    "sd1 distilled": (dataclasses.replace(SD1, time_cond_proj_dim=256), VAE, VIT_L, None),
    "sd2": (dataclasses.replace(SD2, sample_size=96), VAE, VIT_H, None),
    "sd2 inpainting": (dataclasses.replace(SD2, in_channels=9), VAE, VIT_H, None),
    "sdxl": (SDXL, VAE, VIT_L, BIG_G),
    "sdxl_refiner": (REFINER, VAE, None, BIG_G),
    "upscaler": (UPSCALER, VAE_X4, VIT_H, None),
}

BESIDE = {  # what published files hold beside the networks
    "model_ema.num_updates": [],
    "sqrt_recipm1_alphas_cumprod": [1000],
    "first_stage_model.model_ema.decay": [],
    "cond_stage_model.logit_scale": [],
    "cond_stage_model.transformer.text_projection.weight": [8, 8],
    "model_ema.diffusion_modelinput_blocks00weight": [2],
    "model_ema.decay": [],
    "alphas_cumprod": [1000],
    "sqrt_one_minus_alphas_cumprod": [1000],
    "posterior_log_variance_clipped": [1000],
    "betas": [1000],
    "first_stage_model.loss.logvar": [],
    "cond_stage_model.transformer.text_model.embeddings.position_ids": [1, 77],
}


def small_model(family: str):
    """A model of the family with as many levels, of few channels and layers."""
    unet, *_ = FULL[family]
    added = unet.addition_embed_type and {
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 4 * (5 if family == "sdxl_refiner" else 6),
        "transformer_layers_per_block": (1, 2, 3, 3)[: len(unet.block_out_channels)],
    }
    unet = dataclasses.replace(
        unet,
        block_out_channels=tuple(8 * (1 + i) for i in range(len(unet.block_out_channels))),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim={"sdxl": 32, "upscaler": 20}.get(family, 16),
        num_class_embeds=unet.num_class_embeds and 20,
        only_cross_attention=(False, True, True, True) if family == "upscaler" else False,
        **added or {},
    )
    first = dataclasses.replace(tiny.text_config(), num_hidden_layers=2)
    openclip = dataclasses.replace(first, hidden_act="gelu", projection_dim=16)
    second = dataclasses.replace(openclip, with_projection=True, projection_dim=8)
    text = {"sdxl_refiner": None, "sd2": openclip, "upscaler": openclip}.get(family, first)
    two = second if family.startswith("sdxl") else None
    return build(
        text,
        unet,
        dataclasses.replace(tiny.VAE, scaling_factor=SCALING.get(family, 0.18215)),
        text and tiny.tokenizer(),
        scheduler_config(family, "v_prediction" if family == "sd2" else None),
        text_2=two,
        tokenizer_2=two and tiny.tokenizer(),
        options=pipeline_options(family),
    )


def tensors_of(model, params) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        save_single_file(Path(folder) / "x.safetensors", model, params)
        return load_file(Path(folder) / "x.safetensors")
