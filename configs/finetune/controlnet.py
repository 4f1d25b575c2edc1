"""Train a ControlNet that steers a model by edges, or by images of your own kind (Zhang et al. 2023).

    python train.py --config=configs/finetune/controlnet.py --workdir=runs/edges \
        --config.data.path=images/ --config.init_from.model=my-sd15/
    python sample.py --model my-sd15/ --controlnet runs/edges/export --control_image edges.png --prompt "a castle"

The control images are the edges of the images themselves, found by Canny's detector while they are read (between the
thresholds --config.controlnet.canny_low and canny_high), or the files that the lines of metadata.jsonl name as
"conditioning_file", of the images' own sizes. The ControlNet starts as a copy of the UNet's encoder half behind zero
convolutions, or goes on from --config.controlnet.init_from. runs/edges/export is a folder that PyTorch diffusers opens.
Expect it to follow the edges rather suddenly, after some thousand updates of a large batch (section 4.1 of the paper).
"""

from ml_collections import ConfigDict

from jaxdiff.training.defaults import fine_tuning


def get_config() -> ConfigDict:
    config = fine_tuning("controlnet")
    config.caption_dropout = 0.5  # so that it learns to read the steering image by itself (section 3.3)
    config.update({"steps": 20_000, "batch_size": 32, "accumulate": 4, "learning_rate": 1e-5})
    config.update({"schedule": "constant", "ema_decay": 0.999})
    config.frozen_dtype = config.get_ref("dtype")
    return config
