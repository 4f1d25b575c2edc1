"""Text and vision encoders of the icons model, and its tokenizer.

python train.py --config=configs/icons/clip.py --workdir=runs/clip
    One GPU; not run yet.
python train.py --config=configs/icons/clip.py:cpu --workdir=runs/clip
    Two CPU cores; not run yet on the whole set. With --config.init_from.text_encoder=icons and
    --config.lr_multipliers='(("text_encoder", 0.0),)' the vision encoder alone learns: docs/icons.md has the result of
    70 minutes on one core.
"""

from ml_collections import ConfigDict

from configs.icons import sizes
from jaxdiff.training.defaults import base


def get_config(scale: str = "gpu") -> ConfigDict:
    config = base()
    config.stage = "clip"
    sizes.check(scale)
    config.model = ConfigDict(sizes.model())
    config.data.path = "data/icons"
    config.data.eval_split = "heldout_pairs"
    config.data.filter.source = sizes.SOURCES
    config.weight_decay = 0.1
    config.learning_rate = 5e-4
    config.eval.images = 256
    if scale == "gpu":
        config.update({"steps": 20_000, "batch_size": 512, "dtype": "bfloat16", "warmup_steps": 1000})
    else:
        config.update({"steps": 500, "batch_size": 64, "warmup_steps": 40, "ema_decay": 0.99})
        config.update({"log_every": 10, "eval_every": 100, "checkpoint_every": 100})
    return config
