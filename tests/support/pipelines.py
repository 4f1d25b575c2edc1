"""Small pipelines of every Stable Diffusion family as PyTorch diffusers builds them, with drawn weights.

Imported only by tests that have asked for torch with `pytest.importorskip`.
"""

from pathlib import Path

import diffusers
import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from jaxdiff.text.tokenizer import EOS
from tests.support import networks, oracle, tiny

SIDE = 16  # pixels; the autoencoder halves it
LATENT = 8
TEXT_WIDTH = 16
PROJECTION = 20
UNET = networks.SMALL_UNET | {
    "sample_size": LATENT,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_WIDTH,
}
SDXL = {
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "use_linear_projection": True,
    "attention_head_dim": (2, 4),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}
UNETS = {
    "sd1": UNET,
    "sd2": UNET | {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "sdxl": UNET | SDXL | {"projection_class_embeddings_input_dim": 6 * 8 + PROJECTION},
    "refiner": UNET
    | SDXL
    | {"cross_attention_dim": TEXT_WIDTH, "projection_class_embeddings_input_dim": 5 * 8 + PROJECTION},
    "inpaint": UNET | {"in_channels": 9},
    "xl_inpaint": UNET | SDXL | {"in_channels": 9, "projection_class_embeddings_input_dim": 6 * 8 + PROJECTION},
    "xl_controls": UNET | SDXL | {"projection_class_embeddings_input_dim": 6 * 8 + PROJECTION},
    "upscaler": UNET
    | {"in_channels": 7, "num_class_embeds": 50, "only_cross_attention": (True, False), "use_linear_projection": True},
    "distilled": UNET | {"time_cond_proj_dim": 16},
    "lcm": UNET | {"time_cond_proj_dim": 16},
}
VAE = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
TINY_VAE = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = BETAS | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def tokenizer(folder: Path, padding: str = EOS) -> CLIPTokenizer:
    """CLIP's pads with the end, OpenCLIP's with "!"."""
    tiny.tokenizer().save(folder)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=tiny.MAX_LENGTH, pad_token=padding)


def text_encoder(cls: type = CLIPTextModel, act: str = "quick_gelu") -> torch.nn.Module:
    ids = {"bos_token_id": tiny.tokenizer().bos_id, "eos_token_id": tiny.tokenizer().eos_id}
    sizes = {"hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    length = {"vocab_size": tiny.tokenizer().vocab_size, "max_position_embeddings": tiny.MAX_LENGTH}
    return oracle.drawn(cls(CLIPTextConfig(**ids, **sizes, **length, hidden_act=act, projection_dim=PROJECTION)))


def open_clip() -> torch.nn.Module:
    return text_encoder(CLIPTextModelWithProjection, "gelu")


def controlnet(unet: dict, seed: float = 0) -> diffusers.ControlNetModel:
    """One for a UNet of this config; `seed` makes the weights of several differ."""
    config = {k: v for k, v in unet.items() if k not in ("sample_size", "up_block_types", "in_channels")}
    net = oracle.drawn(diffusers.ControlNetModel(**config, conditioning_embedding_out_channels=(8, 16)))
    with torch.no_grad():
        for p in net.parameters():
            p += seed
    return net


def pipeline(name: str, folder: Path, prediction: str = "epsilon", **scheduler) -> diffusers.DiffusionPipeline:
    """A pipeline of a family: sd1, sd2, sdxl, refiner, inpaint, blend (ordinary network), img2img, upscaler, lcm …"""
    unet = UNETS.get(name, UNET)
    parts = {
        "unet": oracle.drawn(diffusers.UNet2DConditionModel(**unet)),
        "vae": oracle.drawn(diffusers.AutoencoderKL(**VAE)),
        "scheduler": diffusers.DDIMScheduler(**DDIM | {"prediction_type": prediction} | scheduler),
    }
    first = {"text_encoder": text_encoder(), "tokenizer": tokenizer(folder / "first")}
    second = {"text_encoder_2": open_clip(), "tokenizer_2": tokenizer(folder / "second", "!")}
    if name == "taesd":
        parts["vae"] = oracle.drawn(diffusers.AutoencoderTiny(**TINY_VAE))
    if name == "control":
        parts["controlnet"] = controlnet(unet)
    if name == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts, **first, **second, add_watermarker=False)
    if name == "xl_inpaint":
        return diffusers.StableDiffusionXLInpaintPipeline(**parts, **first, **second, add_watermarker=False)
    if name == "xl_controls":
        nets = [controlnet(unet), controlnet(unet, 0.1)]
        return diffusers.StableDiffusionXLControlNetPipeline(
            **parts, **first, **second, controlnet=nets, add_watermarker=False
        )
    if name == "refiner":
        none = {"text_encoder": None, "tokenizer": None}
        options = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False, "add_watermarker": False}
        return diffusers.StableDiffusionXLImg2ImgPipeline(**parts, **none, **second, **options)
    if name in ("sd2", "upscaler"):
        first = {"text_encoder": text_encoder(act="gelu"), "tokenizer": tokenizer(folder / "second", "!")}
    if name == "upscaler":
        low_res = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        return diffusers.StableDiffusionUpscalePipeline(**parts, **first, low_res_scheduler=low_res, max_noise_level=40)
    if name == "lcm":
        parts["scheduler"] = diffusers.LCMScheduler(**DDIM | {"prediction_type": prediction})
    cls = {
        "inpaint": diffusers.StableDiffusionInpaintPipeline,
        "blend": diffusers.StableDiffusionInpaintPipeline,
        "img2img": diffusers.StableDiffusionImg2ImgPipeline,
        "lcm": diffusers.LatentConsistencyModelPipeline,
        "control": diffusers.StableDiffusionControlNetPipeline,
    }.get(name, diffusers.StableDiffusionPipeline)
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return cls(**parts, **first, **rest)


def inject(monkeypatch, module, *arrays: np.ndarray) -> None:
    """Let PyTorch's pipeline draw these arrays [B, h, w, C], one a call, as noise, and encoders return their mean."""
    queue = [oracle.nchw(np.asarray(a, np.float32)) for a in arrays]
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **kwargs: queue.pop(0).reshape(shape))
    gaussian = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(gaussian, "sample", lambda self, generator=None: self.mode())
