"""Text and vision encoders of the icons model, and its tokenizer.

python train.py --config=configs/icons/clip.py --workdir=runs/clip
    One GPU, the whole set; not run yet.
python train.py --config=configs/icons/clip.py:cpu --workdir=runs/clip
    Two CPU cores, three packages of the set: 5 minutes at 57 pairs/s; finds the caption of
    21% of 256 pictures of unseen subject-style pairs among 256 captions.
"""

from ml_collections import ConfigDict

from configs.common import base
from configs.icons import sizes


def get_config(scale: str = "gpu") -> ConfigDict:
    config = base()
    config.stage = "clip"
    config.model = ConfigDict(sizes.model(sizes.check(scale)))
    config.data.path = "data/icons"
    config.data.eval_split = "heldout_pairs"
    config.weight_decay = 0.1
    config.learning_rate = 5e-4
    config.eval.pictures = 256
    if scale == "gpu":
        config.update({"steps": 20_000, "batch_size": 512, "dtype": "bfloat16", "warmup_steps": 1000})
    else:
        config.data.filter.source = ("noto", "fluent-flat", "fluent-3d")
        config.update({"steps": 250, "batch_size": 64, "warmup_steps": 40, "ema_decay": 0.99})
        config.update({"log_every": 10, "eval_every": 100, "checkpoint_every": 100})
    return config
