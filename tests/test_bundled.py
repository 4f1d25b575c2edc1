"""The model that ships with the project: it draws, and PyTorch diffusers draws the same with it."""

import numpy as np
import pytest

import jaxdiff
from jaxdiff.io.model_paths import BUNDLED

PROMPTS = ["a castle", "a rocket, 3d render"]


@pytest.fixture(scope="module")
def icons():
    return jaxdiff.load("icons")


def test_it_is_small_and_documented():
    files = [p for p in (BUNDLED / "icons").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 60e6
    card = (BUNDLED / "icons" / "README.md").read_text()
    for source in ("Noto", "Fluent", "Apache-2.0", "MIT"):
        assert source in card


def test_it_draws_a_subject_on_white(icons):
    images = jaxdiff.generate(*icons, PROMPTS, seed=0, steps=20, guidance_scale=4.0)
    assert images.shape == (2, 128, 128, 3)
    for image in images:
        border = np.concatenate([image[:4].reshape(-1, 3), image[-4:].reshape(-1, 3)])
        assert np.median(border) > 235  # white around
        assert (image.min(-1) < 160).mean() > 0.05  # and something within
    assert np.abs(images[0].astype(int) - images[1]).mean() > 5


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")  # it wants steps_offset 1
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of PyTorch tensors
def test_diffusers_draws_the_same_image(icons):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    options = icons[0].options
    pipeline = diffusers.StableDiffusionPAGPipeline.from_pretrained(
        BUNDLED / "icons", dtype=torch.float32, pag_applied_layers=list(options.pag_layers)
    )
    pipeline.set_progress_bar_config(disable=True)
    channels = icons[0].vae.config.latent_channels
    noise = np.random.default_rng(0).standard_normal((2, 16, 16, channels)).astype(np.float32)
    theirs = pipeline(
        PROMPTS,
        num_inference_steps=20,
        guidance_scale=4.0,
        pag_scale=options.pag_scale,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
    ).images
    ours = jaxdiff.generate(*icons, PROMPTS, steps=20, guidance_scale=4.0, noise=noise)
    assert np.abs(ours / 255.0 - theirs).max() <= 2 / 255
