"""Images steered by ControlNets are those of PyTorch diffusers' pipelines with the same weights and noise."""

import numpy as np
import pytest

import jaxdiff
from jaxdiff.io.controlnet import load_controlnet
from jaxdiff.models.model import with_controlnets

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.support import controlnet_oracle, oracle, pipelines  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPTS = ["a red dragon", "a castle"]
OF_THE_UNET = ("sample_size", "up_block_types")
LEVELS = 2  # grey levels; see test_tasks.py


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scales"), [("sd1", [0.8, 0.5]), ("sdxl", [0.8])])
def test_images_equal_pytorchs(name, scales, tmp_path):
    """Two ControlNets at different scales on Stable Diffusion 1.x, one on SDXL; sides that do not halve evenly."""
    config = {k: v for k, v in pipelines.UNETS[name].items() if k not in OF_THE_UNET}
    nets = [controlnet_oracle.controlnet(config | {"conditioning_embedding_out_channels": (8, 16)}) for _ in scales]
    torch.nn.init.normal_(
        nets[-1].controlnet_mid_block.weight, generator=torch.Generator().manual_seed(0)
    )  # not the same twice
    plain = pipelines.pipeline(name, tmp_path / "parts")
    plain.save_pretrained(tmp_path / "model")
    cls = {"sd1": diffusers.StableDiffusionControlNetPipeline, "sdxl": diffusers.StableDiffusionXLControlNetPipeline}
    pipeline = cls[name](**plain.components, controlnet=nets if len(nets) > 1 else nets[0])
    pipeline.check_inputs = lambda *args, **kwargs: None  # it wants multiples of 8 whatever the autoencoder's factor
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    hints = [rng.uniform(0, 1, (2, 18, 26, 3)).astype(np.float32) for _ in scales]
    noise = rng.standard_normal((2, 9, 13, 4)).astype(np.float32)
    images = [oracle.nchw(hint) for hint in hints]
    theirs = pipeline(
        PROMPTS,
        image=images if len(nets) > 1 else images[0],
        controlnet_conditioning_scale=scales if len(nets) > 1 else scales[0],
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
    none = jaxdiff.generate(*controlled, PROMPTS, control_images=hints, controlnet_scale=0.0, **options)
    assert np.abs(ours / 255.0 - none / 255.0).max() > 10 * LEVELS / 255
