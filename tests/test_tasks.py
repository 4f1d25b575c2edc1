"""Every family and task draws what PyTorch diffusers draws with the same weights and noise."""

import jax
import numpy as np
import pytest

import jaxdiff
from jaxdiff.diffusion.sampling import step_keys
from jaxdiff.generate import picture_keys
from jaxdiff.io.controlnet import load_controlnet
from jaxdiff.models.model import with_controlnets
from jaxdiff.tasks import low_res_noise

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.pipelines.stable_diffusion import (  # noqa: E402
    pipeline_stable_diffusion_img2img,
    pipeline_stable_diffusion_inpaint,
    pipeline_stable_diffusion_upscale,
)
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img  # noqa: E402
from diffusers.schedulers import scheduling_lcm  # noqa: E402

from tests import oracle, pipelines  # noqa: E402
from tests.pipelines import LATENT, SIDE  # noqa: E402
from tests.test_generate import compilations  # noqa: E402, F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPTS = ["a red dragon", "a castle"]
STEPS, SCALE = 4, 3.0
# Both draw float32 pictures through some hundred operations of relative error 2**-24, enlarged by divisions by small
# alphas; far below a grey level, so that only pixels near the border of two levels may differ, by one. Users are
# promised two.
LEVELS = 2


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


NOISE = normal(2, LATENT, LATENT, 4)


@pytest.fixture(scope="module")
def image():
    """Two pictures with large areas, so that the autoencoder tells them apart."""
    coarse = np.random.default_rng(1).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)


@pytest.fixture(scope="module")
def mask():
    """White in the middle, not along the latents' borders."""
    mask = np.zeros((2, SIDE, SIDE), np.uint8)
    mask[0, 3:11, 5:14] = 255
    mask[1, :7] = 200
    return mask


def built(name, folder, prediction="epsilon", **scheduler):
    """PyTorch's pipeline, and ours from its folder."""
    pipeline = pipelines.pipeline(name, folder / "parts", prediction, **scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / name)
    return pipeline, jaxdiff.load(folder / name)


def theirs(pipeline, **kwargs):
    guidance = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "np"}
    return pipeline(PROMPTS, **guidance | kwargs).images


def latents():
    return oracle.nchw(NOISE)


def assert_same(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05  # pictures, not planes
    assert np.abs(ours / 255.0 - theirs).max() <= LEVELS / 255


def ours(loaded, *args, **kwargs):
    return jaxdiff.generate(
        *loaded, PROMPTS, *args, **{"steps": STEPS, "guidance_scale": SCALE, "noise": NOISE} | kwargs
    )


def predictions(usual):
    """Both prediction types; the usual one of a family in every run, the other in long ones."""
    other = pytest.mark.slow
    return pytest.mark.parametrize(
        "prediction", [pytest.param(p, marks=() if p == usual else other) for p in ("epsilon", "v_prediction")]
    )


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("sd1", "epsilon"),
        ("sd2", "v_prediction"),
        pytest.param("sd1", "v_prediction", marks=pytest.mark.slow),
        pytest.param("sd2", "epsilon", marks=pytest.mark.slow),
    ],
)
def test_text_alone(name, prediction, tmp_path):
    pipeline, loaded = built(name, tmp_path, prediction)
    assert loaded[0].family == name
    assert_same(
        ours(loaded, "blurry", guidance_rescale=0.7),
        theirs(pipeline, negative_prompt=["blurry"] * 2, latents=latents(), guidance_rescale=0.7),
    )


@predictions("epsilon")
def test_sdxl(prediction, tmp_path):
    pipeline, loaded = built("sdxl", tmp_path, prediction)
    assert loaded[0].family == "sdxl"
    # No negative prompt is zeros, an empty one is not; the second encoder may read something else.
    assert_same(ours(loaded), theirs(pipeline, latents=latents()))
    second = {"prompt_2": ["a blue house"] * 2, "negative_prompt": [""] * 2, "negative_prompt_2": ["a dragon"] * 2}
    assert_same(
        ours(loaded, "", prompts_2="a blue house", negative_prompts_2="a dragon"),
        theirs(pipeline, latents=latents(), **second),
    )


def test_sizes_other_than_square(tmp_path):
    """SDXL is told the size drawn; latents are half of it here."""
    pipeline, loaded = built("sdxl", tmp_path)
    noise = normal(2, 4, 12, 4)
    assert_same(ours(loaded, noise=noise), theirs(pipeline, latents=oracle.nchw(noise), height=2 * 4, width=2 * 12))


@predictions("v_prediction")
def test_img2img(prediction, image, tmp_path, monkeypatch):
    pipeline, loaded = built("img2img", tmp_path, prediction)
    for strength in (0.5, 1.0):
        pipelines.inject(monkeypatch, pipeline_stable_diffusion_img2img, NOISE)
        assert_same(
            ours(loaded, image=image, strength=strength), theirs(pipeline, image=image / 255.0, strength=strength)
        )


@predictions("epsilon")
def test_refiner(prediction, image, tmp_path, monkeypatch):
    pipeline, loaded = built("refiner", tmp_path, prediction)
    assert loaded[0].family == "sdxl_refiner"
    pipelines.inject(monkeypatch, pipeline_stable_diffusion_xl_img2img, NOISE)
    assert_same(ours(loaded, image=image, strength=0.5), theirs(pipeline, image=image / 255.0, strength=0.5))


