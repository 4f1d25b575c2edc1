"""A small upscaling network that enlarges four times: images are made small and damaged, and it learns the way back.

    python train.py --config=configs/upscaler/x4.py --workdir=runs/x4 \
        --config.super_resolution.photographs=photographs/
    python train.py --config=configs/upscaler/x4.py:cpu --workdir=runs/x4 --config.super_resolution.photographs=…
    python sample.py --image small.png --upscale 4 --upscaler runs/x4/export

Half of each batch are icons, half photographs of a folder, which need no captions; without it, icons alone. For images
of one's own: --config.data.path=images/ --config.data.captions="('an image',)" --config.data.eval_split="". Photographs
should be sharp: cut large ones into tiles of some 384 pixels, which are read at data.image_size.

"gpu" has the layout of the published RealESRGAN_x4plus_anime_6B (not run yet); "cpu" is the network that ships.
To go on from any network of this layout: --config.init_from.upscaler=RealESRGAN_x4plus.pth.
"""

from ml_collections import ConfigDict

from configs.icons import sizes
from jaxdiff.training.defaults import base


def get_config(scale: str = "gpu") -> ConfigDict:
    config = base()
    config.stage = "super_resolution"
    sizes.check(scale)
    config.data.path = "data/icons"
    config.data.eval_split = "heldout_subjects"
    config.data.filter.source = sizes.SOURCES
    config.data.flip = True
    config.crop = 96
    config.weight_decay = 0.0
    config.eval.images = 48
    if scale == "gpu":
        config.update({"steps": 100_000, "batch_size": 64, "learning_rate": 2e-4, "dtype": "bfloat16"})
        config.super_resolution.update({"num_feat": 64, "num_grow_ch": 32})
    else:
        config.update({"steps": 1400, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 50})
        config.update({"ema_decay": 0.998, "log_every": 20, "eval_every": 200, "checkpoint_every": 100})
        config.super_resolution.update({"num_block": 4, "num_feat": 24, "num_grow_ch": 12})
        config.super_resolution.update({"clean": 0.5, "blur": 1.5, "noise": 0.04, "jpeg": 50})
    return config
