"""Images of the transformer families against PyTorch diffusers' pipelines, on the same random weights."""

import numpy as np
import pytest

pytest.importorskip("diffusers")
import jaxdiff
from jaxdiff.errors import ArgumentError
from tests.support import transformer_pipelines as oracle

PROMPTS = ["a castle at night", ""]
CASES = [((8, 12), 4, 3.5), ((16, 8), 1, 1.0), ((8, 8), 7, 0.0)]  # latents, steps, guidance


@pytest.fixture(scope="module", params=oracle.FAMILIES)
def pair(request, tmp_path_factory):
    """(family, PyTorch's pipeline, our model, its parameters)."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = oracle.pipeline(request.param, folder / "tokenizers")
    pipe.save_pretrained(folder / "model")
    return request.param, pipe, *jaxdiff.load(folder / "model")


def noise_of(size):
    return np.random.default_rng(0).normal(size=(2, *size, oracle.CHANNELS)).astype(np.float32)


@pytest.mark.parametrize(("size", "steps", "guidance"), CASES)
def test_draws_what_pytorch_draws(pair, size, steps, guidance):
    _, pipe, model, params = pair
    expected = oracle.draw(pipe, PROMPTS, noise_of(size), steps, guidance)
    found = jaxdiff.generate(model, params, PROMPTS, steps=steps, guidance_scale=guidance, noise=noise_of(size))
    assert expected.std() > 0.05
    assert np.abs(found - 255 * expected).max() <= 3


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_redraws_what_pytorch_redraws(pair, task, monkeypatch):
    import diffusers

    family, pipe, model, params = pair
    names = {"flux": "Flux", "sd3": "StableDiffusion3", "z_image": "ZImage"}
    if family not in names:
        pytest.skip("the same task of the same code; PyTorch's FLUX.2 reads the image otherwise")
    cls = getattr(diffusers, f"{names[family]}{'Img2Img' if task == 'img2img' else 'Inpaint'}Pipeline")
    same = cls(**{name: part for name, part in pipe.components.items() if name in cls.__init__.__annotations__})
    same.set_progress_bar_config(disable=True)
    noise, images = noise_of((8, 12)), np.random.default_rng(2).random((2, 16, 24, 3)).astype(np.float32)
    expected = oracle.redraw(same, PROMPTS, images, noise, monkeypatch, task == "inpaint")
    given = {"image": images, "steps": 5, "strength": 0.5, "guidance_scale": 2.0, "noise": noise}
    if task == "inpaint":
        given["mask"] = oracle.MASK
    assert np.abs(jaxdiff.generate(model, params, PROMPTS, **given) - 255 * expected).max() <= 3


def test_a_saved_folder_opens_in_pytorch_and_draws_the_same(pair, tmp_path):
    family, pipe, model, params = pair
    jaxdiff.save(tmp_path / "saved", model, params)
    # diffusers opens a folder without T5 only when told.
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3_without_t5" else {}
    again = type(pipe).from_pretrained(tmp_path / "saved", **absent)
    again.set_progress_bar_config(disable=True)
    drawn = [oracle.draw(p, PROMPTS, noise_of((8, 8)), 2, 2.0) for p in (pipe, again)]
    np.testing.assert_array_equal(*drawn)
    assert jaxdiff.load(tmp_path / "saved")[0] == model


def test_a_size_that_makes_no_patches_is_refused(pair):
    _, _, model, params = pair
    with pytest.raises(ArgumentError, match="multiple of 4"):
        jaxdiff.generate(model, params, "a castle", height=18, width=16, steps=1)


def test_latents_of_an_image_decode_to_it(pair):
    """What `encode` makes is what `decode` undoes: the autoencoder's own reconstruction."""
    _, pipe, model, params = pair
    import torch

    images = np.random.default_rng(1).random((1, 16, 24, 3)).astype(np.float32)
    latents = jaxdiff.encode(model, params, images)
    assert latents.shape == (1, 8, 12, oracle.CHANNELS)
    with torch.no_grad():
        z = pipe.vae.encode(torch.tensor(2 * images - 1).permute(0, 3, 1, 2)).latent_dist.mean
        expected = pipe.vae.decode(z).sample.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(jaxdiff.decode(model, params, latents), np.clip(expected / 2 + 0.5, 0, 1), atol=1e-4)
