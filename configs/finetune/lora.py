"""Teach a model a style or a subject by a LoRA: a file of some megabytes, in an evening on one GPU.

    python train.py --config=configs/finetune/lora.py --workdir=runs/lora \
        --config.data.path=images/ --config.init_from.model=my-sd15/ --config.eval.prompts="('a castle',)"
    python sample.py --model my-sd15/ --lora runs/lora/export/pytorch_lora_weights.safetensors --prompt "a castle"

runs/lora/export holds pytorch_lora_weights.safetensors, which PyTorch diffusers opens, and kohya.safetensors for other
programs. Cost: beside the model itself (2 bytes a parameter) only the LoRA's few million parameters have moments and an
average. --config.trainable="('unet','text_encoder')" changes the text encoder as well; --config.lora.rank is its size.
For a folder without captions: --config.data.captions="('a picture in the style of sks',)".
"""

from ml_collections import ConfigDict

from jaxdiff.training.defaults import fine_tuning


def get_config() -> ConfigDict:
    config = fine_tuning("lora")
    config.lr_multipliers = (("lora/text_encoder", 0.5), ("lora/text_encoder_2", 0.5))
    config.update({"steps": 2000, "batch_size": 4, "learning_rate": 1e-4, "weight_decay": 0.0})
    config.update({"schedule": "cosine", "ema_decay": 0.99})
    config.frozen_dtype = config.get_ref("dtype")
    config.update({"log_every": 10, "eval_every": 250, "checkpoint_every": 250})
    return config
