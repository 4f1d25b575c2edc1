"""Pictures steered by ControlNets are those of PyTorch diffusers' pipelines with the same weights and noise."""

import numpy as np
import pytest

import jaxdiff
from jaxdiff.io.controlnet import load_controlnet
from jaxdiff.models.model import with_controlnets

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests import controlnet_oracle, oracle, pipelines  # noqa: E402
from tests.pipelines import LATENT, SIDE  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPTS = ["a red dragon", "a castle"]
OF_THE_UNET = ("sample_size", "up_block_types")
LEVELS = 2  # grey levels; see test_tasks.py


def test_pictures_equal_pytorchs(tmp_path):
    """Two ControlNets at different scales on Stable Diffusion 1.x."""
    name, scales, side = "sd1", [0.8, 0.5], SIDE
    config = {k: v for k, v in pipelines.UNETS[name].items() if k not in OF_THE_UNET}
    nets = [controlnet_oracle.controlnet(config | {"conditioning_embedding_out_channels": (8, 16)}) for _ in scales]
    torch.nn.init.normal_(
        nets[1].controlnet_mid_block.weight, generator=torch.Generator().manual_seed(0)
    )  # not the same twice
    plain = pipelines.pipeline(name, tmp_path / "parts")
    plain.save_pretrained(tmp_path / "model")
    pipeline = diffusers.StableDiffusionControlNetPipeline(**plain.components, controlnet=nets)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    hints = [rng.uniform(0, 1, (2, side, side, 3)).astype(np.float32) for _ in scales]
    noise = rng.standard_normal((2, side * LATENT // SIDE, side * LATENT // SIDE, 4)).astype(np.float32)
    theirs = pipeline(
        PROMPTS,
        [oracle.nchw(hint) for hint in hints],
        controlnet_conditioning_scale=scales,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=oracle.nchw(noise),
        output_type="np",
    ).images

    loaded = []
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(i))
        loaded.append(load_controlnet(tmp_path / str(i)))
    model, params = jaxdiff.load(tmp_path / "model")
    controlled = with_controlnets(model, params, *loaded)
    options = {"steps": 4, "guidance_scale": 3.0, "noise": noise}
    ours = jaxdiff.generate(*controlled, PROMPTS, control_images=hints, controlnet_scale=scales, **options)
    assert np.abs(ours / 255.0 - theirs).max() <= LEVELS / 255
    assert np.abs(ours / 255.0 - jaxdiff.generate(model, params, PROMPTS, **options) / 255.0).max() > 10 * LEVELS / 255
