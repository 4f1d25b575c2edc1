"""Every setting of a training run with its default, so that a config says only what it changes."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from jaxdiff.training.options import NoiseOptions, Options

# Settings that had another name, which configs, flags and the run.json of older runs may still use.
RENAMED = {
    "rates": "lr_multipliers",
    "moments": "moment_dtype",
    "word": "textual_inversion",
    "prior": "prior_preservation",
}


def current_name(name: Any) -> Any:
    """The name of a setting today, with a warning where it was an old one."""
    if name not in RENAMED:
        return name
    logging.warning("config.%s is called config.%s now; the old name will be refused later.", name, RENAMED[name])
    return RENAMED[name]


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, such as those of an older run.json, under the names that they have today."""
    return {RENAMED.get(name, name): value for name, value in settings.items()}


class Settings(ConfigDict):
    """A ConfigDict that also takes the old names of settings, with a warning."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(current_name(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(current_name(key), value)

    def update(self, *other: Mapping[str, Any], **more: Any) -> None:
        for given in (*other, more):
            super().update({current_name(name): value for name, value in given.items()})


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The settings as what JSON can hold."""
    return json.loads(config.to_json_best_effort())


def base() -> Settings:
    """All settings of train.py. Each may be changed on the command line: --config.batch_size=64."""
    return Settings(
        {
            # "clip", "vae" or "unet"; "lora", "textual_inversion", "controlnet", "inpainting", "upscaler"
            "stage": "",
            **dataclasses.asdict(Options()),  # of the optimisation: jaxdiff/training/options.py
            "dtype": "float32",  # type to compute in; parameters that learn are float32
            "remat": "",  # compute activations again in the backward pass, to save memory: full, dots or dots_no_batch
            # Diffusers folders, or names of bundled models, that parts come from with weights and sizes; "model" stands
            # for every part, and "vae" may be the folder of an autoencoder alone.
            "init_from": {"model": "", "text_encoder": "", "vision_encoder": "", "vae": "", "unet": ""},
            "data": {
                "path": "",
                "split": "train",
                "eval_split": "",  # images set aside; "": those of `split`
                "image_size": 128,  # pixels of a side; 0: the model's own
                "background": "random",  # of transparent images: random (and named in the caption) or white
                "flip": False,  # mirror at random
                "captions": (),  # of all images, in place of metadata.jsonl; {} stands for textual_inversion.token
                "threads": 8,  # that read images
                "workers": 0,  # processes that read images; 0: the threads of this process
                "image_column": "",  # of Parquet, Arrow and ArrayRecord data; "": a usual name
                "text_column": "",
                # Sizes of one area at the images' own aspects, in multiples of so many pixels (64); 0: squares.
                "buckets": 0,
                "max_aspect": 2.0,
                # Allowed values by column of the metadata; an empty tuple allows all, max_subjects 0 as well.
                # (None,) allows those without the column, such as images of the icons set that were not recoloured.
                # The others: jaxdiff.data.filters.select.
                "filter": {
                    "style": (),
                    "source": (),
                    "subject": (),
                    "color": (),
                    "max_subjects": 0,
                    "min_side": 0,  # pixels
                    "max_aspect": 0.0,
                    "min_caption": 0,  # characters
                    "max_caption": 0,
                    "where": (),  # conditions on columns: ("aesthetic>=5", "license=CC0")
                    "duplicates": "",  # "exact": equal files; "near": alike in all but duplicate_bits of 64
                    "duplicate_bits": 4,
                },
            },
            "tokenizer": {"vocab_size": 4096, "max_length": 24},  # of a fresh text encoder
            "model": {},  # sizes of fresh parts: text_encoder, vision_encoder, vae, unet, scheduler
            # Stage "vae".
            "crop": 0,  # pixels of random squares to train on; 0: whole images, as all other stages learn
            "kl_weight": 1e-3,
            "edge_weight": 1.0,
            # Stage "unet" and those after it.
            "trainable": (
                "unet",
            ),  # or ("unet", "text_encoder", "text_encoder_2"): what learns, or what a LoRA changes
            "prediction_type": "",  # epsilon, v_prediction, sample or flow_prediction; "": the model's own
            "zero_terminal_snr": False,  # no signal at all at the last step; True turns it on
            **dataclasses.asdict(NoiseOptions()),  # jaxdiff/training/options.py
            # Class images beside one's own, so that the class is not forgotten (DreamBooth): a folder, captioned, or
            # with these captions for all.
            "prior_preservation": {"path": "", "captions": (), "weight": 1.0},
            # Stage "lora"; alpha 0 is the rank; endings of the layers' names, () for the projections of attention.
            "lora": {"rank": 8, "alpha": 0.0, "layers": ()},
            # Stage "textual_inversion": the new word, the words that it starts from, and how many vectors it has.
            "textual_inversion": {"token": "<word>", "initial": "", "vectors": 1},
            # Stage "controlnet": a ControlNet to go on from, "" for the UNet's own way down; thresholds of the edges.
            "controlnet": {"init_from": "", "canny_low": 100.0, "canny_high": 200.0},
            # What train.py --precompute wrote, and how it writes: views of every image, the text embeddings too, and
            # images that a device encodes at a time, as for cache_latents.
            "latents": {"path": "", "views": 1, "embeddings": False, "batch_size": 8},
            "cache_latents": 0,  # encode so many views of every image beforehand; 0: encode as they are read
            # Numbers also go to Weights & Biases (pip install ".[wandb]") where a project is named.
            "wandb": {"project": "", "name": ""},
            "eval": {
                # Number of held-out images: reconstructed (vae), ranked (clip), denoised (others, with
                # data.eval_split), or used as inputs for sample sheets.
                "pictures": 64,
                "prompts": (),
                "steps": 20,
                "guidance_scale": 0.0,  # 0: the model's own
                "scheduler": "dpmpp_2m",
                "seed": 0,
            },
        },
        convert_dict=True,
    )


def fine_tuning(stage: str) -> Settings:
    """`base` for a stage that starts from a finished model (config.init_from.model), in mixed precision."""
    config = base()
    config.stage = stage
    config.init_from.model = "icons"
    config.data.image_size = 0  # the model's own
    config.data.background = "white"
    config.update({"remat": "full", "dtype": "bfloat16"})
    return config
