"""Stable Diffusion 1.5's own shapes, with random weights: what the benchmarks and the full-size tests run on."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from jaxdiff.io.model_paths import BUNDLED

UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # 860 M parameters
VAE = {  # 84 M
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT = {  # 123 M
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
TOKENS = [49406, 320, 1125, 539, 320, 2368] + [49407] * 71  # "a photo of a cat"


def make(name: str, folder: Path) -> tuple[torch.nn.Module, Path]:
    """A random model ("unet", "vae" or "text_encoder") for evaluation, and its safetensors file in `folder`."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = {
            "unet": lambda: UNet2DConditionModel(**UNET),
            "vae": lambda: AutoencoderKL(**VAE),
            "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
        }[name]()
    model.eval().save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    (weights,) = folder.glob("*.safetensors")
    return model, weights


def pipeline(folder: Path) -> StableDiffusionPipeline:
    """The whole pipeline, random weights and CLIP's own vocabulary, also saved in `folder`."""
    parts = {name: make(name, folder / name)[0] for name in ("unet", "vae", "text_encoder")}
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED / "clip_tokenizer")
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    pipe = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    tokenizer.save_pretrained(folder / "tokenizer")
    pipe.save_config(folder)
    return pipe
