"""A transformer on the icons' latents, from nothing: to be compared with the UNet of configs/icons/unet.py.

python train.py --config=configs/icons/mmdit.py:cpu --workdir=runs/mmdit
    Two CPU cores, the images of configs/icons/unet.py:cpu, and about as much work an image. Not run yet. It needs
    data/icons (python -m datasets.icons --out data/icons).
python train.py --config=configs/icons/unet.py:cpu --workdir=runs/unet_fresh --config.init_from.model= \\
    --config.init_from.text_encoder=icons --config.init_from.vae=icons
    The UNet from nothing, to compare with, for as long.
python sample.py --model runs/mmdit/export --prompt "a castle" --guidance_scale 3

The bundled model's text encoder is read twice, in the places of SD 3's two, and learns on in each; nothing stands in
the place of T5. PyTorch diffusers draws the same with StableDiffusion3Pipeline(..., max_sequence_length=0).
"""

from ml_collections import ConfigDict

from configs.icons import sizes, unet


def get_config(scale: str = "gpu") -> ConfigDict:
    config = unet.get_config(scale)
    config.model = ConfigDict({**sizes.vae(), **sizes.mmdit()})
    config.init_from.update({"model": "", "text_encoder": "icons", "text_encoder_2": "icons", "vae": "icons"})
    config.trainable = ("transformer", "text_encoder", "text_encoder_2")
    config.lr_multipliers = (("text_encoder", 0.3), ("text_encoder_2", 0.3))
    config.update({"times": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0})  # as Stable Diffusion 3 was trained
    config.learning_rate = 2e-4 if scale == "gpu" else 5e-4
    return config
