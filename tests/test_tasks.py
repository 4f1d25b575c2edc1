"""Every family and task draws what PyTorch diffusers draws with the same weights and noise.

All images are as wide as 13 latents and as high as 9, which do not halve evenly in the UNet.
"""

import dataclasses
import inspect

import jax
import numpy as np
import pytest

import jaxdiff
from jaxdiff.diffusion.sampling_loop import step_keys
from jaxdiff.models.model import build
from jaxdiff.sampling.inputs import upscaler_noise
from jaxdiff.sampling.noise import image_keys

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.pipelines.latent_consistency_models import pipeline_latent_consistency_img2img  # noqa: E402
from diffusers.pipelines.stable_diffusion import (  # noqa: E402
    pipeline_stable_diffusion_img2img,
    pipeline_stable_diffusion_inpaint,
    pipeline_stable_diffusion_upscale,
)
from diffusers.pipelines.stable_diffusion_xl import (  # noqa: E402
    pipeline_stable_diffusion_xl_img2img,
    pipeline_stable_diffusion_xl_inpaint,
)
from diffusers.schedulers import scheduling_lcm  # noqa: E402

from tests.support import oracle, pipelines, tiny  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPTS = ["a red dragon", "a castle"]
STEPS, SCALE = 4, 3.0
# Both draw float32 images through some hundred operations of relative error 2**-24, enlarged by divisions by small
# alphas; far below a grey level, so that only pixels near the border of two levels may differ, by one. Users are
# promised two.
LEVELS = 2


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


NOISE = normal(2, 9, 13, 4)
HEIGHT, WIDTH = 2 * 9, 2 * 13


@pytest.fixture(scope="module")
def image():
    """Two images with large areas, so that the autoencoder tells them apart."""
    coarse = np.random.default_rng(1).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2)[:, :HEIGHT, :WIDTH]


@pytest.fixture(scope="module")
def mask():
    """White in the middle, not along the latents' borders."""
    mask = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    mask[0, 3:11, 5:14] = 255
    mask[1, :7] = 200
    return mask


def built(name, folder, prediction="epsilon", **scheduler):
    """PyTorch's pipeline, and ours from its folder."""
    pipeline = pipelines.pipeline(name, folder / "parts", prediction, **scheduler)
    pipeline.save_pretrained(folder / name)
    return pipeline, jaxdiff.load(folder / name)


def theirs(pipeline, **kwargs):
    given = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "np"}
    if "height" in inspect.signature(pipeline.__call__).parameters:
        given |= {"height": HEIGHT, "width": WIDTH}
    pipeline.check_inputs = lambda *args, **kwargs: None  # it wants multiples of 8 whatever the autoencoder's factor
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**{"prompt": PROMPTS} | given | kwargs).images


def latents():
    return oracle.nchw(NOISE)


def assert_same(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05  # images, not planes
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prediction"),
    [("sd1", "v_prediction"), ("sd2", "v_prediction"), ("sd2", "epsilon")],  # sd1 and epsilon: the next test
)
def test_text_alone(name, prediction, tmp_path):
    pipeline, loaded = built(name, tmp_path, prediction)
    assert loaded[0].family == name
    assert_same(
        ours(loaded, "blurry", guidance_rescale=0.7),
        theirs(pipeline, negative_prompt=["blurry"] * 2, latents=latents(), guidance_rescale=0.7),
    )


@pytest.mark.parametrize(
    ("name", "layers", "scale"),
    [
        ("sd1", ("mid",), SCALE),
        pytest.param("sd1", ("down_blocks.0", "mid", "up_blocks.1.attentions.0"), 1.0, marks=pytest.mark.slow),
        pytest.param("sdxl", ("mid",), SCALE, marks=pytest.mark.slow),
    ],
)
def test_perturbed_attention(name, layers, scale, tmp_path):
    """With it and without; with and without guidance by the text, and rescaled after both."""
    pipeline, (model, params) = built(name, tmp_path)
    cls = getattr(diffusers, type(pipeline).__name__.replace("Pipeline", "PAGPipeline"))
    theirs_with = cls(**pipeline.components, pag_applied_layers=list(layers))
    model = dataclasses.replace(model, options=dataclasses.replace(model.options, pag_layers=layers))
    rescale = 0.7 if scale > 1 else 0.0
    given = {"guidance_scale": scale, "guidance_rescale": rescale}
    negative = {"negative_prompt": ["blurry"] * 2}
    drawn, without = (ours((model, params), "blurry", **given, pag_scale=pag) for pag in (4.0, 0.0))
    assert_same(drawn, theirs(theirs_with, latents=latents(), **negative, **given, pag_scale=4.0))
    assert_same(without, theirs(pipeline, latents=latents(), **negative, **given))
    assert np.abs(drawn.astype(int) - without).max() > LEVELS


