"""Diffusers folders in and out: round trips, PyTorch's side of them, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.io.configs import replace_config
from jaxdiff.io.pretrained import load, save
from jaxdiff.io.single_file import load_single_file
from tests.support.comparison import assert_equal
from tests.support.tiny import LATENT, MAX_LENGTH, tiny_params
from tests.support.written import files


def test_load_returns_what_was_saved(tiny, tiny_folder):
    model, params = load(tiny_folder)
    assert model == tiny[0]
    assert hash(model) == hash(tiny[0])
    assert_equal(params, tiny[1])


def test_saving_again_gives_the_same_bytes(tiny_folder, tmp_path):
    save(tmp_path / "again", *load(tiny_folder))
    assert files(tmp_path / "again") == files(tiny_folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tiny, tiny_folder, tmp_path):
    """Loaded in half precision, or saved in it, parameters are those of the file, rounded once."""
    expected = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), tiny[1])
    model, params = load(tiny_folder, dtype=dtype)
    assert model.unet.dtype == jnp.dtype(dtype)
    assert_equal(params, expected)
    save(tmp_path / "half", *tiny, dtype=dtype)
    reopened = load(tmp_path / "half")[1]
    assert {x.dtype for x in jax.tree.leaves(reopened)} == {jnp.dtype("float32")}
    assert_equal(reopened, jax.tree.map(lambda x: x.astype(np.float32), expected))


def test_unknown_dtype_lists_the_known(tiny_folder):
    with pytest.raises(ConfigError, match=r"'int8' is unknown; known are float32, bfloat16, float16"):
        load(tiny_folder, dtype="int8")


def test_unknown_model_names_what_there_is():
    with pytest.raises(ConfigError, match=r"no-such-model is neither a folder nor a bundled model \(bundled: "):
        load("no-such-model")


@pytest.mark.parametrize(
    ("channels", "sentence"),
    [
        (
            8,
            r"has a UNet that takes 8 channels, as InstructPix2Pix does; supported are 4 for text to image, 9 for inp",
        ),
        (5, r"has a UNet that takes 5 channels, as depth-to-image models do; "),
        (6, r"has a UNet that takes 6 channels; supported are .*, 7 for upscaling: choose such a model"),
    ],
)
def test_what_cannot_be_drawn_is_refused(channels, sentence, tiny, tmp_path):
    """Once opened, it would end in an error of the network's first layer."""
    model = replace_config(tiny[0], "unet", in_channels=channels)
    for name in ("folder", "x.safetensors"):
        save(tmp_path / name, model, tiny_params(model))
        with pytest.raises(ConfigError, match=rf"{name} {sentence}"):
            load(tmp_path / name)


def test_save_refuses_a_folder_of_something_else(tiny, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"dear")
    with pytest.raises(WeightsError, match="photos exists and is not the folder of a model"):
        save(tmp_path / "photos", *tiny)
    with pytest.raises(WeightsError, match=r"cat\.png exists and is not the folder of a model"):
        save(tmp_path / "photos" / "cat.png", *tiny)
    assert files(tmp_path) == {"photos/cat.png": b"dear"}


def test_save_below_a_file_is_one_sentence(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot be written"):
        save(tmp_path / "file" / "model", *tiny)


# PyTorch's side. Both draw float32 images through some hundred operations of relative error 2**-24; the scheduler's
# division by small alphas enlarges that by up to 1/alpha = 15, still far below a grey level, so that only pixels within
# rounding of a level's border may differ, by one. 2 of 255 levels are what users of a checkpoint are promised.
LEVELS = 2
PROMPTS = ["a red dragon", "a castle"]


def drawn_by_diffusers(folder, noise):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    return pipeline(
        PROMPTS,
        negative_prompt=["blurry"] * 2,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=latents,
        output_type="np",
    ).images


def drawn_by_us(folder, noise):
    from jaxdiff import generate

    return generate(*load(folder), PROMPTS, "blurry", steps=4, guidance_scale=3.0, noise=noise) / 255.0


def assert_same_images(ours, theirs):
    assert theirs.std() > 0.1  # images, not a constant or a clipped plane
    assert np.abs(ours - theirs).max() <= LEVELS / 255


def test_diffusers_opens_our_folder_and_draws_the_same(tiny_folder):
    noise = np.random.default_rng(0).standard_normal((2, *LATENT)).astype(np.float32)
    assert_same_images(drawn_by_us(tiny_folder, noise), drawn_by_diffusers(tiny_folder, noise))


@pytest.mark.slow
def test_we_open_a_folder_of_diffusers_and_draw_the_same(tiny, tmp_path):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tests.support import networks, oracle

    tokenizer = tiny[0].tokenizer
    tokenizer.save(tmp_path / "tokenizer")
    ids = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    text = networks.SMALL_TEXT | ids | {"max_position_embeddings": MAX_LENGTH}
    pipeline = diffusers.StableDiffusionPipeline(
        vae=oracle.vae("sd1"),
        text_encoder=oracle.drawn(CLIPTextModel(CLIPTextConfig(**text))),
        tokenizer=CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", model_max_length=MAX_LENGTH),
        unet=oracle.unet("sd2"),
        scheduler=diffusers.DDIMScheduler(**ddim_config(tiny[0].scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path / "theirs")
    noise = np.random.default_rng(0).standard_normal((2, *LATENT)).astype(np.float32)
    assert_same_images(drawn_by_us(tmp_path / "theirs", noise), drawn_by_diffusers(tmp_path / "theirs", noise))


def ddim_config(config):
    names = ("beta_start", "beta_end", "beta_schedule", "clip_sample", "set_alpha_to_one", "steps_offset")
    return {name: value for name, value in dataclasses.asdict(config).items() if name in names}


def test_the_prediction_type_may_be_said(tiny_folder):
    assert load(tiny_folder)[0].scheduler.prediction_type == "epsilon"
    assert load(tiny_folder, prediction_type="v_prediction")[0].scheduler.prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match=r"prediction_type 'v' is unknown; known are epsilon, "):
        load_single_file("missing.safetensors", prediction_type="v")
    with pytest.raises(ConfigError, match=r"prediction_type 'v' is unknown; known are epsilon, "):
        load(tiny_folder, prediction_type="v")
