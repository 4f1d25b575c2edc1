"""The denoiser of the icons model, on the encoders of the stages before.

python train.py --config=configs/icons/unet.py --workdir=runs/unet
python train.py --config=configs/icons/unet.py:cpu --workdir=runs/unet
"""

from ml_collections import ConfigDict

from configs.common import base
from configs.icons import sizes

# What two CPU cores can learn to draw in an hour.
SUBJECTS = """
    castle, dog, pen, sunglasses, teddy bear, rocket, cat, red apple, green apple, pear, grapes, cherries,
    watermelon, pineapple, tangerine, tomato, carrot, avocado, eggplant, pizza, hamburger, birthday cake,
    cookie, doughnut, soft ice cream, hot beverage, cheese wedge, egg, house, tent, bus, automobile, bicycle,
    airplane, helicopter, sailboat, train, fire engine, tractor, flying saucer, star, crescent moon, cloud,
    rainbow, snowman, snowflake, droplet, umbrella, Christmas tree, deciduous tree, evergreen tree, cactus,
    tulip, rose, sunflower, four leaf clover, fish, tropical fish, dolphin, whale, octopus, crab, turtle,
    penguin, owl, butterfly, lady beetle, pig, cow, rabbit, lion, panda, bear, koala, monkey, elephant, fox,
    unicorn, dragon, crown, top hat, t-shirt, running shoe, glasses, guitar, drum, soccer ball, basketball, key,
    scissors, pencil, books, envelope, laptop, camera, light bulb, alarm clock, wrapped gift, balloon, robot,
    alien, ghost, jack-o-lantern, anchor, magnet, battery
"""
STYLES = ("cartoon emoji", "flat emoji", "3d render", "pixel art")


def get_config(scale: str = "gpu") -> ConfigDict:
    config = base()
    config.stage = "unet"
    config.model = ConfigDict(sizes.model(sizes.check(scale)))
    config.init_from.vae = "runs/vae/export"
    config.init_from.text_encoder = "runs/clip/export"
    config.data.path = "data/icons"
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
        config.trainable = ("unet", "text_encoder")
        config.update({"steps": 200_000, "batch_size": 256, "learning_rate": 2e-4, "dtype": "bfloat16"})
        config.update({"ema_decay": 0.9998, "eval_every": 5000, "checkpoint_every": 5000})
    else:
        config.trainable = ("unet", "text_encoder")
        config.cache_latents = 6
        config.data.background = "white"
        config.data.filter.source = ("noto", "fluent-flat", "fluent-3d")
        config.data.filter.style = STYLES
        config.data.filter.subject = tuple(s.strip() for s in " ".join(SUBJECTS.split("\n")).split(","))
        config.update({"steps": 5000, "batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 100})
        config.update({"ema_decay": 0.997, "log_every": 25, "eval_every": 500, "checkpoint_every": 250})
    return config
