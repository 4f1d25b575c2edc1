"""Every setting of a training run with its default, so that a config says only what it changes."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxdiff.config.scheduler import PREDICTION_TYPES
from jaxdiff.diffusion.schedulers import SCHEDULERS
from jaxdiff.models.layers import REMAT_POLICIES
from jaxdiff.training.options import (
    ADVERSARIES,
    AUGMENTATIONS,
    DTYPES,
    SEEDS,
    STAGES,
    DistillationOptions,
    NoiseOptions,
    Options,
    RedrawOptions,
)
from jaxdiff.training.ranges import MAX_INT, fields, leaves, setting

# Renamed settings: old name -> new name. Configs, flags and older run.json files may still use the old ones.
RENAMED = {
    "rates": "lr_multipliers",
    "moments": "moment_dtype",
    "word": "textual_inversion",
    "prior": "prior_preservation",
    "eval.pictures": "eval.images",
}


def current_name(name: str) -> str:
    """The current full name of a setting, with a warning if it or its group has been renamed."""
    for old, new in RENAMED.items():
        if name == old or name.startswith(f"{old}."):
            logging.warning("config.%s is called config.%s now; the old name will be refused later.", old, new)
            return new + name.removeprefix(old)
    return name


def with_current_names(settings: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Settings, for example of an older run.json, under their current names."""
    renamed = {}
    for name, value in settings.items():
        full_name = RENAMED.get(group + name, group + name)
        value = with_current_names(value, f"{full_name}.") if isinstance(value, Mapping) else value
        renamed[full_name.removeprefix(group)] = value
    return renamed


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their full, dotted names.

    >>> flat({"data": {"path": "a", "filter": {}}, "steps": 3})
    {'data.path': 'a', 'steps': 3}
    """
    flattened: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flattened.update(flat(value, f"{prefix}{name}."))
        else:
            flattened[f"{prefix}{name}"] = value
    return flattened


class Settings(ConfigDict):
    """A ConfigDict that also takes the old names of settings, with a warning.

    Args:
        settings: as for ConfigDict.
        group: prefix of the settings' full names, such as "eval.".
        options: of ConfigDict.
    """

    _group = ""

    def __init__(self, settings: Any = None, group: str = "", **options: Any) -> None:
        object.__setattr__(self, "_group", group)  # __setitem__ reads it during ConfigDict.__init__
        super().__init__(settings, **options)

    def _current(self, name: Any) -> Any:
        return current_name(self._group + name).removeprefix(self._group) if isinstance(name, str) else name

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self._current(key))

    def __setitem__(self, key: str, value: Any) -> None:
        name = self._current(key)
        group = f"{self._group}{name}."
        if isinstance(value, dict | ConfigDict) and any(old.startswith(group) for old in RENAMED):
            value = Settings(value, group)
        super().__setitem__(name, value)

    def update(self, *mappings: Mapping[str, Any], **settings: Any) -> None:
        for mapping in (*mappings, settings):
            super().update({self._current(name): value for name, value in mapping.items()})


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The settings as JSON values."""
    return json.loads(config.to_json_best_effort())


