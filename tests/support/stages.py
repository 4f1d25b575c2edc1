"""Stages of the tiny model, with data and options to train them on."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxdiff import parallel
from jaxdiff.config import CLIPVisionConfig, SchedulerConfig
from jaxdiff.models.model import Model, build
from jaxdiff.training.defaults import base
from jaxdiff.training.loop import Stage
from jaxdiff.training.options import Options
from jaxdiff.training.train_step import accumulated_grad
from jaxdiff.typing import Params
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


# One level with one transformer: quick to compile.
UNET = dataclasses.replace(
    UNET, down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None, block_out_channels=(8,)
)


def whole_model(scheduler: SchedulerConfig = SCHEDULER, **kwargs) -> Model:
    return build(text_config(), UNET, VAE, tokenizer(), scheduler, VISION, **kwargs)


def random_images(count: int = 8, seed: int = 0) -> np.ndarray:
    """Plain squares of one colour each, uint8 [count, SIDE, SIDE, 3]."""
    rng = np.random.default_rng(seed)
    images = np.full((count, SIDE, SIDE, 3), 255, np.uint8)
    images[:, 4:12, 4:12] = rng.integers(0, 255, (count, 1, 1, 3))
    return images


def write_houses(folder: Path) -> None:
    """Six of them as files, captioned "a house": data to train on."""
    folder.mkdir()
    for i in range(6):
        Image.fromarray(random_images(1, seed=i)[0]).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a house"}) for i in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def pairs(count: int = 8) -> dict:
    words = ["castle", "red", "dragon", "blue", "house", "blurry", "a castle", "a house", "red house", "a dragon"]
    return {"image": random_images(count), "tokens": tokenizer()(words[:count])}


def options(**changes) -> Options:
    defaults = {"steps": 4, "batch_size": BATCH, "learning_rate": 1e-3, "weight_decay": 0.0, "log_every": 1}
    defaults |= {"warmup_steps": 0, "schedule": "constant", "b2": 0.999, "checkpoint_every": 1000}
    return Options(**{**defaults, **changes})


def keys(count: int = BATCH) -> jax.Array:
    return jax.random.split(jax.random.key(0), count)


def trained(stage: Stage, params: Params, batch: dict, steps: int = 12, rate: float = 3e-3):
    """(all parameters after some steps, the loss at the same times and noises before and after).

    By Adam in numpy (Kingma & Ba 2015, algorithm 1): to compile an optimizer takes longer than the gradient.
    """
    mesh = parallel.mesh(devices=jax.devices()[:1])
    learnt = jax.device_get({k: params[k] for k in stage.trainable})
    frozen = {k: v for k, v in params.items() if k not in learnt}
    grad = jax.jit(lambda p, frozen, keys: accumulated_grad(stage.loss, p, frozen, batch, keys, 1, mesh))
    rows, losses = len(jax.tree.leaves(batch)[0]), []
    m = v = jax.tree.map(np.zeros_like, learnt)
    for t in range(steps + 1):  # and once more as at first
        key = jax.random.fold_in(jax.random.key(0), t % steps)
        g, metrics = jax.device_get(grad(learnt, frozen, jax.random.split(key, rows)))
        losses.append(float(metrics["loss"]))
        if t < steps:
            m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
            v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)
            size = rate * (1 - 0.999 ** (t + 1)) ** 0.5 / (1 - 0.9 ** (t + 1))
            learnt = jax.tree.map(lambda p, m, v: p - size * m / (np.sqrt(v) + 1e-8), learnt, m, v)  # noqa: B023
    return {**frozen, **learnt}, losses[0], losses[-1]


def settings(stage: str, **changes) -> ConfigDict:
    config = base()
    config.stage = stage
    config.textual_inversion.update({"token": "<cat>", "initial": "castle", "vectors": 2})
    for name, value in {"caption_dropout": 0.0, **changes}.items():
        config[name].update(value) if isinstance(value, dict) else config.update({name: value})
    return config
