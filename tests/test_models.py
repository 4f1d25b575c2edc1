"""Every network equals PyTorch's on the same random weights, live where torch is installed and by golden outputs elsewhere."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import CLIPTextConfig, CLIPVisionConfig, ConfigError, UNetConfig, VAEConfig
from jaxdiff.io.weights import load_tensors
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL

# Float32 rounding accumulates over some hundred operations of relative error 2**-24 each: about 1e-6 here. 1e-4 is
# what users of a checkpoint notice; the small models must stay well below it.
TOLERANCE = 1e-5


def error(ours, reference) -> float:
    """Relative L2 error."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def read(module, weights: Path, *inputs):
    """The module's parameters from a PyTorch file, after initialising shapes with the inputs."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)["params"])
    return {"params": load_tensors(weights, shapes, jnp.float32)}


@pytest.fixture(scope="module")
def oracle():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tests import oracle

    return oracle


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "upscaler", "inpainting", "distilled", "class_timestep"])
def test_unet_equals_diffusers(oracle, name, tmp_path):
    reference = oracle.unet(name)
    weights = oracle.save(reference, tmp_path)
    inputs = oracle.unet_inputs(oracle.UNETS[name])
    unet = UNet2DConditionModel(UNetConfig.load(tmp_path / "config.json"))
    variables = read(unet, weights, *ordered(inputs))
    assert error(jax.jit(unet.apply)(variables, *ordered(inputs)), oracle.run_unet(reference, inputs)) < TOLERANCE


def ordered(inputs: dict) -> list:
    names = ("x", "t", "embeddings", "pooled", "time_ids", "class_labels", "guidance")
    return [inputs.get(n) for n in names]


def test_unet_odd_sizes_and_chunked_attention_equal_diffusers(oracle, tmp_path):
    """9 rows do not halve evenly; 32x32 positions are many enough for attention in chunks."""
    reference = oracle.unet("sd1")
    weights = oracle.save(reference, tmp_path)
    unet = UNet2DConditionModel(UNetConfig.load(tmp_path / "config.json"))
    for side in (9, 32):
        inputs = oracle.unet_inputs(oracle.UNETS["sd1"], side)
        variables = read(unet, weights, *ordered(inputs))
        assert error(unet.apply(variables, *ordered(inputs)), oracle.run_unet(reference, inputs)) < TOLERANCE


@pytest.mark.parametrize("name", ["sd1", "sixteen_channels"])
def test_vae_equals_diffusers(oracle, name, tmp_path):
    reference = oracle.vae(name)
    weights = oracle.save(reference, tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    vae = AutoencoderKL(VAEConfig.load(tmp_path / "config.json"))
    variables = read(vae, weights, images)
    mean, logvar = vae.apply(variables, images, method="encode")
    gaussian = reference.encode(oracle.nchw(images)).latent_dist
    assert error(mean, oracle.nhwc(gaussian.mean)) < TOLERANCE
    assert error(logvar, oracle.nhwc(gaussian.logvar)) < TOLERANCE
    decoded = oracle.nhwc(reference.decode(oracle.nchw(np.array(mean))).sample)
    assert error(vae.apply(variables, mean, method="decode"), decoded) < TOLERANCE


@pytest.mark.parametrize("name", ["vit_l", "old_eos", "openclip"])
def test_text_encoder_equals_transformers(oracle, name, tmp_path):
    import torch

    reference = oracle.text(name)
    weights = oracle.save(reference, tmp_path)
    tokens = np.array([[598, 5, 9, 599, 599, 599], [598, 77, 500, 12, 31, 599]], np.int32)
    text = CLIPTextModel(CLIPTextConfig.load(tmp_path / "config.json"))
    ours = text.apply(read(text, weights, tokens), tokens)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(tokens).long(), output_hidden_states=True)
    assert error(ours.last_hidden_state, theirs.last_hidden_state) < TOLERANCE
    for mine, reference_state in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert error(mine, reference_state) < TOLERANCE
    if name == "openclip":
        assert error(ours.projected, theirs.text_embeds) < TOLERANCE
    else:
        assert error(ours.pooled, theirs.pooler_output) < TOLERANCE


def test_vision_encoder_equals_transformers(oracle, tmp_path):
    import torch

    reference = oracle.vision()
    weights = oracle.save(reference, tmp_path)
    pixels = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    vision = CLIPVisionModel(CLIPVisionConfig.load(tmp_path / "config.json"))
    ours = vision.apply(read(vision, weights, pixels), pixels)
    with torch.no_grad():
        theirs = reference(oracle.nchw(pixels)).image_embeds
    assert error(ours, theirs) < TOLERANCE