@predictions("epsilon")
@pytest.mark.parametrize("name", ["inpaint", "blend"])
def test_inpainting(name, prediction, image, mask, tmp_path, monkeypatch):
    """With a network of 9 channels, and with an ordinary one whose latents are put back at each step."""
    pipeline, loaded = built(name, tmp_path, prediction)
    assert loaded[0].inpaints == (name == "inpaint")
    for strength in (0.5, 1.0):
        pipelines.inject(monkeypatch, pipeline_stable_diffusion_inpaint, NOISE)
        given = {"image": image / 255.0, "mask_image": mask[..., None] / 255.0, "strength": strength}
        assert_same(ours(loaded, image=image, mask=mask, strength=strength), theirs(pipeline, **given))


@predictions("v_prediction")
def test_upscaling(prediction, image, tmp_path, monkeypatch):
    pipeline, loaded = built("upscaler", tmp_path, prediction)
    assert loaded[0].family == "upscaler"
    small = image[:, :: SIDE // LATENT, :: SIDE // LATENT]
    for level in (0, 33):
        noise = low_res_noise(picture_keys(7, 2), small.shape[1:])
        pipelines.inject(monkeypatch, pipeline_stable_diffusion_upscale, noise)
        drawn = theirs(pipeline, image=small / 255.0, noise_level=level, latents=latents())
        assert_same(ours(loaded, image=small, noise_level=level, seed=7), drawn)


@predictions("epsilon")
def test_guidance_embedding(prediction, tmp_path):
    """A distilled network is told of the guidance scale, and there is no second half of the batch."""
    pipeline, loaded = built("distilled", tmp_path, prediction)
    assert_same(ours(loaded), theirs(pipeline, latents=latents()))
    assert np.abs(ours(loaded, guidance_scale=8.0).astype(int) - ours(loaded)).max() > LEVELS


@pytest.mark.parametrize("scheduler", ["euler", pytest.param("dpmpp_2m", marks=pytest.mark.slow)])
def test_blending_under_other_schedulers(scheduler, image, mask, tmp_path, monkeypatch):
    pipeline, loaded = built("blend", tmp_path)
    cls = {"euler": diffusers.EulerDiscreteScheduler, "dpmpp_2m": diffusers.DPMSolverMultistepScheduler}[scheduler]
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipelines.inject(monkeypatch, pipeline_stable_diffusion_inpaint, NOISE)
    drawn = theirs(pipeline, image=image / 255.0, mask_image=mask[..., None] / 255.0, strength=0.75)
    options = {"scheduler": scheduler, "spacing": "trailing", "strength": 0.75}
    assert_same(ours(loaded, image=image, mask=mask, **options), drawn)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_controlnets(count, image, tmp_path):
    pipeline, (model, params) = built("sd1", tmp_path)
    config = {k: v for k, v in pipelines.UNET.items() if k not in ("sample_size", "up_block_types")}
    widths = {"conditioning_embedding_out_channels": (8, 12)}
    nets = [oracle.drawn(diffusers.ControlNetModel(**config, **widths)) for _ in range(count)]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / f"net{i}")
    loaded = with_controlnets(model, params, *(load_controlnet(tmp_path / f"net{i}") for i in range(count)))
    parts = {k: v for k, v in pipeline.components.items() if k != "image_encoder"}
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=nets if count > 1 else nets[0], requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    hints, scales = [image, image[::-1]][:count], [0.8, 0.3][:count]
    pictures = [oracle.nchw(hint / np.float32(255)) for hint in hints]
    single = count == 1
    drawn = theirs(
        pipeline,
        image=pictures[0] if single else pictures,
        controlnet_conditioning_scale=scales[0] if single else scales,
        latents=latents(),
    )
    control = {"control_images": hints[0] if single else hints, "controlnet_scale": scales}
    assert_same(ours(loaded, **control), drawn)
    assert np.abs(ours(loaded).astype(int) - ours(loaded, **control)).max() > LEVELS


@pytest.mark.slow
def test_lcm(tmp_path, monkeypatch):
    """The noise of each step is that of our keys; the last step draws none."""
    pipeline, loaded = built("lcm", tmp_path)
    keys = picture_keys(7, 2)
    steps = [jax.vmap(lambda key: jax.random.normal(key, NOISE.shape[1:]))(step_keys(keys, i)) for i in range(STEPS)]
    pipelines.inject(monkeypatch, scheduling_lcm, *steps)
    assert_same(ours(loaded, seed=7), theirs(pipeline, latents=latents()))


def test_nothing_compiles_for_other_values(image, tmp_path, compilations):  # noqa: F811
    """Scales, levels and intervals are traced."""
    loaded = built("upscaler", tmp_path)[1]
    small = image[:, ::2, ::2]
    first = {"image": small, "noise_level": 3, "guidance_rescale": 0.2, "guidance_interval": (0.1, 5)}
    other = {"image": small, "noise_level": [4, 40], "guidance_rescale": [0, 0.9], "guidance_interval": (0, 100)}
    drawn = ours(loaded, **first)
    compilations.clear()
    assert np.abs(drawn.astype(int) - ours(loaded, **other)).max() > LEVELS
    assert compilations == []
