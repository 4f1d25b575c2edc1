"""A text-conditional GAN: draws icons in one step, from noise and text to the bundled autoencoder's latents.

python train.py --config=configs/icons/gan.py --workdir=runs/gan
    One GPU, the whole set; not run yet.
python train.py --config=configs/icons/gan.py:cpu --workdir=runs/gan
    Two CPU cores (AMD EPYC, Zen 3), 123 everyday things in all styles: latents in ten minutes, 90 CPU seconds to
    compile, then 3.05 CPU seconds an update of 64 images, so at least 21 images/s. 10,000 updates take 8.5 CPU hours.
    Not run to its end; --config.init_from.model=runs/gan/export goes on with a fresh discriminator.
python sample.py --model runs/gan/export --prompt "a castle"
    Draws at once: --steps, --scheduler and --guidance_scale are refused.

At "cpu" the generator has 5.1 M parameters and the discriminator, which is trained with it only, 1.6 M. With
generator.features 48 and adversary.features 32 they have 1.8 M and 0.4 M, and an update takes 1.23 CPU seconds.

The recipe is R3GAN's (Huang et al. 2024): the relativistic loss with both penalties at every step, residual blocks
without norms, Adam with b1 = 0, and a moving average of the generator. Both networks
read the text: the generator scales its channels by it and attends to it below full size, and the discriminator projects
on it. What to watch: score_real - score_fake settles between 0 and some 2, r1 and r2 stay finite, and deviation, the
generated latents', comes near 1. Where the drawings are all alike, raise r1 and r2; where they stay blurs, lower them.
"""

from ml_collections import ConfigDict

from configs.icons import everyday, sizes, unet
from jaxdiff.training.defaults import base


def get_config(scale: str = "gpu") -> ConfigDict:
    config = base()
    config.stage = "gan"
    sizes.check(scale)
    config.init_from.model = "icons"
    config.data.path = "data/icons"
    config.data.filter.source = sizes.SOURCES
    config.data.flip = True
    config.cache_latents = 3  # of each time that the set shows an image, on another background
    config.caption_dropout = 0.0
    config.adversary.update({"loss": "relativistic", "r1": 0.5, "r2": 0.5, "layers": 2})
    config.update({"b1": 0.0, "b2": 0.99, "weight_decay": 0.0, "clip_norm": 0.0, "schedule": "linear"})
    config.eval.prompts = unet.get_config(scale).eval.prompts
    if scale == "gpu":
        config.update({"steps": 200_000, "batch_size": 256, "learning_rate": 2e-4, "ema_decay": 0.9998})
        config.update({"eval_every": 5000, "checkpoint_every": 5000})
        config.generator.update({"features": 128, "blocks": 2})
        config.adversary.features = 96
    else:
        config.data.filter.subject = everyday.SUBJECTS  # what two CPU cores learn first
        config.update({"steps": 10_000, "batch_size": 64, "learning_rate": 3e-4, "warmup_steps": 50})
        config.update({"ema_decay": 0.998, "log_every": 25, "eval_every": 500, "checkpoint_every": 100})
        config.generator.features = 96
        config.adversary.features = 64
    return config
