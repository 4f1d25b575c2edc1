"""LCM-LoRA: configs/finetune/lcm.py as a LoRA, which also works for models fine-tuned from the same base.

    python train.py --config=configs/finetune/lcm_lora.py --workdir=runs/lcm_lora \
        --config.data.path=images/ --config.init_from.model=my-sd15/ --config.eval.prompts="('a castle',)"
    python sample.py --model my-sd15/ --lora runs/lcm_lora/export/pytorch_lora_weights.safetensors \
        --scheduler lcm --steps 4 --guidance_scale 1 --prompt "a castle"

The guidance of the teacher, of scales from 3 to 15, is built in, so that --guidance_scale is 1, or up to 2 with
negative prompts. Cost: the model itself in bfloat16 and the LoRA's moments and average; a step is about twice one of
configs/finetune/lora.py. runs/lcm_lora/export holds pytorch_lora_weights.safetensors for PyTorch diffusers, with its
LCMScheduler, and kohya.safetensors.
"""

from ml_collections import ConfigDict

from jaxdiff.training.defaults import fine_tuning

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")


def get_config() -> ConfigDict:
    config = fine_tuning("lcm_lora")
    config.lora.update({"rank": 64, "layers": (*ATTENTION, *RESNETS)})
    config.distillation.update({"guidance_min": 3.0, "guidance_max": 15.0})
    config.update({"steps": 2000, "batch_size": 12, "learning_rate": 1e-4, "weight_decay": 0.0})
    config.update({"schedule": "constant", "ema_decay": 0.95, "caption_dropout": 0.0})
    config.frozen_dtype = config.get_ref("dtype")
    config.eval.update({"steps": 4, "scheduler": "lcm"})
    config.update({"log_every": 10, "eval_every": 250, "checkpoint_every": 250})
    return config
