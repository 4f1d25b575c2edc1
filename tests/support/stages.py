"""Stages of the tiny model, with data and options to train them on."""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdiff.config import CLIPVisionConfig, SchedulerConfig
from jaxdiff.models.model import Model, build
from jaxdiff.training.defaults import base
from jaxdiff.training.options import Options
from tests.support.tiny import SCHEDULER, SIDE, UNET, VAE, text_config, tokenizer

VISION = CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=8,
    projection_dim=16,
)


BATCH = 4


# One level is enough, and quick to compile.
UNET = dataclasses.replace(
    UNET,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    block_out_channels=(8,),
)


def whole_model(scheduler: SchedulerConfig = SCHEDULER, **kwargs) -> Model:
    return build(text_config(), UNET, VAE, tokenizer(), scheduler, VISION, **kwargs)


def pictures(count: int = 8, seed: int = 0) -> np.ndarray:
    """Plain squares of one colour each, uint8 [count, SIDE, SIDE, 3]."""
    rng = np.random.default_rng(seed)
    images = np.full((count, SIDE, SIDE, 3), 255, np.uint8)
    images[:, 4:12, 4:12] = rng.integers(0, 255, (count, 1, 1, 3))
    return images


def pairs(count: int = 8) -> dict:
    words = ["castle", "red", "dragon", "blue", "house", "blurry", "a castle", "a house", "red house", "a dragon"]
    return {"image": pictures(count), "tokens": tokenizer()(words[:count])}


def options(**changes) -> Options:
    defaults = {"steps": 4, "batch_size": BATCH, "learning_rate": 1e-3, "weight_decay": 0.0, "log_every": 1}
    defaults |= {"warmup_steps": 0, "schedule": "constant", "b2": 0.999, "checkpoint_every": 1000}
    return Options(**{**defaults, **changes})


def keys(count: int = BATCH) -> jax.Array:
    return jax.random.split(jax.random.key(0), count)


def settings(stage: str, **changes) -> ConfigDict:
    config = base()
    config.stage = stage
    config.textual_inversion.update({"token": "<cat>", "initial": "castle", "vectors": 2})
    for name, value in {"caption_dropout": 0.0, **changes}.items():
        config[name].update(value) if isinstance(value, dict) else config.update({name: value})
    return config
