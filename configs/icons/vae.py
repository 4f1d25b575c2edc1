"""The autoencoder of the icons model, the same at both scales but for the length of the run.

python train.py --config=configs/icons/vae.py --workdir=runs/vae
    One GPU; not run yet.
python train.py --config=configs/icons/vae.py:cpu --workdir=runs/vae --config.init_from.vae=icons
    Two CPU cores (AMD EPYC, Zen 3): 30 minutes at 20 crops/s. It starts from the bundled autoencoder, or from random
    weights without the last flag. Started from the previous autoencoder, it reached 28.9 dB on held-out subjects
    (docs/icons.md).
"""

from ml_collections import ConfigDict

from configs.icons import sizes
from jaxdiff.training.defaults import base


def get_config(scale: str = "gpu") -> ConfigDict:
    config = base()
    config.stage = "vae"
    sizes.check(scale)
    config.model = ConfigDict(sizes.model())
    config.data.path = "data/icons"
    config.data.eval_split = "heldout_subjects"
    config.data.filter.source = sizes.SOURCES
    config.crop = 64
    config.weight_decay = 0.0
    config.kl_weight = 2e-4
    config.eval.images = 64
    if scale == "gpu":
        config.update({"steps": 40_000, "batch_size": 64, "learning_rate": 1e-3, "dtype": "bfloat16"})
    else:
        config.update({"steps": 2400, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 30})
        config.update({"ema_decay": 0.998, "log_every": 20, "eval_every": 300, "checkpoint_every": 150})
    return config
