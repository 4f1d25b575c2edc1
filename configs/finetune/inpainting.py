"""Make an inpainting model: a UNet that also sees a mask and what is left of the image (Rombach et al. 2022, 4.5).

    python train.py --config=configs/finetune/inpainting.py --workdir=runs/inpainting \
        --config.data.path=images/ --config.init_from.model=my-sd15/
    python sample.py --model runs/inpainting/export --image room.png --mask mask.png --prompt "a red sofa"

It starts from an inpainting model, or from a plain model, whose UNet gets five more channels with weight 0. The masks
are random: up to four rectangles, and everything for a quarter of the images. Cost: as configs/finetune/full.py.
"""

from ml_collections import ConfigDict

from jaxdiff.training.defaults import fine_tuning


def get_config() -> ConfigDict:
    config = fine_tuning("inpainting")
    config.update({"steps": 50_000, "batch_size": 32, "accumulate": 2, "learning_rate": 1e-5})
    config.update({"schedule": "constant", "ema_decay": 0.9995})
    return config
