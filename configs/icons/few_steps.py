"""The icons model in 1, 2 or 4 steps: continuous consistency distillation (sCM) of the bundled one.

python train.py --config=configs/icons/few_steps.py --workdir=runs/few_steps
    One GPU, the whole set; not run yet.
python train.py --config=configs/icons/few_steps.py:cpu --workdir=runs/few_steps
    Two CPU cores, everyday things in all styles: an image costs twice as much as in configs/icons/unet.py. Not run to
    its end. A trial of 220 updates from earlier weights, at guidance 3 with a learning rate of 3e-4 and a
    tangent_warmup of 50, was too aggressive. In one step its images had sharper edges than the model's own, with some
    noise; in two and four steps they were noisier, and the model's own four steps were better. Hence the lower learning
    rate and the longer warm-up here.
python sample.py --model runs/few_steps/export --prompt "a castle"
    Draws in four steps; --steps 1 and --steps 2 are faster. The teacher's guidance is built in.
"""

from ml_collections import ConfigDict

from configs.icons import unet


def get_config(scale: str = "gpu") -> ConfigDict:
    config = unet.get_config(scale)
    config.stage = "scm"
    config.init_from.model = "icons"
    config.trainable = ("unet",)
    config.lr_multipliers = ()
    config.distillation.update({"guidance_min": 5.0, "guidance_max": 5.0, "tangent_warmup": 1000})
    config.update({"caption_dropout": 0.0, "times": "uniform"})
    config.update({"learning_rate": 1e-4, "schedule": "constant", "weight_decay": 0.0, "ema_decay": 0.995})
    config.eval.update({"steps": 4, "scheduler": "lcm", "guidance_scale": 0.0})
    config.dtype = "float32"  # 16 bits are too few for the derivative
    if scale == "gpu":
        config.update({"steps": 20_000, "batch_size": 256, "eval_every": 2000})
    else:
        config.update({"steps": 10_000, "batch_size": 16, "warmup_steps": 20, "eval_every": 250})
    return config
