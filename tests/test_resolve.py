"""From arguments to what is drawn, and the same images inside any application."""

import contextlib

import jax
import numpy as np
import pytest

import jaxdiff
from jaxdiff.diffusion.base import Scheduler, State, initial, time_at
from jaxdiff.errors import ArgumentError, say_once
from jaxdiff.io.configs import replace_config
from jaxdiff.sampling.resolve import resolve_images, resolve_settings
from tests.support.tiny import LATENT, SIDE, tiny_model

IMAGE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
MASK = np.arange(SIDE)[None].repeat(SIDE, 0) >= SIDE // 2


def test_what_is_left_open_is_decided():
    settings = resolve_settings(tiny_model(), steps=10)
    assert (settings.scheduler, settings.guidance_scale, settings.strength) == ("ddim", 7.5, None)
    assert (settings.height, settings.width, settings.latents) == (SIDE, SIDE, LATENT)
    assert settings.call.start is None
    assert settings.call.times.t.shape == (11,)
    redrawn = resolve_settings(tiny_model(), steps=10, image=IMAGE, hires=2, frames=3)
    assert (redrawn.strength, redrawn.lowres_latents) == (0.6, (4, 4, 4))
    assert (redrawn.call.start, redrawn.call.lowres_start) == (4, 4)
    np.testing.assert_array_equal(redrawn.call.preview_steps, [4, 6, 9])
    assert resolve_settings(tiny_model(), image=IMAGE, mask=MASK).strength == 1.0


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("steps", {"steps": 0}),
        ("steps", {"steps": 1000}),
        ("spacing", {"spacing": "even"}),
        ("scheduler", {"scheduler": "eulr"}),
        ("scheduler", {"scheduler": 3}),
        ("height", {"height": 3}),
        ("strength", {"image": IMAGE, "strength": 2}),
        ("hires_strength", {"hires": 2, "hires_strength": 0}),
        ("hires_upscale", {"hires_upscale": "x"}),
        ("mask", {"mask": MASK}),
        ("guidance_interval", {"guidance_interval": (2, 1)}),
        ("frames", {"frames": 99}),
    ],
)
def test_errors_of_a_call_carry_the_arguments_name(argument, options):
    with pytest.raises(ArgumentError) as caught:
        resolve_settings(tiny_model(), **options)
    assert caught.value.argument == argument
    assert str(caught.value).startswith(f"{argument} ")


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("prompts", {"prompts": []}),
        ("prompts_2", {"prompts_2": "a"}),
        ("negative_prompts", {"negative_prompts": ["a", "b"]}),
        ("blend_prompts", {"blend_prompts": ["a", "b"]}),
        ("seed", {"seed": 0.5}),
        ("variation_seed", {"variation_seed": [1, 2]}),
        ("guidance_scale", {"guidance_scale": np.nan}),
        ("noise", {"noise": np.zeros((1, 2, 2, 4))}),
        ("image", {"image": IMAGE[:2]}),
        ("control_images", {"control_images": [IMAGE]}),
        ("noise_level", {"noise_level": 3}),
    ],
)
def test_errors_of_images_carry_the_arguments_name(argument, options):
    model = tiny_model()
    with pytest.raises(ArgumentError) as caught:
        resolve_images(model, resolve_settings(model), **{"prompts": "a castle"} | options)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("scale", "distilled", "words"),
    [
        (7.5, True, "they are for guidance, which this model does without"),
        (1.0, False, "they are for guidance, and guidance_scale turns it off"),
        (7.5, False, None),
    ],
)
def test_negative_prompts_without_guidance_are_said_to_be_unused(scale, distilled, words, caplog):
    say_once.cache_clear()
    model = replace_config(tiny_model(), "unet", time_cond_proj_dim=8) if distilled else tiny_model()
    settings = resolve_settings(model, guidance_scale=scale)
    plain = resolve_images(model, settings, "a castle")
    assert not caplog.text
    given = resolve_images(model, settings, "a castle", "blurry")
    assert (words is None and not caplog.text) or words in caplog.text
    assert (given.images.negative is None) == (words is not None)
    assert (plain.images.negative is None) == (words is not None)


def test_models_that_draw_from_images_ask_for_them():
    inpainting = replace_config(tiny_model(), "unet", in_channels=9)
    with pytest.raises(ArgumentError, match="this model is for inpainting: give image and mask"):
        resolve_settings(inpainting, image=IMAGE)


def own_euler() -> Scheduler:
    """As docs/schedulers.md has it."""

    def step(denoise, state, times, i, keys):
        time, then = time_at(times, i), time_at(times, i + 1)
        x0 = denoise(state.x, time)
        eps = (state.x - time.alpha * x0) / time.sigma
        return State(then.alpha * x0 + then.sigma * eps, x0)

    return Scheduler(initial, step)


@pytest.mark.slow
def test_a_scheduler_of_ones_own(tiny):
    own = jaxdiff.generate(*tiny, "a castle", steps=2, scheduler=own_euler())
    ours = jaxdiff.generate(*tiny, "a castle", steps=2, scheduler="euler")
    assert np.abs(own.astype(int) - ours).max() <= 1


# Settings of an application that this package is part of.

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
}


@pytest.fixture(scope="module")
def drawn(tiny_folder):
    """Draws under a setting: noise of seeds, of a variation, of a smaller image and of every step."""

    def draw(setting):
        with setting():
            return jaxdiff.generate(
                *jaxdiff.load(tiny_folder), ["a castle", "a red dragon"], ["blurry", None], seed=7, variation_seed=1,
                steps=2, scheduler="euler_ancestral", guidance_scale=3.0, guidance_rescale=0.5, image=IMAGE, mask=MASK,
                hires=2, guidance_interval=(0.01, 100.0), blend_prompts="a blue house",
            )  # fmt: skip

    return draw


@pytest.fixture(scope="module")
def alone(drawn):
    return drawn(contextlib.nullcontext)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_seed_draws_the_same_image_inside_another_application(setting, drawn, alone):
    assert np.abs(drawn(SETTINGS[setting]).astype(int) - alone).max() <= 1
