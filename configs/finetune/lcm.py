"""Make a model of Stable Diffusion's shape (1.x, 2.x, SDXL) draw in 2 to 8 steps: latent consistency distillation.

    python train.py --config=configs/finetune/lcm.py --workdir=runs/lcm \
        --config.data.path=images/ --config.init_from.model=my-sd15/ --config.eval.prompts="('a castle',)"
    python sample.py --model runs/lcm/export --prompt "a castle" --steps 4 --guidance_scale 8

The UNet learns to do in one call what the guided model does in many, for guidance scales from 3 to 15, which it takes
as an input.
Cost: a step is about twice one of configs/finetune/full.py: the teacher is called with and without the prompt, and the
moving average once. 16 bytes a parameter of the UNet, and 2 of the teacher in bfloat16. Luo et al. 2023 took some
thousand updates of large batches. runs/lcm/export is a diffusers folder with an LCMScheduler.
"""

from ml_collections import ConfigDict

from jaxdiff.training.defaults import fine_tuning


def get_config() -> ConfigDict:
    config = fine_tuning("lcm")
    config.distillation.update({"guidance_min": 3.0, "guidance_max": 15.0, "guidance_dim": 256})
    config.update({"steps": 4000, "batch_size": 16, "learning_rate": 1e-5, "weight_decay": 0.0})
    config.update({"schedule": "constant", "ema_decay": 0.95, "caption_dropout": 0.0})
    config.frozen_dtype = config.get_ref("dtype")
    config.eval.update({"steps": 4, "scheduler": "lcm"})
    return config
