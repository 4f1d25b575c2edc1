"""Teach a model a new word by a few images of what it means; nothing else changes (Gal et al. 2022).

    python train.py --config=configs/finetune/textual_inversion.py --workdir=runs/cat \
        --config.data.path=my-cat/ --config.textual_inversion.token="<my-cat>" --config.textual_inversion.initial=cat \
        --config.init_from.model=my-sd15/ --config.eval.prompts="('a painting of <my-cat>',)"

my-cat/ is a folder of images, which needs no captions. runs/cat/export holds learned_embeds.safetensors, a few
kilobytes, which PyTorch diffusers and `jaxdiff.load_textual_inversion` read.
--config.textual_inversion.vectors=4 gives the word more room.
Cost: gradients go through the whole UNet, but only the word has moments.
"""

from ml_collections import ConfigDict

from jaxdiff.training.adapters import TEMPLATES
from jaxdiff.training.defaults import fine_tuning


def get_config() -> ConfigDict:
    config = fine_tuning("textual_inversion")
    config.textual_inversion.initial = "picture"
    config.data.captions = TEMPLATES
    config.update({"steps": 3000, "batch_size": 4, "learning_rate": 5e-3, "warmup_steps": 0, "weight_decay": 0.0})
    config.update({"schedule": "constant", "ema_decay": 0.0, "caption_dropout": 0.0, "clip_norm": 0.0})
    config.update({"log_every": 10, "eval_every": 500, "checkpoint_every": 500})
    config.frozen_dtype = config.get_ref("dtype")
    return config
