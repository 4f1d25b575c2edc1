"""The decoder of the icons model, trained to tolerate the errors of its denoiser; encoder and latents stay as they are.

python train.py --config=configs/icons/redraw.py --workdir=runs/redraw
    One GPU; not run yet.
python train.py --config=configs/icons/redraw.py:cpu --workdir=runs/redraw
    Two CPU cores (Intel Xeon with AVX-512): 1,200 updates in 25 minutes beside other work. Its result is in
    docs/icons.md.

It learns from whole images of the things that the denoiser knows, each noised by up to a third and redrawn by its
caption. runs/redraw/export is the whole model with the new decoder.
"""

from ml_collections import ConfigDict

from configs.icons import everyday, vae_decoder


def get_config(scale: str = "gpu") -> ConfigDict:
    config = vae_decoder.get_config(scale)
    config.crop = 0
    config.adversary.weight = 0.0
    config.redraw.update({"strength": 0.35, "steps": 4, "guidance_scale": 1.0})
    if scale == "cpu":
        config.data.filter.subject = everyday.SUBJECTS
        config.data.eval_split = "heldout_pairs"
        config.update({"steps": 1200, "batch_size": 4, "learning_rate": 6e-4, "ema_decay": 0.995, "eval_every": 250})
    return config
