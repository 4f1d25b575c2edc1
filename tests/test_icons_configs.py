"""The configs of the bundled model describe networks that fit each other, at both scales."""

import importlib

import pytest

from configs.icons import sizes
from jaxdiff.diffusion.schedules import is_flow
from jaxdiff.text.tokenizer import train_bpe
from jaxdiff.training.checks import check_settings
from jaxdiff.training.init import described_model
from jaxdiff.training.options import Options


@pytest.mark.parametrize("stage", ["vae", "clip", "unet", "few_steps"])
@pytest.mark.parametrize("scale", sizes.SCALES)
def test_each_stage_describes_a_model_and_options_that_can_be(stage, scale):
    config = importlib.import_module(f"configs.icons.{stage}").get_config(scale)
    nothing = dict.fromkeys(config.init_from, "")
    model = described_model(config.model.to_dict(), nothing, lambda: train_bpe(["a castle"], 600, 24))
    assert model.unet.config.in_channels == model.vae.config.latent_channels
    assert model.unet.config.side * model.vae.config.factor == config.data.image_size
    assert model.vision_encoder.config.projection_dim == model.text_encoder.config.hidden_size
    Options.from_config(config).check(1)
    check_settings(config)


@pytest.mark.parametrize("scale", sizes.SCALES)
def test_the_gan_is_made_of_the_bundled_model(scale):
    config = importlib.import_module("configs.icons.gan").get_config(scale)
    check_settings(config)
    Options.from_config(config).check(1)
    assert (config.stage, config.init_from.model, config.adversary.loss) == ("gan", "icons", "relativistic")
    assert config.adversary.r1 == config.adversary.r2 > 0
    assert config.b1 == 0
    side = config.data.image_size // 2 ** (len(sizes.vae()["vae"]["block_out_channels"]) - 1)
    assert side % 2 ** max(config.adversary.layers, config.generator.layers) == 0


@pytest.mark.parametrize("scale", sizes.SCALES)
def test_the_transformer_takes_the_place_of_the_unet(scale):
    config = importlib.import_module("configs.icons.mmdit").get_config(scale)
    nothing = dict.fromkeys(config.init_from, "")
    model = described_model(config.model.to_dict(), nothing, lambda: train_bpe(["a castle"], 600, 24))
    assert model.family == "sd3"
    assert model.transformer.config.sample_size * model.vae.config.factor == config.data.image_size
    assert model.options.max_sequence_length == 0
    assert is_flow(model.scheduler)
    Options.from_config(config).check(1)
    check_settings(config)
    of_unet = importlib.import_module("configs.icons.unet").get_config(scale)
    for name in ("data", "steps", "batch_size", "cache_latents", "eval"):  # the same images, as often
        assert config[name] == of_unet[name]


@pytest.mark.parametrize("scale", sizes.SCALES)
def test_the_decoder_goes_on_from_the_bundled_model(scale):
    config = importlib.import_module("configs.icons.vae_decoder").get_config(scale)
    check_settings(config)
    Options.from_config(config).check(1)
    assert config.init_from.model == "icons"
    assert 0 < config.adversary.start < config.steps


def test_drawings_that_the_model_is_judged_by_are_not_learned_from():
    assert not {"twemoji", "emojione"} & set(sizes.SOURCES)


def test_another_scale_is_refused():
    with pytest.raises(ValueError, match="'tpu' after the colon must be one of gpu, cpu"):
        importlib.import_module("configs.icons.unet").get_config("tpu")
