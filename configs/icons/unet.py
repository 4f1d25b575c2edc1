"""The denoiser of the icons model, on the encoders of the stages before.

python train.py --config=configs/icons/unet.py --workdir=runs/unet
python train.py --config=configs/icons/unet.py:cpu --workdir=runs/unet
"""

from ml_collections import ConfigDict

from configs.common import base
from configs.icons import sizes


def get_config(scale: str = "gpu") -> ConfigDict:
    config = base()
    config.stage = "unet"
    config.model = ConfigDict(sizes.model(sizes.check(scale)))
    config.init_from.vae = "runs/vae/export"
    config.init_from.text_encoder = "runs/clip/export"
    config.data.path = "data/icons"
    config.eval.prompts = (
        "a castle, 3d",
        "a castle, flat emoji",
        "a dog, cartoon emoji",
        "a red heart",
        "a rocket, 3d render",
        "a teddy bear, flat emoji",
        "sunglasses, on a blue background",
        "an apple, on a yellow background",
    )
    if scale == "gpu":
        config.trainable = ("unet", "text_encoder")
        config.update({"steps": 200_000, "batch_size": 256, "learning_rate": 2e-4, "dtype": "bfloat16"})
        config.update({"ema_decay": 0.9998, "eval_every": 5000, "checkpoint_every": 5000})
    else:
        config.trainable = ("unet", "text_encoder")
        config.cache_latents = 3
        config.data.filter.source = ("noto", "fluent-flat", "fluent-3d")
        config.data.filter.max_subjects = 600
        config.update({"steps": 6000, "batch_size": 32, "learning_rate": 5e-4, "warmup_steps": 100})
        config.update({"ema_decay": 0.998, "log_every": 25, "eval_every": 500, "checkpoint_every": 500})
    return config
