"""Sizes of the icons model at both scales: "cpu", whose weights ship with the project so far, and "gpu".

"gpu" has 23.4 M parameters beside the vision encoder, 47 MB in half precision.
"""

SCALES = ("gpu", "cpu")


def check(scale: str) -> str:
    if scale not in SCALES:
        raise ValueError(f"the scale {scale!r} after the colon must be one of {', '.join(SCALES)}")
    return scale


def clip(scale: str) -> dict:
    """Text and vision encoders, of one width: pooled text and pictures meet without a projection of the text."""
    width, layers, heads = {"gpu": (256, 4, 4), "cpu": (192, 4, 3)}[scale]
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
    }
    return {"text_encoder": shared, "vision_encoder": {**shared, "image_size": 128, "patch_size": 16}}


def vae(scale: str) -> dict:
    """128 x 128 pixels to 16 x 16 latents of 4 channels."""
    channels, layers = {"gpu": ((32, 64, 96, 128), 2), "cpu": ((16, 32, 64, 128), 1)}[scale]
    return {
        "vae": {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": channels,
            "layers_per_block": layers,
            "latent_channels": 4,
            "norm_num_groups": 8,
            "sample_size": 128,
            "mid_block_add_attention": False,
            "force_upcast": False,
        }
    }


def unet(scale: str) -> dict:
    """Text is attended to at 8 x 8 and 4 x 4, where it is cheap."""
    channels, heads, groups = {"gpu": ((96, 160, 208), 8, 16), "cpu": ((64, 128, 192), 4, 32)}[scale]
    return {
        "unet": {
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": channels,
            "layers_per_block": 1,
            "attention_head_dim": heads,  # as in diffusers, the number of heads
            "cross_attention_dim": clip(scale)["text_encoder"]["hidden_size"],
            "norm_num_groups": groups,
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


def model(scale: str) -> dict:
    return {**clip(scale), **vae(scale), **unet(scale)}
