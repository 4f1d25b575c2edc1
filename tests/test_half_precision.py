"""Every task in float16 and bfloat16 ends in images: `generate` raises where a pixel is no number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff.models.model import build, computing_in, with_controlnets
from tests.support import tiny
from tests.support.tiny import SIDE

IMAGE = np.random.default_rng(0).random((SIDE, SIDE, 3), np.float32)
MASK = np.arange(SIDE) > np.full((SIDE, 1), SIDE // 2)
SDXL = {
    "cross_attention_dim": 32,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
EVERYTHING = {  # that an ordinary model does at once
    "negative_prompts": "blurry",
    "blend_prompts": "a red dragon",
    "blend_negative_prompts": "a blue house",
    "variation_seed": 3,
    "guidance_rescale": 0.5,
    "guidance_interval": (0.0, 5.0),
    "image": IMAGE,
    "mask": MASK,
    "control_images": IMAGE,
    "hires": 2,
    "tile": 8,
    "frames": 2,
    "scheduler": "dpmpp_2m",
}
TASKS = {
    "ordinary": ({}, EVERYTHING),
    "inpainting": ({"in_channels": 9}, {"image": IMAGE, "mask": MASK}),
    "upscaling": ({"in_channels": 7, "num_class_embeds": 50}, {"image": IMAGE[::2, ::2]}),
    "sdxl": (SDXL, {"image": IMAGE}),
}


CASES = [(task, dtype) for task in TASKS for dtype in ("float16", "bfloat16")]
QUICK = (("upscaling", "float16"),)


@pytest.mark.parametrize(
    ("task", "dtype"), [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_every_task_ends_in_images(task, dtype):
    changes, given = TASKS[task]
    text, tokenizer = tiny.text_config(), tiny.tokenizer()
    second = {"text_2": dataclasses.replace(text, with_projection=True), "tokenizer_2": tokenizer}
    unet = dataclasses.replace(tiny.UNET, **changes)
    model = build(text, unet, tiny.VAE, tokenizer, tiny.SCHEDULER, dtype=dtype, **second if task == "sdxl" else {})
    params = jax.tree.map(lambda x: x.astype(dtype), tiny.tiny_params(model))
    if "control_images" in given:
        net, net_params = tiny.tiny_controlnet(model)
        model, params = with_controlnets(model, params, (net, jax.tree.map(lambda x: x.astype(dtype), net_params)))
    assert model.unet.dtype == dtype
    assert model.vae.dtype == (jnp.float32 if dtype == "float16" else dtype)  # it overflows in float16
    drawn = jaxdiff.generate(model, params, ["a castle"], steps=2, **given)
    for images in drawn if "frames" in given else [drawn]:
        assert images.std() > 10  # of 255: no plane


@pytest.mark.slow
def test_bfloat16_is_computed_in_float32_on_cpus():
    """Weights are bfloat16's; what is computed with them is as exact as in float32, up to the order of sums."""
    model = tiny.tiny_model()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.tiny_params(model))
    half = computing_in(model, "bfloat16")
    drawn = [jaxdiff.generate(m, params, ["a castle"], steps=3, frames=1) for m in (model, half)]
    for exact, ours in zip(*drawn, strict=True):
        assert np.abs(exact.astype(int) - ours).max() <= 1
