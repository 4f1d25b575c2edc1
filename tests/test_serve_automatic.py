"""AUTOMATIC1111's API, asked by a client that programs use for it."""

import base64
import functools
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.io.edges import canny
from tests.support.comparison import levels
from tests.support.tiny import SIDE, tiny_controlnet, tiny_upscaler

webuiapi = pytest.importorskip("webuiapi", reason="needs the packages of the extra test")
httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from jaxdiff.diffusion.schedulers import SCHEDULERS as OURS  # noqa: E402
from jaxdiff.diffusion.spacing import SPACINGS  # noqa: E402
from jaxdiff.errors import ArgumentError  # noqa: E402
from jaxdiff.serving import engine as engine_file  # noqa: E402
from jaxdiff.serving.automatic_fields import TextToImage, draw_request  # noqa: E402
from jaxdiff.serving.service import Service  # noqa: E402
from jaxdiff.text.infotext import SAMPLERS, SCHEDULERS, sampler_of  # noqa: E402
from tests.support.server import NAME, STEPS, UPSCALER, serving  # noqa: E402

SIDES = {"width": SIDE, "height": SIDE}
CASTLE = {"prompt": "a castle", "seed": 7, "steps": STEPS, "cfg_scale": 5.0, "sampler_name": "DDIM", **SIDES}


@pytest.fixture(scope="module")
def server(tiny):
    with serving(tiny) as found:
        yield found


@pytest.fixture(scope="module")
def api(server):
    return webuiapi.WebUIApi(baseurl=f"{server[0]}/sdapi/v1")


@pytest.fixture(scope="module")
def source():
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def generated(tiny, **more):
    given = {"seed": 7, "steps": STEPS, "guidance_scale": 5.0, "scheduler": "ddim"} | more
    return jaxdiff.generate(*tiny, "a castle", **given)


@pytest.mark.slow
def test_text_to_image(tiny, api):
    answer = api.txt2img(**CASTLE, negative_prompt="blurry", batch_size=2)
    drawn = np.stack([np.array(image) for image in answer.images])
    given = {"steps": STEPS, "guidance_scale": 5.0, "scheduler": "ddim"}
    assert levels(drawn, jaxdiff.generate(*tiny, ["a castle"] * 2, "blurry", seed=7, **given)) <= 1
    assert answer.info["all_seeds"] == [7, 8]
    assert answer.info["sampler_name"] == "DDIM"
    assert answer.info["warnings"] == []
    assert answer.parameters["steps"] == STEPS


def test_what_has_no_effect_is_named_and_what_was_left_open_is_said(server, grey):
    def info(**more):
        body = {"prompt": "a castle", "steps": STEPS, **SIDES, **more}
        answer = httpx.post(f"{server[0]}/sdapi/v1/txt2img", json=body, timeout=120)
        return json.loads(answer.json()["info"])

    off = {"cfg_scale": 1, "negative_prompt": "blurry", "subseed_strength": 0.5}
    first, second = info(**off), info(**off)
    assert first["warnings"] == ["negative_prompt has no effect here: it is for guidance, which is off."]
    assert first["subseed"] != second["subseed"]
    default = info(negative_prompt="blurry")
    assert (default["cfg_scale"], default["warnings"]) == (7.5, [])