@pytest.mark.slow
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


@pytest.mark.slow
def test_films_of_sdxl(tmp_path):
    """Between two texts lie both of their embeddings and the pooled ones, and those of their negative prompts."""
    pipeline, loaded = built("sdxl", tmp_path)
    first, other = (
        pipeline.encode_prompt(prompt, negative_prompt=negative)
        for prompt, negative in ((PROMPTS, ["blurry"] * 2), (PROMPTS[::-1], ["a blue house"] * 2))
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    blended = {name: torch.lerp(a, b, 0.3) for name, a, b in zip(names, first, other, strict=True)}
    drawn = theirs(pipeline, prompt=None, latents=latents(), **blended)
    film = {"blend_prompts": PROMPTS[::-1], "blend_negative_prompts": "a blue house", "blend": 0.3}
    assert_same(ours(loaded, "blurry", **film), drawn)


@pytest.mark.parametrize("task", ["Inpaint", pytest.param("Img2Img", marks=pytest.mark.slow)])
def test_sdxl_from_images(task, image, mask, tmp_path, monkeypatch):
    """Inpainted with the ordinary network of 4 channels, and redrawn."""
    pipeline, loaded = built("sdxl", tmp_path)
    pipeline = getattr(diffusers, f"StableDiffusionXL{task}Pipeline")(**pipeline.components, add_watermarker=False)
    module = {"Inpaint": pipeline_stable_diffusion_xl_inpaint, "Img2Img": pipeline_stable_diffusion_xl_img2img}[task]
    pipelines.inject(monkeypatch, module, NOISE)
    masked = task == "Inpaint"
    given = {"mask_image": mask[..., None] / 255.0} if masked else {}
    drawn = theirs(pipeline, image=image / 255.0, strength=0.5, **given)
    assert_same(ours(loaded, image=image, mask=mask if masked else None, strength=0.5), drawn)


@pytest.mark.slow
def test_the_base_leaves_the_last_steps_to_the_refiner(tmp_path):
    """Its noisy latents go on in the other network, as with denoising_end and denoising_start."""
    base, (model, params) = built("sdxl", tmp_path)
    refiner, (model_2, params_2) = built("refiner", tmp_path)
    half = theirs(base, latents=latents(), denoising_end=0.5, output_type="latent")
    drawn = theirs(refiner, image=half, denoising_start=0.5)

    def denoise(model, params):
        prompts, negative = (jaxdiff.tokenize(model, texts) for texts in (PROMPTS, [None] * 2))
        cond, uncond = (jaxdiff.encode_text(model, params, tokens) for tokens in (prompts, negative))
        return jaxdiff.denoiser(model, params, cond, uncond, SCALE)

    @jax.jit
    def both(params, params_2, noise):
        times, scale = jaxdiff.time_grid(model.scheduler, STEPS, "ddim")
        method, key = jaxdiff.get_scheduler("ddim", model.scheduler), jax.random.key(0)
        x = jaxdiff.sample(denoise(model, params), scale * noise, times, method, key, stop=STEPS // 2)
        x0 = jaxdiff.sample(denoise(model_2, params_2), x, times, method, key, start=STEPS // 2)
        return x, jaxdiff.decode(model_2, params_2, x0)

    x, images = both(params, params_2, NOISE)
    np.testing.assert_allclose(x, oracle.nhwc(half), atol=1e-4 * np.abs(x).max())
    assert_same(np.asarray(np.round(255 * images)), drawn)


@pytest.mark.slow
@predictions("v_prediction")
def test_img2img(prediction, image, tmp_path, monkeypatch):
    pipeline, loaded = built("img2img", tmp_path, prediction)
    for strength in (0.5, 1.0):
        pipelines.inject(monkeypatch, pipeline_stable_diffusion_img2img, NOISE)
        assert_same(
            ours(loaded, image=image, strength=strength), theirs(pipeline, image=image / 255.0, strength=strength)
        )


@pytest.mark.slow
@predictions("epsilon")
def test_refiner(prediction, image, tmp_path, monkeypatch):
    pipeline, loaded = built("refiner", tmp_path, prediction)
    assert loaded[0].family == "sdxl_refiner"
    pipelines.inject(monkeypatch, pipeline_stable_diffusion_xl_img2img, NOISE)
    assert_same(ours(loaded, image=image, strength=0.5), theirs(pipeline, image=image / 255.0, strength=0.5))


@pytest.mark.slow
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


@pytest.mark.slow
@predictions("v_prediction")
def test_upscaling(prediction, image, tmp_path, monkeypatch):
    pipeline, loaded = built("upscaler", tmp_path, prediction)
    assert loaded[0].family == "upscaler"
    small, start = image[:, ::2, ::2][:, :8, :12], NOISE[:, :8, :12]  # diffusers cuts it at multiples of 4
    for level in (0, 33):
        noise = upscaler_noise(image_keys(7, 2), small.shape[1:])
        pipelines.inject(monkeypatch, pipeline_stable_diffusion_upscale, noise)
        drawn = theirs(pipeline, image=small / 255.0, noise_level=level, latents=oracle.nchw(start))
        assert_same(ours(loaded, image=small, noise_level=level, seed=7, noise=start), drawn)


@pytest.mark.slow
@predictions("epsilon")
def test_guidance_embedding(prediction, tmp_path):
    """A distilled network is told of the guidance scale, and there is no second half of the batch."""
    pipeline, loaded = built("distilled", tmp_path, prediction)
    assert_same(ours(loaded), theirs(pipeline, latents=latents()))
    assert np.abs(ours(loaded, guidance_scale=8.0).astype(int) - ours(loaded)).max() > LEVELS


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m"])
def test_blending_under_other_schedulers(scheduler, image, mask, tmp_path, monkeypatch):
    pipeline, loaded = built("blend", tmp_path)
    cls = {"euler": diffusers.EulerDiscreteScheduler, "dpmpp_2m": diffusers.DPMSolverMultistepScheduler}[scheduler]
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipelines.inject(monkeypatch, pipeline_stable_diffusion_inpaint, NOISE)
    drawn = theirs(pipeline, image=image / 255.0, mask_image=mask[..., None] / 255.0, strength=0.75)
    options = {"scheduler": scheduler, "spacing": "trailing", "strength": 0.75}
    assert_same(ours(loaded, image=image, mask=mask, **options), drawn)


@pytest.mark.slow
def test_lcm(tmp_path, monkeypatch):
    """The noise of each step is that of our keys; the last step draws none."""
    pipeline, loaded = built("lcm", tmp_path)
    keys = image_keys(7, 2)
    steps = [jax.vmap(lambda key: jax.random.normal(key, NOISE.shape[1:]))(step_keys(keys, i)) for i in range(STEPS)]
    pipelines.inject(monkeypatch, scheduling_lcm, *steps)
    assert_same(ours(loaded, seed=7), theirs(pipeline, latents=latents()))


@pytest.mark.slow
def test_lcm_from_images(image, tmp_path, monkeypatch):
    """All four steps are taken, over the part `strength` of the steps of the distillation."""
    pipeline, loaded = built("lcm", tmp_path)
    pipeline = diffusers.LatentConsistencyModelImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    keys = image_keys(7, 2)
    steps = [jax.vmap(lambda key: jax.random.normal(key, NOISE.shape[1:]))(step_keys(keys, i)) for i in range(STEPS)]
    for strength in (0.5, 0.3):
        pipelines.inject(monkeypatch, pipeline_latent_consistency_img2img, NOISE)
        pipelines.inject(monkeypatch, scheduling_lcm, *steps)
        drawn = theirs(pipeline, image=image / 255.0, strength=strength)
        assert_same(ours(loaded, image=image, strength=strength, seed=7), drawn)
    with pytest.raises(ValueError, match=r"steps 4 is more than the 2 that strength 0.05 leaves of the distillation"):
        ours(loaded, image=image, strength=0.05)
    with pytest.raises(ValueError, match=r"strength 1.5 must be in \(0, 1\]"):
        ours(loaded, image=image, strength=1.5)


@pytest.mark.slow
def test_nothing_compiles_for_other_values(image, compilations):
    """Scales, levels and intervals are traced."""
    unet = dataclasses.replace(tiny.UNET, in_channels=7, num_class_embeds=50)
    model = build(tiny.text_config(), unet, tiny.VAE, tiny.tokenizer(), tiny.SCHEDULER)
    loaded, small = (model, tiny.tiny_params(model)), image[:, ::2, ::2]
    first = {"image": small, "noise_level": 3, "guidance_rescale": 0.2, "guidance_interval": (0.1, 5)}
    other = {"image": small, "noise_level": [4, 40], "guidance_rescale": [0, 0.9], "guidance_interval": (0, 100)}
    drawn = ours(loaded, **first)
    compilations.clear()
    assert np.abs(drawn.astype(int) - ours(loaded, **other)).max() > LEVELS
    assert compilations == []
