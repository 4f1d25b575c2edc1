"""The denoiser of the icons model, on the encoders of the stages before.

python train.py --config=configs/icons/unet.py --workdir=runs/unet
    One GPU, the whole set; not run yet.
python train.py --config=configs/icons/unet.py:cpu --workdir=runs/unet
    Two CPU cores, 192 pictures: 45 minutes at 36 pictures/s; the subjects below can be
    recognised from update 1,500 on.
"""

from ml_collections import ConfigDict

from configs.common import base
from configs.icons import sizes

# What two CPU cores can learn to draw in an hour.
SUBJECTS = """
    castle, dog, pen, sunglasses, teddy bear, rocket, cat, red apple, cherries, watermelon, carrot, pizza,
    hamburger, birthday cake, doughnut, house, bus, bicycle, airplane, sailboat, star, crescent moon, rainbow,
    snowman, umbrella, Christmas tree, cactus, tulip, sunflower, fish, dolphin, penguin, owl, butterfly, pig,
    rabbit, panda, unicorn, crown, guitar, soccer ball, key, pencil, camera, light bulb, balloon, robot, ghost
"""
STYLES = ("cartoon emoji", "flat emoji", "3d render", "pixel art")


def get_config(scale: str = "gpu") -> ConfigDict:
    config = base()
    config.stage = "unet"
    config.model = ConfigDict(sizes.model(sizes.check(scale)))
    config.init_from.vae = "runs/vae/export"
    config.init_from.text_encoder = "runs/clip/export"
    config.data.path = "data/icons"
    config.trainable = ("unet", "text_encoder")
    config.eval.guidance_scale = 4.0
    config.eval.prompts = (
        "a castle",
        "a dog",
        "a pen",
        "sunglasses",
        "a teddy bear",
        "a rocket, 3d render",
        "a penguin, pixel art",
        "a guitar, flat emoji",
    )
    if scale == "gpu":
        config.update({"steps": 200_000, "batch_size": 256, "learning_rate": 2e-4, "dtype": "bfloat16"})
        config.update({"ema_decay": 0.9998, "eval_every": 5000, "checkpoint_every": 5000})
    else:
        config.cache_latents = 4
        config.data.background = "white"
        config.data.filter.source = ("noto", "fluent-flat", "fluent-3d")
        config.data.filter.style = STYLES
        config.data.filter.color = (None,)
        config.data.filter.subject = tuple(s.strip() for s in " ".join(SUBJECTS.split("\n")).split(","))
        config.update({"steps": 3000, "batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 100})
        config.update({"ema_decay": 0.997, "log_every": 25, "eval_every": 500, "checkpoint_every": 250})
    return config