@pytest.mark.slow
def test_image_to_image_with_a_mask(tiny, api, source):
    mask = np.zeros((SIDE, SIDE, 3), np.uint8)
    mask[:, : SIDE // 2] = 255
    more = {"images": [Image.fromarray(source)], "mask_image": Image.fromarray(mask), "denoising_strength": 0.5}
    answer = api.img2img(**CASTLE, **more)
    alone = generated(tiny, image=source, mask=mask[..., 0] > 127, strength=0.5)
    assert levels(np.array(answer.image)[None], alone) <= 1
    assert "mask_blur has no effect here." in answer.info["warnings"]


@pytest.mark.slow
def test_image_to_image(tiny, api, source):
    answer = api.img2img(**CASTLE, images=[Image.fromarray(source)], denoising_strength=0.5)
    assert levels(np.array(answer.image)[None], generated(tiny, image=source, strength=0.5)) <= 1
    assert answer.info["warnings"] == []


@pytest.mark.slow
def test_an_image_drawn_small_first(tiny, api):
    more = {"width": SIDE // 2, "height": SIDE // 2, "enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5}
    answer = api.txt2img(**(CASTLE | more), hr_upscaler="Latent")
    alone = generated(tiny, hires=2.0, hires_strength=0.5, hires_upscale="latent")
    assert levels(np.array(answer.image)[None], alone) <= 1


@pytest.mark.slow
def test_enlarging(tiny, source):
    """extra-single-image by the network, by Lanczos' filter or not at all; the network between two stages too."""
    upscaler = tiny_upscaler()
    with serving(jaxdiff.with_upscaler(*tiny, upscaler), start=False) as (address, engine, service):
        engine._warm_up.clear()
        engine.start()
        api = webuiapi.WebUIApi(baseurl=f"{address}/sdapi/v1")
        assert {u["name"] for u in api.get_upscalers()} == {"None", "Lanczos", UPSCALER}
        image = Image.fromarray(np.tile(source, (4, 4, 1)))
        larger = np.array(api.extra_single_image(image, upscaler_1=UPSCALER, upscaling_resize=4).image)
        assert levels(larger, jaxdiff.upscale(*upscaler, np.array(image), scale=4)) <= 1
        resized = image.resize((128, 128), Image.Resampling.LANCZOS)
        assert levels(np.array(api.extra_single_image(image, upscaler_1="Lanczos").image), np.array(resized)) == 0
        assert levels(np.array(api.extra_single_image(image).image), np.array(image)) == 0
        text = webuiapi.webuiapi.b64_img(image)
        for wrong in ({"upscaler_1": "LDSR"}, {"resize_mode": 1}, {"gfpgan_visibility": 0.5}, {"image": "/etc/passwd"},
                      {"upscaler_1": UPSCALER, "upscaling_resize": 16}, {"upscaling_resize": 0}):  # fmt: skip
            refused = httpx.post(f"{address}/sdapi/v1/extra-single-image", json={"image": text} | wrong)
            assert refused.status_code in (400, 422)
        small = {"width": SIDE // 2, "height": SIDE // 2, "enable_hr": True, "hr_upscaler": UPSCALER}
        asked, _ = draw_request(service, TextToImage(**CASTLE | small))
        assert (asked.hires, asked.hires_upscale) == (2.0, "network")
        engine.resolver.job(asked)
    plain = Service(engine, NAME, {})
    with pytest.raises(ArgumentError, match="hr_upscaler"):
        draw_request(plain, TextToImage(**CASTLE | small))


@pytest.mark.slow
def test_controlnets(tiny, source):
    controlled = jaxdiff.with_controlnets(*tiny, tiny_controlnet(tiny[0]))
    with serving(controlled) as (address, *_):
        api = webuiapi.WebUIApi(baseurl=f"{address}/sdapi/v1")
        units = [webuiapi.ControlNetUnit(Image.fromarray(source), module="canny", weight=0.7)]
        units[0].threshold_a, units[0].threshold_b = 100, 200
        answer = api.txt2img(**CASTLE, controlnet_units=units, alwayson_scripts={})  # it writes into its default
        alone = generated(controlled, control_images=[canny(source)], controlnet_scale=0.7)
        assert levels(np.array(answer.image)[None], alone) <= 1
        for wrong in ({"module": "depth"}, {"image": "/etc/passwd"}, {"guidance_end": 0.5}, {"weight": -1}):
            unit = units[0].to_dict() | wrong
            body = {"alwayson_scripts": {"ControlNet": {"args": [unit]}}}
            refused = httpx.post(f"{address}/sdapi/v1/txt2img", json=body)
            assert refused.status_code == 400
            assert next(iter(wrong)) in refused.json()["detail"]


def test_settings_come_back_from_a_png(api):
    drawn = api.txt2img(**CASTLE)
    found = api.png_info(drawn.image)
    assert found.info.startswith("a castle\n")
    assert found.parameters["prompt"] == "a castle"
    assert found.parameters["seed"] == 7
    assert found.info == drawn.info["infotexts"][0]


def test_lists(api):
    assert {s["name"] for s in api.get_samplers()} == set(SAMPLERS)
    assert "karras" in api.util_get_scheduler_names()
    assert api.util_get_model_names() == [NAME]
    assert api.util_get_current_model() == NAME
    assert api.get_loras() == []
    assert {u["name"] for u in api.get_upscalers()} >= {"None"}
    assert any(style["name"] == "watercolor" for style in api.get_prompt_styles())
    api.set_options({"sd_model_checkpoint": NAME})
    api.util_wait_for_ready()


def test_every_sampler_is_one_of_ours():
    assert set(SAMPLERS.values()) == set(OURS)
    assert {value for _, value in SCHEDULERS.values()} - {None} <= set(SPACINGS)
    for name, expected in (
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("Euler a", ("euler_ancestral", None)),
        ("euler A", ("euler_ancestral", None)),
        ("dpmpp_2m", ("dpmpp_2m", None)),
        (None, (None, None)),
    ):
        assert sampler_of(name) == expected
    assert sampler_of("Euler", "Align Your Steps") == ("euler", "ays")


def test_progress_and_interrupt(api, monkeypatch):
    """Progress and a preview while it is drawn; what is interrupted comes back without its images."""
    one_by_one = functools.partial(engine_file.draw_stepwise, seconds=0)  # so that all of it can be seen
    monkeypatch.setattr(engine_file, "draw_stepwise", one_by_one)
    answers = []
    drawing = threading.Thread(target=lambda: answers.append(api.txt2img(**(CASTLE | {"steps": 60}), n_iter=6)))
    drawing.start()
    seen, preview = 0.0, None
    while drawing.is_alive() and (not seen or preview is None):
        found = api.get_progress()
        seen, preview = max(seen, found["progress"]), preview or found["current_image"]
        assert found["state"]["sampling_steps"] in (0, 60)
        time.sleep(0.01)
    assert 0 < seen <= 1
    assert np.array(Image.open(io.BytesIO(base64.b64decode(preview)))).shape == (SIDE, SIDE, 3)
    api.interrupt()
    drawing.join(120)
    assert len(answers[0].images) < 6
    assert len(answers[0].info["all_seeds"]) == len(answers[0].images)
    api.util_wait_for_ready()


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("txt2img", {"sampler_name": "fastest"}, 400, "sampler_name"),
        ("txt2img", {"scheduler": "fastest"}, 400, "scheduler"),
        ("txt2img", {"width": 512}, 400, "size"),
        ("txt2img", {"width": -1}, 422, "width"),
        ("txt2img", {"steps": 61}, 400, "steps"),
        ("txt2img", {"batch_size": 1000, "n_iter": 1000}, 400, "n 1000000"),
        ("txt2img", {"cfg_scale": "much"}, 422, "cfg_scale"),
        ("txt2img", {"styles": ["no such"]}, 400, "style"),
        ("txt2img", {"restore_faces": True}, 400, "restore_faces"),
        ("txt2img", {"script_name": "x/y plot"}, 400, "script_name"),
        ("txt2img", {"alwayson_scripts": {"../x": {"args": [1]}}}, 400, "alwayson_scripts"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "/etc/passwd"}}, 400, "sd_model_checkpoint"),
        ("txt2img", {"override_settings": {"outdir_samples": "/etc"}}, 400, "outdir_samples"),
        (
            "txt2img",
            {"enable_hr": True, "hr_upscaler": "LDSR", "width": SIDE // 2, "height": SIDE // 2},
            400,
            "hr_upscaler",
        ),
        ("img2img", {}, 422, "init_images"),
        ("img2img", {"init_images": []}, 400, "init_images"),
        ("img2img", {"init_images": ["/etc/passwd"]}, 400, "init_images"),
        ("img2img", {"init_images": ["http://127.0.0.1:22/"]}, 400, "init_images"),
        ("png-info", {"image": "AAAA"}, 400, "image"),
        ("options", {"sd_model_checkpoint": "other"}, 400, "sd_model_checkpoint"),
    ],
)
def test_errors_have_its_form(server, path, body, status, word):
    answer = httpx.post(f"{server[0]}/sdapi/v1/{path}", json=body)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "detail", "body", "errors"}
    assert word in answer.json()["detail"]
