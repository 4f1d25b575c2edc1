"""The icons model in 1, 2 or 4 steps: continuous consistency distillation (sCM) of the bundled one.

python train.py --config=configs/icons/few_steps.py --workdir=runs/few_steps
    Two CPU cores, everyday things in all styles: twice the cost of an image in configs/icons/unet.py.
python sample.py --model runs/few_steps/export --prompt "a castle"
    Draws in four steps; --steps 1 and --steps 2 are faster and rougher. The teacher's guidance is built in.
"""

from ml_collections import ConfigDict

from configs.icons import unet


def get_config(scale: str = "gpu") -> ConfigDict:
    config = unet.get_config(scale)
    config.stage = "scm"
    config.init_from.model = "icons"
    config.trainable = ("unet",)
    config.lr_multipliers = ()
    config.distillation.update({"guidance_min": 3.0, "guidance_max": 3.0, "tangent_warmup": 100})
    config.update({"caption_dropout": 0.0, "times": "uniform"})
    config.update({"learning_rate": 3e-4, "schedule": "constant", "weight_decay": 0.0, "ema_decay": 0.99})
    config.eval.update({"steps": 4, "scheduler": "lcm", "guidance_scale": 0.0})
    config.dtype = "float32"  # 16 bits are too few for the derivative
    if scale == "gpu":
        config.update({"steps": 20_000, "batch_size": 256, "learning_rate": 1e-4, "eval_every": 2000})
    else:
        config.update({"steps": 2000, "batch_size": 16, "warmup_steps": 20, "eval_every": 250})
    return config
