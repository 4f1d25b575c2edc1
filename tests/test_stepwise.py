"""Drawing in pieces: the images of `generate`, with control at the caller in between."""

import itertools

import numpy as np
import pytest

import jaxdiff
from jaxdiff.sampling.generate import draw
from jaxdiff.sampling.resolve import resolve_images, resolve_settings
from jaxdiff.sampling.stepwise import Pace, draw_stepwise
from tests.support.comparison import levels
from tests.support.tiny import SIDE, tiny_controlnet

STEPS = 5
PROMPTS = ["a castle", "a red dragon"]


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def request_of(model, shared, each, prompts=PROMPTS):
    settings = resolve_settings(model, steps=STEPS, **shared)
    return resolve_images(model, settings, prompts, "blurry", seed=3, **each)


def check_equal(model, params, request):
    """All moments of an image, after comparing the last one."""
    moments = list(draw_stepwise(model, params, request, seconds=0, stops=(2,)))
    assert moments[-1].step == moments[-1].steps
    assert moments[-1].finite.all()
    assert levels(moments[-1].images(), draw(model, params, request)[0]) <= 1
    return moments


@pytest.mark.slow
def test_text_to_image(tiny):
    """A method of several steps goes on with what it remembers, and each moment shows the prediction of its step."""
    moments = check_equal(*tiny, request_of(tiny[0], {"scheduler": "dpmpp_2m"}, {}))
    assert [m.step for m in moments] == [1, 2, 3, 4, 5]
    previews = [m.images() for m in moments]
    assert all(p.shape == (2, SIDE, SIDE, 3) and p.dtype == np.uint8 for p in previews)
    distances = [levels(p, previews[-1]) for p in previews]
    assert distances[0] > distances[3] > 0
    settings = resolve_settings(tiny[0], steps=STEPS, scheduler="dpmpp_2m", frames=STEPS)
    frames = draw(*tiny, resolve_images(tiny[0], settings, PROMPTS, "blurry", seed=3)).frames
    for i in range(STEPS - 1):
        assert levels(previews[i], frames[:, i]) <= 1


def test_nothing_is_compiled_for_other_prompts_and_numbers_of_steps(tiny, compilations):
    def moments(steps, prompts):
        settings = resolve_settings(tiny[0], steps=steps, scheduler="ddim")
        return list(draw_stepwise(*tiny, resolve_images(tiny[0], settings, prompts, seed=steps), seconds=9))

    moments(4, PROMPTS)
    before = len(compilations)
    assert moments(9, ["a blue house", "a castle"])[-1].steps == 9
    assert len(compilations) == before


@pytest.mark.slow
def test_noise_of_the_steps_in_an_image_redrawn(tiny, image):
    shared = {"scheduler": "euler_ancestral", "image": image, "strength": 0.6}
    moments = check_equal(*tiny, request_of(tiny[0], shared, {"image": image}))
    assert [m.steps for m in moments] == [3, 3, 3]


@pytest.mark.slow
def test_inpainting_with_prompts_edited_by_step(tiny, image):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[:, : SIDE // 2] = True
    request = request_of(
        tiny[0], {"image": image, "mask": mask}, {"image": image, "mask": mask}, ["a [castle:dragon:0.5]", "a house"]
    )
    check_equal(*tiny, request)


@pytest.mark.slow
def test_controlnet(tiny, image):
    model, params = jaxdiff.with_controlnets(*tiny, tiny_controlnet(tiny[0]))
    check_equal(model, params, request_of(model, {}, {"control_images": [image], "controlnet_scale": 0.7}))


@pytest.mark.slow
def test_an_image_drawn_small_first_comes_in_one_piece(tiny):
    (moment,) = check_equal(*tiny, request_of(tiny[0], {"hires": 2.0}, {}))
    assert moment.images().shape == (2, SIDE, SIDE, 3)


def test_closing_ends_the_drawing(tiny):
    moments = draw_stepwise(*tiny, request_of(tiny[0], {"scheduler": "dpmpp_2m"}, {}), seconds=0)
    assert [m.step for m in itertools.islice(moments, 2)] == [1, 2]
    moments.close()
    assert list(moments) == []


def test_the_pace_of_earlier_images_is_followed(tiny):
    """Known to be quick, all steps are one piece; known to be slow, they are taken one by one."""
    request = request_of(tiny[0], {"scheduler": "dpmpp_2m"}, {})
    pace = Pace()
    assert [m.step for m in draw_stepwise(*tiny, request, seconds=100, pace=pace)] == [1, 3, 5]
    assert 0 < pace.seconds < 100 / STEPS
    (whole,) = draw_stepwise(*tiny, request, seconds=100, pace=pace)
    assert levels(whole.images(), draw(*tiny, request)[0]) <= 1
    assert 0 < pace.seconds < 100 / STEPS
    assert [m.step for m in draw_stepwise(*tiny, request, seconds=1, pace=Pace(1e6), stops=(2,))][:2] == [1, 2]
    assert [m.step for m in draw_stepwise(*tiny, request, seconds=100, pace=pace, stops=(2,))] == [2, 5]


def test_pieces_have_about_the_length_asked_for(tiny):
    moments = draw_stepwise(*tiny, request_of(tiny[0], {"scheduler": "dpmpp_2m"}, {}), seconds=100)
    assert [m.step for m in moments] == [1, 3, 5]