# Every setting of train.py: its default, with its range if not every value of the default's type is valid.
SETTINGS: dict[str, Any] = {
    "stage": setting("", choices=STAGES),
    **fields(Options),  # of the optimisation: jaxdiff/training/options.py
    "dtype": setting("float32", choices=DTYPES),  # type to compute in; parameters that learn are float32
    # Compute activations again in the backward pass, to save memory.
    "remat": setting("", choices=("", *REMAT_POLICIES)),
    # Diffusers folders, or names of bundled models, that parts come from with weights and sizes; "model" stands
    # for every part, and "vae" may be the folder of an autoencoder alone.
    "init_from": {
        name: setting("", path=True)
        for name in ("model", "text_encoder", "text_encoder_2", "vision_encoder", "vae", "unet", "upscaler")
    },
    "data": {
        "path": setting("", path=True),
        "split": "train",
        "eval_split": "",  # held-out images, filtered like those of `split`; "": the training images
        "image_size": setting(128, 0, 16384),  # pixels of a side; 0: the model's own
        # Of transparent images. Captions name random backgrounds.
        "background": setting("random", choices=("random", "white")),
        "flip": False,  # mirror at random
        # Maximum random rotation in degrees, and stretch and shift as shares of each side.
        "warp": {"rotate": setting(0.0, 0, 180), "stretch": setting(0.0, 0, 1), "shift": setting(0.0, 0, 0.5)},
        "captions": (),  # of all images, in place of their own; {} stands for textual_inversion.token
        "threads": setting(8, 0, 1024),  # that read images
        "workers": setting(0, 0, 1024),  # processes that read images; 0: the threads of this process
        "image_column": "",  # of tables, records, metadata.jsonl and metadata.csv; "": a usual name
        "text_column": "",
        # Aspect-ratio buckets: side lengths are multiples of this many pixels (64 is usual); 0: squares.
        "buckets": setting(0, 0, 16384),
        "max_aspect": setting(2.0, 1, 1000),
        # Allowed values by column of the metadata; an empty tuple allows all, max_subjects 0 as well.
        # (None,) allows those without the column, such as images of the icons set that were not recoloured.
        # The others: jaxdiff.data.filters.select.
        "filter": {
            "style": setting((), items=object),
            "source": setting((), items=object),
            "subject": setting((), items=object),
            "color": setting((), items=object),
            "max_subjects": setting(0, 0, MAX_INT),
            "min_side": setting(0, 0, MAX_INT),  # pixels
            "max_aspect": setting(0.0, 0, 1000),
            "min_caption": setting(0, 0, MAX_INT),  # characters
            "max_caption": setting(0, 0, MAX_INT),
            "where": (),  # conditions on columns: ("aesthetic>=5", "license=CC0")
            # "exact": equal files; "near": alike in all but duplicate_bits of 64.
            "duplicates": setting("", choices=("", "exact", "near")),
            "duplicate_bits": setting(4, 0, 16),
        },
    },
    # Of a fresh text encoder.
    "tokenizer": {"vocab_size": setting(4096, 514, 2**24), "max_length": setting(24, 3, 4096)},
    # Sizes of fresh parts: text_encoder, vision_encoder, vae, unet, scheduler; or in place of a UNet a transformer of
    # SD 3's kind, with text_encoder and text_encoder_2.
    "model": {},
    # Stages "vae", "vae_decoder" and "super_resolution": pixels of random squares to train on; 0: whole images, as all
    # others learn.
    "crop": setting(0, 0, 16384),
    # Stages "vae" and "vae_decoder".
    "kl_weight": setting(1e-3, 0),
    "edge_weight": setting(1.0, 0),
    # Stage "vae_decoder".
    "feature_weight": setting(0.0, 0),  # of the distance between features of the model's vision encoder; 0: none
    "redraw": fields(RedrawOptions),  # latents as the model draws them: jaxdiff/training/options.py
    "adversary": {  # and of the stage "gan"
        "loss": setting("hinge", choices=ADVERSARIES),
        "weight": setting(0.5, 0),  # vae_decoder: of its loss; 0 leaves the decoder to the other losses
        "adaptive": True,  # vae_decoder: times the ratio of the gradients at the decoder's last layer
        "start": setting(0, 0, MAX_INT),  # vae_decoder: steps before its loss reaches the decoder
        "r1": setting(0.0, 0),  # penalties of the discriminator's gradient on real images and on the others
        "r2": setting(0.0, 0),
        "augment": setting((), choices=AUGMENTATIONS),  # of what the discriminator sees
        "features": setting(64, 1, 4096),  # of its first layer; each next level has twice as many
        "layers": setting(3, 1, 8),  # of stride 2, or in the stage gan, after which the size is halved
        "init_from": setting("", path=True),  # weights in taming-transformers' layout; "": random ones
    },
    # Stage "gan": sizes of a fresh generator.
    "generator": {
        "features": setting(64, 1, 4096),  # at full size; each level below has twice as many
        "layers": setting(2, 0, 8),  # doublings of the size
        "blocks": setting(1, 1, 100),  # of each level
        "heads": setting(4, 1, 1024),  # that attend to the text
        "noise_dim": setting(128, 1, 65536),  # width of the projected noise
        "style_dim": setting(256, 1, 65536),  # width of the style vector made of noise and text
    },
    # Stage "unet" and those after it.
    # What learns, or what a LoRA changes; "unet" is whatever denoises, a transformer too.
    "trainable": setting(("unet",), choices=("unet", "transformer", "text_encoder", "text_encoder_2")),
    "prediction_type": setting("", choices=("", *PREDICTION_TYPES)),  # "": the model's own
    "zero_terminal_snr": False,  # no signal at all at the last step; True turns it on
    **fields(NoiseOptions),  # jaxdiff/training/options.py
    "embedded_guidance": setting(1.0, 0, 100),  # guidance scale that FLUX.1 dev gets as an input in training
    # Class images that keep the class from being forgotten (DreamBooth): a captioned folder, or captions for all.
    "prior_preservation": {"path": setting("", path=True), "captions": (), "weight": setting(1.0, 0, 1000)},
    # Stage "lora"; alpha 0 is the rank; endings of the layers' names, () for the projections of attention.
    "lora": {"rank": setting(8, 1, 4096), "alpha": setting(0.0, 0), "layers": ()},
    # Stage "textual_inversion": the new word, the words that it starts from, and how many vectors it has.
    "textual_inversion": {"token": "<word>", "initial": "", "vectors": setting(1, 1, 75)},
    # Stage "controlnet": a ControlNet to go on from, "" for the UNet's own way down; thresholds of the edges.
    "controlnet": {
        "init_from": setting("", path=True),
        "canny_low": setting(100.0, 0),
        "canny_high": setting(200.0, 0),
    },
    # Stage "super_resolution": sizes of a fresh network; a folder of photographs, half of each batch; and what becomes
    # of images before they are enlarged, see jaxdiff/data/degradation.py.
    "super_resolution": {
        "scale": setting(4, 2, 16),
        "num_block": setting(6, 1, 1000),
        "num_feat": setting(32, 3, 4096),
        "num_grow_ch": setting(16, 1, 4096),
        "photographs": setting("", path=True),
        "clean": setting(0.3, 0, 1),  # share of images that are only resized
        "blur": setting(2.0, 0, 7),  # the widest kernel's deviation, in pixels
        "noise": setting(0.06, 0, 1),  # the highest deviation
        "jpeg": setting(40, 1, 95),  # the lowest quality
        "second": setting(0.5, 0, 1),  # share of damaged images that go through a second round
    },
    "distillation": fields(DistillationOptions),  # stages "lcm", "lcm_lora", "scm": jaxdiff/training/options.py
    # What train.py --precompute wrote, and how it writes: views of every image, the text embeddings too, and
    # images that a device encodes at a time, as for cache_latents.
    "latents": {
        "path": setting("", path=True),
        "views": setting(1, 1, MAX_INT),
        "embeddings": False,
        "batch_size": setting(8, 1, MAX_INT),
    },
    "cache_latents": setting(0, 0, MAX_INT),  # views of each image to encode before training; 0: encode while training
    # Numbers also go to Weights & Biases (pip install ".[wandb]") where a project is named.
    "wandb": {"project": "", "name": ""},
    "eval": {
        # Number of held-out images: reconstructed (vae), ranked (clip), denoised (others, with
        # data.eval_split), or used as inputs for sample sheets.
        "images": setting(64, 0, MAX_INT),
        "prompts": (),
        "steps": setting(20, 1, 1000),
        "guidance_scale": setting(0.0, 0, 1000),  # 0: the model's own
        "scheduler": setting("dpmpp_2m", choices=SCHEDULERS),
        "seed": setting(0, 0, SEEDS),
    },
}
OPEN = ("model", "data.filter")  # groups that take further names: sizes of networks, columns of the metadata
RULES = dict(leaves(SETTINGS))  # the declaration of each setting, by its full name


def _values(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a tree of settings. A default of None becomes a placeholder of the setting's type."""
    defaults = {}
    for name, field in tree.items():
        if isinstance(field, dataclasses.Field):
            defaults[name] = placeholder(field.metadata["kind"]) if field.default is None else field.default
        else:
            defaults[name] = _values(field) if isinstance(field, Mapping) else field
    return defaults


def base() -> Settings:
    """All settings of train.py. Each may be changed on the command line: --config.batch_size=64."""
    return Settings(_values(SETTINGS), convert_dict=True)


def fine_tuning(stage: str) -> Settings:
    """`base` for a stage that starts from a finished model (config.init_from.model), in mixed precision."""
    config = base()
    config.stage = stage
    config.init_from.model = "icons"
    config.data.image_size = 0  # the model's own
    config.data.background = "white"
    config.update({"remat": "full", "dtype": "bfloat16"})
    return config
