"""A small transformer of SD 3's kind is trained from nothing, in the place of a UNet, and opens in PyTorch."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.config import ConfigError, FluxConfig
from jaxdiff.errors import ArgumentError
from jaxdiff.models.flux import FluxTransformer2DModel
from jaxdiff.training import init
from tests.support.processes import ROOT
from tests.support.tiny import FACTOR, LATENT, SIDE

CONFIG = ROOT / "tests" / "support" / "training_config.py"
FLAGS = ("--config.stage=unet", "--config.init_from.text_encoder={0}", "--config.init_from.text_encoder_2={0}",
         "--config.init_from.vae={0}")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a castle at night"}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ml_collections' own, and diffusers'
def test_it_trains_and_pytorch_draws_the_same(data, tiny_folder, tmp_path, train_cli):
    """Two updates on latents written beforehand; the fixed table of positions is PyTorch's, before and after."""
    code, _, err = train_cli(
        f"--config={CONFIG}:mmdit", *(flag.format(tiny_folder) for flag in FLAGS), f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={data}", "--config.steps=2", "--config.eval.images=0", "--config.cache_latents=1",
        "--config.learning_rate=0.02", "--config.ema_decay=0.0", "--config.log_every=1",
        "--config.trainable=('transformer','text_encoder','text_encoder_2')",
        "--config.lr_multipliers=(('text_encoder',0.3),('text_encoder_2',0.3))",
    )  # fmt: skip
    assert code == 0, err
    model, params = jaxdiff.load(tmp_path / "run" / "export")
    assert (model.family, model.options.max_sequence_length) == ("sd3", 0)
    for name in ("text_encoder", "text_encoder_2"):  # both learn, each for itself
        assert np.abs(params[name]["text_projection"]["kernel"] - np.eye(16)).max() > 0
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from tests.support import transformer_pipelines as oracle

    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "run" / "export", **absent)
    pipe.set_progress_bar_config(disable=True)
    fresh = diffusers.SD3Transformer2DModel(**pipe.transformer.config)
    table = params["transformer"]["pos_embed"]["pos_embed"]
    np.testing.assert_allclose(table, fresh.pos_embed.pos_embed, atol=1e-5)
    noise = np.random.default_rng(0).normal(size=(2, *LATENT)).astype(np.float32)
    texts = ["a castle", ""]
    expected = oracle.draw(pipe, texts, noise, 2, 2.0, max_sequence_length=0)
    found = jaxdiff.generate(model, params, texts, steps=2, guidance_scale=2.0, noise=noise)
    assert found.shape == (2, LATENT[0] * FACTOR, LATENT[1] * FACTOR, 3)
    assert np.abs(found - 255 * expected).max() <= 3


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_it_is_planned(train_cli):
    code, out, err = train_cli(f"--config={ROOT / 'configs' / 'icons' / 'mmdit.py'}:cpu", "--plan=quick")
    assert code == 0, err
    assert "all but activations" in out


@pytest.mark.slow
def test_a_fresh_transformer_says_nothing_and_keeps_its_input(tiny_folder):
    """Its blocks are gated by zeros, and its answer is zero: training begins at the mean of what it is to say."""
    model, params = fresh_model(tiny_folder)
    cond = jaxdiff.encode_text(model, params, jaxdiff.tokenize(model, ["a castle"]))
    x = np.random.default_rng(0).normal(size=(1, *LATENT)).astype(np.float32)
    out = model.transformer.apply({"params": params["transformer"]}, x, np.full(1, 500.0), cond.embeddings, cond.pooled)
    assert not np.asarray(out).any()
    assert cond.embeddings.shape == (1, 12, 32)


def test_what_its_text_encoders_do_not_read_is_refused(tiny_folder):
    model, params = fresh_model(tiny_folder)
    tokens = jaxdiff.tokenize(model, ["a castle"])
    most = model.text_encoder.config.num_hidden_layers - 1
    for wrong in (-1, most + 1):
        with pytest.raises(ValueError, match=rf"clip_skip {wrong} must be 0.* for models like sd3"):
            jaxdiff.encode_text(model, params, tokens, clip_skip=wrong)
    flux = dataclasses.replace(model, transformer=FluxTransformer2DModel(FluxConfig()))
    with pytest.raises(ValueError, match="clip_skip 1 must be 0 for models like flux"):
        jaxdiff.encode_text(flux, params, tokens, clip_skip=1)
    with pytest.raises(ArgumentError, match="chunks are for CLIP's text encoders"):
        jaxdiff.tokenize(model, ["a castle"], chunks=2)


def sizes(**changes):
    from tests.support.training_config import MMDIT

    return {"transformer": {**MMDIT, **changes}}


def fresh_model(folder, **changes):
    import jax

    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "vae"), str(folder))
    return init.starting_model(sizes(**changes), parts, lambda: None, jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"joint_attention_dim": 24}, "transformer.joint_attention_dim is 24, and the text encoders make 32"),
        ({"pooled_projection_dim": 16}, "transformer.pooled_projection_dim is 16, and the text encoders make 32"),
        ({"in_channels": 16}, "transformer.in_channels and out_channels are 16 and 4, the autoencoder has 4"),
    ],
)
def test_what_does_not_fit_is_said(changes, words, tiny_folder):
    with pytest.raises(ConfigError, match=words):
        fresh_model(tiny_folder, **changes)


def test_a_second_text_encoder_is_needed(tiny_folder):
    parts = {"text_encoder": str(tiny_folder), "vae": str(tiny_folder)}
    with pytest.raises(ConfigError, match=r"neither model.text_encoder_2 nor init_from.text_encoder_2"):
        init.described_model(sizes(), parts, lambda: None)


def test_the_length_in_place_of_t5_is_kept(tiny_folder):
    from jaxdiff.config import PipelineOptions
    from jaxdiff.io.diffusers_folder import model_index

    model, _ = fresh_model(tiny_folder)
    index = model_index(model)
    assert index["_max_sequence_length"] == 0
    assert PipelineOptions.from_dict(index).max_sequence_length == 0
    usual = dataclasses.replace(model, options=PipelineOptions())
    assert "_max_sequence_length" not in model_index(usual)
    for wrong in (-1, 513, "256", True):
        with pytest.raises(ConfigError, match=r"_max_sequence_length .* must be from 0 to 512"):
            PipelineOptions.from_dict({"_max_sequence_length": wrong})
