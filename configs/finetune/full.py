"""Fine-tune all of the UNet or transformer of a model of any family on captioned images.

    python train.py --config=configs/finetune/full.py --workdir=runs/full \
        --config.data.path=images/ --config.init_from.model=my-sd15/ --config.eval.prompts="('a castle',)"

Cost: parameters, average and moments in float32 are 16 bytes a parameter, 14 GB for the UNet of Stable Diffusion 1.5
and 41 GB for SDXL's; --config.moment_dtype=int8 saves 6 of the 16, --config.fsdp=8 divides them over eight devices.
runs/full/export is a diffusers folder.
--config.trainable="('unet','text_encoder')" trains the text encoder as well, at a tenth of the learning rate.
"""

from ml_collections import ConfigDict

from jaxdiff.training.defaults import fine_tuning


def get_config() -> ConfigDict:
    config = fine_tuning("unet")
    config.lr_multipliers = (("text_encoder", 0.1), ("text_encoder_2", 0.1))
    config.update({"steps": 10_000, "batch_size": 16, "accumulate": 1, "learning_rate": 1e-5})
    config.update({"schedule": "constant", "ema_decay": 0.9995})
    return config
