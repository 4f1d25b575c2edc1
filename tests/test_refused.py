"""What would be ignored, or spoil an image unseen, is refused in one sentence that names the flag or argument."""

import dataclasses

import numpy as np
import pytest

import jaxdiff
from jaxdiff.cli import adapters, sample
from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.flags import check_model, parse, parse_lora
from jaxdiff.cli.options import define
from jaxdiff.config import ConfigError
from jaxdiff.diffusion.spacing import distilled_timesteps
from jaxdiff.errors import WeightsError
from jaxdiff.io.configs import replace_config
from jaxdiff.io.lora import Factors, merge_lora
from jaxdiff.io.model_paths import find
from jaxdiff.sampling import checks, resolve
from tests.support.tiny import LATENT, SCHEDULER, SIDE, tiny_controlnet, tiny_model

CASTLE = "--prompt=a castle"
BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(scope="module")
def upscaler():
    return replace_config(tiny_model(), "unet", num_class_embeds=41)


# Numbers that are not finite.


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e999"])
def test_a_lora_has_a_finite_weight(weight):
    with pytest.raises(UsageError, match=f"--lora x.safetensors:{weight}: the weight {weight} must be finite, such as"):
        parse(["sample.py", CASTLE, "--lora=ok.safetensors:0.8", f"--lora=x.safetensors:{weight}"])


def test_a_weight_and_a_path_are_told_apart():
    for given in ("x.safetensors:0.8", "c:/x:-2", "x.safetensors", "a:b", ":nan"):
        expected = {"x.safetensors:0.8": ("x.safetensors", 0.8), "c:/x:-2": ("c:/x", -2.0)}.get(given, (given, 1.0))
        assert parse_lora(given) == expected
    assert adapters.parse_lora is parse_lora


def test_every_flag_of_a_number_is_finite():
    """Found by going through all of them, so that a new one is among them."""
    flags = define()
    names = [name for name in flags if flags[name].flag_type() in ("float", "multi float")]
    assert {"guidance_scale", "strength", "controlnet_scale", "blend", "hires"} <= set(names)
    beside = ["--image=a.png", "--hires=2", "--variation_seed=1", "--blend_prompt=b", "--control_image=c.png"]
    for name in names:
        for bad in ("nan", "inf", "-inf"):
            with pytest.raises(UsageError, match=f"--{name}"):
                parse(["sample.py", CASTLE, *beside, f"--{name}={bad}"])


@pytest.mark.parametrize("bad", BAD)
def test_the_scale_of_a_lora_is_finite(bad):
    params = {"unet": {"conv_in": {"kernel": np.ones((3, 3, 4, 4), np.float32)}}}
    lora = {"unet.conv_in": Factors(np.ones((3, 3, 4, 1), np.float32), np.ones((1, 4), np.float32), 1.0)}
    for scales in (bad, [bad], np.asarray(bad), np.asarray([bad])):
        with pytest.raises(WeightsError, match="of a LoRA must be finite"):
            merge_lora(params, lora, scales)


@pytest.mark.parametrize("bad", BAD)
def test_load_lora_takes_no_such_scale(bad, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxdiff.io.lora.read_lora", lambda model, path: {})
    with pytest.raises(WeightsError, match=r"scale .* of a LoRA must be finite"):
        jaxdiff.load_lora(tiny_model(), {}, tmp_path / "x.safetensors", scale=bad)


@pytest.mark.parametrize("bad", BAD)
def test_other_arguments_are_finite(bad, upscaler):
    image, model = np.zeros((SIDE, SIDE, 3), np.uint8), tiny_model()
    held = dataclasses.replace(model, controlnets=(tiny_controlnet(model)[0],))
    for scale in (bad, [bad]):
        with pytest.raises(ValueError, match=r"controlnet_scale .* must be finite"):
            checks.as_controls(held, [image], scale, 1, (SIDE, SIDE))
    with pytest.raises(ValueError, match=r"noise_level .* must be finite"):
        checks.as_noise_level(upscaler, bad, 1)
    with pytest.raises(ValueError, match=r"blend .* must be finite"):
        checks.as_numbers("blend", bad, 1, 0.0, 1.0)
    with pytest.raises(ValueError, match="noise must be finite"):
        checks.as_noise(np.full((1, *LATENT), bad), 1, LATENT)
    with pytest.raises(ValueError, match=r"strength .* must be in"):
        resolve.first_step(10, bad)
    with pytest.raises(ValueError, match=r"strength .* must be in"):
        distilled_timesteps(SCHEDULER, 4, bad)
    with pytest.raises(ValueError, match=r"hires .* must be above 1"):
        resolve.lowres_shape(LATENT, bad)


# What another model would read.


def test_flags_of_other_models(upscaler):
    plain = tiny_model()
    lcm = replace_config(plain, "unet", time_cond_proj_dim=8)

    def check(model, *flags):
        check_model(parse(["sample.py", CASTLE, *flags]), model)

    check(plain, "--image=a.png", "--strength=0.5", "--negative_prompt=b", "--guidance_rescale=0.5")
    check(upscaler, "--image=a.png", "--noise_level=5", "--negative_prompt=b")
    check(lcm, "--image=a.png", "--strength=0.5", "--guidance_scale=2")
    for model, *flags in (
        (plain, "--noise_level=20"),
        (upscaler, "--strength=0.6", "--image=a.png"),
        (lcm, "--negative_prompt=b"),
        (lcm, "--guidance_rescale=0.1"),
        (lcm, "--guidance_interval=1,2"),
    ):
        with pytest.raises(UsageError, match=rf"^{flags[0].split('=')[0]} is for .*: leave it out\.$"):
            check(model, *flags)


def test_sample_asks(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["sample.py", f"--model={tiny_folder}", CASTLE, "--noise_level=20"]) == 2
    assert capsys.readouterr().err.startswith("sample.py: error: --noise_level is for upscaling models")


def test_arguments_of_other_models(upscaler):
    plain = tiny_model()
    with pytest.raises(ValueError, match="noise_level is for upscaling models"):
        checks.as_noise_level(plain, 20, 1)
    assert checks.as_noise_level(plain, None, 1) is None
    np.testing.assert_array_equal(checks.as_noise_level(upscaler, None, 2), [20, 20])
    with pytest.raises(ValueError, match=r"noise_level 2.5 must be a whole number"):
        checks.as_noise_level(upscaler, 2.5, 1)
    with pytest.raises(ValueError, match=r"strength 0.5 is for images that are redrawn"):
        resolve.resolve_strength(upscaler, "a.png", None, 0.5)
    assert resolve.resolve_strength(upscaler, "a.png", None, None) is None


def test_wildcards_alone_expand_braces_and_say_so():
    flags = define()
    assert "{red|green} is expanded" in flags["wildcards"].help


# Files that are not there.


@pytest.mark.parametrize("name", ["x.safetensors", "models/x.ckpt", "own/x.safetensors"])
def test_a_model_file_that_does_not_exist(name):
    with pytest.raises(ConfigError, match=rf"^The model's file {name} does not exist: check the path"):
        find(name)


def test_other_files_that_do_not_exist(tmp_path):
    with pytest.raises(WeightsError, match=r"x\.safetensors does not exist: check the path"):
        jaxdiff.load_lora(tiny_model(), {}, tmp_path / "x.safetensors")
