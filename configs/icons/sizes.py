"""Sizes of the icons model: 16 M parameters beside the vision encoder, and how it is trained at each scale.

"cpu" is two CPU cores for some hours, "gpu" one accelerator. Both train the same networks on the same images.
"""

SCALES = ("gpu", "cpu")
# What is learned from. Twemoji and Emojione are left out: by their drawings the model is judged.
SOURCES = (
    "noto",
    "noto-v1",
    "fluent-gradient",
    "fluent-flat",
    "fluent-mono",
    "fluent-3d",
    "fxemoji",
    "flat-color-icons",
    "meteocons",
    "openclipart",
    "streamline",
    "game-icons",
    "mdi",
    "mingcute",
    "hugeicons",
    "lucide",
    "icon-park",
    "cyber",
)


def check(scale: str) -> None:
    if scale not in SCALES:
        raise ValueError(f"the scale {scale!r} after the colon must be one of {', '.join(SCALES)}")


def clip() -> dict:
    """Text and vision encoders, of one width: pooled text and images meet without a projection of the text."""
    width = 192
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "projection_dim": width,
    }
    return {"text_encoder": shared, "vision_encoder": {**shared, "image_size": 128, "patch_size": 16}}


def vae() -> dict:
    """128 x 128 pixels to 16 x 16 latents of 8 channels."""
    return {
        "vae": {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (16, 32, 64, 128),
            "layers_per_block": 1,
            "latent_channels": 8,
            "norm_num_groups": 8,
            "sample_size": 128,
            "mid_block_add_attention": False,
            "force_upcast": False,
        }
    }


def unet() -> dict:
    """Text is attended to at 8 x 8 and 4 x 4, where it is cheap."""
    return {
        "unet": {
            "sample_size": 16,
            "in_channels": vae()["vae"]["latent_channels"],
            "out_channels": vae()["vae"]["latent_channels"],
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (64, 128, 192),
            "layers_per_block": 1,
            "attention_head_dim": 4,  # as in diffusers, the number of heads
            "cross_attention_dim": clip()["text_encoder"]["hidden_size"],
            "norm_num_groups": 32,
        },
        # No signal at all at the last step, so that backgrounds become the colour that is asked for (Lin et al. 2023).
        "scheduler": {
            "_class_name": "DPMSolverMultistepScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "clip_sample": False,
        },
    }


def mmdit() -> dict:
    """A transformer of Stable Diffusion 3's kind: 64 tokens of an image beside 24 of a text, six blocks.

    A pass takes 0.86 GFLOP, the UNet's 0.78.
    """
    encoder, width, channels = clip()["text_encoder"], 256, vae()["vae"]["latent_channels"]
    text = encoder["hidden_size"]
    return {
        "text_encoder": encoder,
        "text_encoder_2": encoder,
        "transformer": {
            "sample_size": 16,
            "in_channels": channels,
            "out_channels": channels,
            "num_layers": 6,
            "attention_head_dim": 64,
            "num_attention_heads": width // 64,
            "joint_attention_dim": 2 * text,  # two text encoders' states side by side
            "caption_projection_dim": width,
            "pooled_projection_dim": 2 * text,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
        },
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0},
    }


def model() -> dict:
    return {**clip(), **vae(), **unet()}
