"""--offload text: the text encoders read all prompts, and are gone before the rest of the model is loaded."""

import gc

import jax
import numpy as np
import pytest

import jaxdiff
from jaxdiff.cli import loading, sample
from jaxdiff.io.images import read_image, read_metadata
from jaxdiff.io.lora import Factors, init_lora, save_lora
from jaxdiff.sampling.encode_prompts import encode_prompts
from jaxdiff.sampling.generate import draw
from jaxdiff.sampling.resolve import resolve_images, resolve_settings
from tests.support.tiny import LATENT, SIDE


@pytest.fixture
def lora(tiny, tmp_path):
    """A file that changes the UNet and the text encoder."""
    model, params = tiny
    fresh = init_lora(model, params, 2, targets=("unet", "text_encoder"), key=jax.random.key(0))
    ups = np.random.default_rng(0)
    changed = {
        name: Factors(f.down, ups.normal(size=f.up.shape).astype(np.float32), f.alpha) for name, f in fresh.items()
    }
    (tmp_path / "loras").mkdir()
    save_lora(tmp_path / "loras" / "style.safetensors", model, changed)
    return tmp_path / "loras" / "style.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt=a castle", "--prompt=a [cat:dog:0.5]", "--negative_prompt=x", "--batch_size=2"],
        ["--prompt=a castle", "--lora={lora}:0.5"],
        ["--prompt=a castle <lora:style:0.5>", "--prompt=a dog", "--lora_dir={loras}"],
        ["--prompt=a castle", "--interpolate=3"],
    ],
    ids=["edited", "lora", "named_loras", "animation"],
)
def test_the_same_images(flags, sample_cli, lora, tmp_path):
    flags = [flag.format(lora=lora, loras=lora.parent) for flag in flags]
    found = []
    for name, more in (("whole", []), ("parts", ["--offload=text"])):
        code, written, err = sample_cli(*flags, *more, "--steps=3", f"--output={name}")
        assert code == 0, err
        found.append([tmp_path / path for path in written if path.endswith(".png")])
    for whole, parts in zip(*found, strict=True):
        difference = read_image(whole).astype(int) - read_image(parts)
        assert np.abs(difference).max() <= 1  # another program may round otherwise
        assert read_metadata(whole) == read_metadata(parts)


def test_no_text_encoder_is_held_while_images_are_drawn(sample_cli, monkeypatch, tiny):
    """Of the parameters in memory, none has the shape of the table of tokens."""
    table = tiny[1]["text_encoder"]["embeddings_token_embedding"]["embedding"].shape
    held = []

    def spy(model, params, request, **how):
        gc.collect()
        held.append([x.shape for x in jax.live_arrays() if x.shape == table])
        assert set(params) == {"unet", "vae"}
        return draw(model, params, request, **how)

    before = sum(x.shape == table for x in jax.live_arrays())
    monkeypatch.setattr(sample, "draw", spy)
    code, _, err = sample_cli("--prompt=a castle", "--steps=2", "--offload=text")
    assert code == 0, err
    assert len(held[0]) == before
    assert loading.load.__module__ == "jaxdiff.cli.loading"


def test_parts_of_a_model_are_read_alone(tiny_folder):
    _, params = jaxdiff.load(tiny_folder, parts=["text_encoder"])
    assert set(params) == {"text_encoder"}
    _, rest = jaxdiff.load(tiny_folder, parts=["unet", "vae"])
    assert set(rest) == {"unet", "vae"}


@pytest.mark.slow
def test_encoded_requests_draw_the_same(tiny):
    model, params = tiny
    settings = resolve_settings(model, steps=3)
    noise = np.random.default_rng(0).normal(size=(2, *LATENT)).astype(np.float32)
    request = resolve_images(model, settings, ["a castle", "a dog"], "x", noise=noise)
    encoded = encode_prompts(model, {"text_encoder": params["text_encoder"]}, request)
    assert encoded.images.tokens is None
    rest = {name: params[name] for name in ("unet", "vae")}
    images, whole = draw(model, rest, encoded)[0], draw(model, params, request)[0]
    assert images.shape == (2, SIDE, SIDE, 3)
    assert np.abs(images.astype(int) - whole).max() <= 1
