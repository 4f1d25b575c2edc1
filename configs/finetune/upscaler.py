"""Make or teach an upscaler: a UNet that also sees a small image with noise on it, and how much (Ho et al. 2022).

    python train.py --config=configs/finetune/upscaler.py --workdir=runs/upscaler \
        --config.data.path=images/ --config.init_from.model=stable-diffusion-x4-upscaler/ --config.data.image_size=512
    python sample.py --model runs/upscaler/export --image small.png --prompt "a castle"

The small image has the size of the latents, so that the autoencoder's factor is that of the enlargement: 4 for the
published upscaler, 8 from a plain model, whose UNet gets three more channels and a table of noise levels, both with
weight 0. Cost: as configs/finetune/full.py.
"""

from ml_collections import ConfigDict

from jaxdiff.training.defaults import fine_tuning


def get_config() -> ConfigDict:
    config = fine_tuning("upscaler")
    config.update({"steps": 50_000, "batch_size": 32, "accumulate": 2, "learning_rate": 1e-5})
    config.update({"schedule": "constant", "ema_decay": 0.9995})
    return config
