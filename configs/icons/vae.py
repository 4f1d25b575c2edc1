"""The autoencoder of the icons model.

python train.py --config=configs/icons/vae.py --workdir=runs/vae
    One GPU, the whole set; not run yet.
python train.py --config=configs/icons/vae.py:cpu --workdir=runs/vae
    Two CPU cores, three packages of the set: 15 minutes at 30 crops/s when nothing else runs; 24.8 dB on subjects
    that it has not seen.
"""

from ml_collections import ConfigDict

from configs.common import base
from configs.icons import sizes


def get_config(scale: str = "gpu") -> ConfigDict:
    config = base()
    config.stage = "vae"
    config.model = ConfigDict(sizes.model(sizes.check(scale)))
    config.data.path = "data/icons"
    config.data.eval_split = "heldout_subjects"
    config.crop = 64
    config.learning_rate = 1e-3
    config.weight_decay = 0.0
    config.eval.pictures = 32
    if scale == "gpu":
        config.update({"steps": 40_000, "batch_size": 64, "learning_rate": 5e-4, "dtype": "bfloat16"})
    else:
        config.data.filter.source = ("noto", "fluent-flat", "fluent-3d")
        config.update({"steps": 1700, "batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 100})
        config.update({"kl_weight": 5e-4, "ema_decay": 0.995})
        config.update({"log_every": 20, "eval_every": 250, "checkpoint_every": 250})
    return config
