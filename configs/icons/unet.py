"""The denoiser of the icons model: goes on from the bundled one.

python train.py --config=configs/icons/unet.py --workdir=runs/unet
    One GPU, the whole set; not run yet.
python train.py --config=configs/icons/unet.py:cpu --workdir=runs/unet
    Two CPU cores (AMD EPYC, Zen 3), 123 everyday things in all styles: latents in ten minutes, then 20 to 25 images/s.
    The run is meant for many hours: with images that are warped, the first hour makes the bundled model worse.
    docs/icons.md says what came of each part of it.
"""

from ml_collections import ConfigDict

from configs.icons import everyday, sizes
from jaxdiff.training.defaults import base


def get_config(scale: str = "gpu") -> ConfigDict:
    config = base()
    config.stage = "unet"
    sizes.check(scale)
    config.model = ConfigDict(sizes.model())
    config.init_from.model = "icons"
    config.data.path = "data/icons"
    config.data.eval_split = "heldout_pairs"
    config.data.filter.source = sizes.SOURCES
    config.trainable = ("unet", "text_encoder")
    config.lr_multipliers = (("text_encoder", 0.3),)
    config.data.flip = True
    config.data.warp.update({"rotate": 15.0, "stretch": 0.15, "shift": 0.05})
    config.cache_latents = 3  # of each time that the set shows an image, on another background
    config.eval.guidance_scale = 5.0
    config.eval.images = 128
    config.eval.prompts = (
        "a castle",
        "a dog",
        "a pen",
        "sunglasses",
        "a teddy bear",
        "an elephant",
        "a blue book",
        "a key, on a yellow background",
        "a rocket, 3d render",
        "a penguin, pixel art",
        "a guitar, watercolor painting",
        "a church, pencil sketch",
        "a red car",
        "a strawberry, flat emoji",
        "a bicycle, black icon",
        "a narwhal",
    )
    if scale == "gpu":
        config.update({"steps": 200_000, "batch_size": 256, "learning_rate": 2e-4, "dtype": "bfloat16"})
        config.update({"ema_decay": 0.9998, "eval_every": 5000, "checkpoint_every": 5000})
    else:
        config.data.filter.subject = everyday.SUBJECTS  # what two CPU cores learn first
        config.update({"steps": 20_000, "batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 100})
        config.update({"schedule": "linear", "ema_decay": 0.998})
        # Nearly even. A run to learn shapes first took more of the high noise, where they are decided: 0.8 and 1.2.
        config.update({"times": "logit_normal", "logit_mean": 0.2, "logit_std": 1.5})
        config.update({"log_every": 25, "eval_every": 500, "checkpoint_every": 100})
    return config
