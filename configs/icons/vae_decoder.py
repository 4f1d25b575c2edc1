"""The decoder of the icons model, sharpened by a discriminator of patches; encoder and latents stay as they are.

python train.py --config=configs/icons/vae_decoder.py --workdir=runs/decoder
    One GPU; not run yet.
python train.py --config=configs/icons/vae_decoder.py:cpu --workdir=runs/decoder
    Two CPU cores (AMD EPYC, Zen 3): some 20 minutes of processor time. Its result, at update 503, is in docs/icons.md.
python train.py --config=configs/icons/vae_decoder.py --workdir=runs/decoder --config.init_from.model=my-sd15/ \
        --config.data.path=images/ --config.data.filter.source="()" --config.crop=256 --config.data.image_size=512
    The autoencoder of another model, of any Stable Diffusion family. --plan says what it takes.

runs/decoder/export is the whole model with the new decoder. --config.init_from.vision_encoder=runs/clip/export
--config.feature_weight=1.0 adds the distance between features of a vision encoder, which the bundled model lacks.
"""

from ml_collections import ConfigDict

from configs.icons import sizes
from jaxdiff.training.defaults import base


def get_config(scale: str = "gpu") -> ConfigDict:
    config = base()
    config.stage = "vae_decoder"
    sizes.check(scale)
    config.init_from.model = "icons"
    config.data.path = "data/icons"
    config.data.eval_split = "heldout_subjects"
    config.data.filter.source = sizes.SOURCES
    config.crop = 64
    config.weight_decay = 0.0
    config.discriminator_b1 = 0.5
    config.adversary.update({"weight": 0.3, "start": 100, "features": 32})
    config.eval.images = 64
    if scale == "gpu":
        config.update({"steps": 40_000, "batch_size": 64, "learning_rate": 2e-4, "dtype": "bfloat16"})
        config.adversary.update({"start": 1000, "features": 64})
    else:
        config.update({"steps": 600, "batch_size": 16, "learning_rate": 4e-4, "warmup_steps": 30})
        config.update({"discriminator_learning_rate": 4e-4, "ema_decay": 0.998})
        config.update({"log_every": 20, "eval_every": 150, "checkpoint_every": 100})
    return config
