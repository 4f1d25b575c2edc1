"""Teach a pretrained model your own captioned images; docs/training.md says how to lay them out.

    python train.py --config=configs/folder.py --workdir=runs/mine \
        --config.data.path=images/ --config.init_from.model=my-sd15/ --config.eval.prompts="('a castle',)"

Without init_from.model it goes on from the bundled icons model. Every image is encoded four times, on different
backgrounds and under different captions where it has them, then trained on from memory. Cost: training the UNet of
Stable Diffusion 1.5 holds 14 GB of parameters, averages and moments; the icons model learns a few dozen images on two
CPU cores in ten minutes. Expect the style after some hundred steps and single subjects after some thousand; the loss
says little, so look at samples/.
"""

from ml_collections import ConfigDict

from jaxdiff.training.defaults import base


def get_config() -> ConfigDict:
    config = base()
    config.stage = "unet"
    config.init_from.model = "icons"
    config.data.image_size = 0  # the model's own
    config.cache_latents = 4
    config.update({"steps": 2000, "batch_size": 8, "accumulate": 2, "learning_rate": 2e-5})
    config.update({"schedule": "constant", "ema_decay": 0.995, "remat": "full"})
    config.update({"log_every": 10, "eval_every": 250, "checkpoint_every": 250})
    return config
