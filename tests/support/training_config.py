"""A config of train.py for the tiny model: tests/support/training_config.py:clip, :vae, :vae_decoder, :gan or :unet.

With :mmdit, a transformer of SD 3's kind stands in the place of the UNet.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxdiff.training.defaults import base
from tests.support.stages import UNET
from tests.support.tiny import SCHEDULER, SIDE, VAE

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

MMDIT = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32,
    "pos_embed_max_size": 6, "qk_norm": "rms_norm",
}  # fmt: skip


def get_config(stage: str = "vae") -> ConfigDict:
    config = base()
    config.stage = stage
    config.model = ConfigDict(
        {
            "text_encoder": TEXT,
            "vision_encoder": {**TEXT, "image_size": SIDE, "patch_size": 8, "projection_dim": 16},
            "unet": dataclasses.asdict(UNET),
            "vae": dataclasses.asdict(VAE),
            "scheduler": SCHEDULER.to_dict(),
        }
    )
    if stage == "mmdit":
        config.model = ConfigDict({"transformer": MMDIT})
    config.tokenizer.vocab_size = 560
    config.data.image_size = SIDE
    config.data.threads = 1
    config.adversary.update({"features": 4, "layers": 2})
    config.eval.update({"images": 4, "steps": 2})
    config.update({"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0})
    config.update({"log_every": 2, "eval_every": 0, "checkpoint_every": 100})
    return config
