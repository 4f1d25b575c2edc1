"""Teach a model one subject by three to ten images of it, without forgetting its class (Ruiz et al. 2023).

    python sample.py --model my-sd15/ --prompt "a photo of a dog" --num_images 200 --output class/
    python train.py --config=configs/finetune/dreambooth.py --workdir=runs/dog \
        --config.data.path=my-dog/ --config.data.captions="('a photo of sks dog',)" \
        --config.prior_preservation.path=class/ --config.prior_preservation.captions="('a photo of a dog',)" \
        --config.init_from.model=my-sd15/ --config.eval.prompts="('sks dog on a beach',)"

Half of each batch are images of the class, whose loss counts config.prior_preservation.weight times. Without
prior_preservation.path the model forgets the class.

Cost: as configs/finetune/full.py. --config.stage=lora trains a LoRA instead, which wants --config.learning_rate=1e-4.
"""

from ml_collections import ConfigDict

from jaxdiff.training.defaults import fine_tuning


def get_config() -> ConfigDict:
    config = fine_tuning("unet")
    config.trainable = ("unet", "text_encoder")
    config.update({"steps": 800, "batch_size": 4, "learning_rate": 2e-6, "warmup_steps": 0, "caption_dropout": 0.0})
    config.update({"schedule": "constant", "ema_decay": 0.0})
    config.update({"log_every": 10, "eval_every": 200, "checkpoint_every": 200})
    return config
