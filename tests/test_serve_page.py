"""The page in a real browser: draw, watch, cancel, redraw a painted part, and take a PNG's settings back."""

import base64
import threading

import numpy as np
import pytest
from PIL import Image

from jaxdiff.io.edges import canny
from jaxdiff.sampling import stepwise
from jaxdiff.serving import engine as engine_file
from jaxdiff.serving.requests import Limits
from tests.support.browser import WAIT, draw, drawn, opened_page, shot
from tests.support.tiny import SIDE

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the packages of the extra test")
pytest.importorskip("uvicorn")

from tests.support.server import NAME, serving  # noqa: E402


@pytest.mark.slow
def test_type_a_prompt_and_see_the_image(page):
    draw(page, n=2)
    addresses = drawn(page, 2)
    assert len(set(addresses)) == 2
    assert page.evaluate("document.querySelector('#gallery img').naturalWidth") == SIDE
    sync_api.expect(page.locator("#status")).to_have_text("2 images are drawn.")
    captions = page.locator("#gallery figcaption").all_inner_texts()
    assert ["seed 7" in captions[0], "seed 8" in captions[1]] == [True, True]
    page.click("#random")
    assert page.input_value("#seed") == ""
    page.click("#reuse")
    assert page.input_value("#seed") == "7"
    shot(page, "drawn")


def test_previews_and_cancel(page, monkeypatch):
    """Of images that are not finished before the button is pressed."""
    cancelled = threading.Event()

    def held(*args, **how):
        for moment in stepwise.draw_stepwise(*args, **how):
            if moment.finite is not None:
                cancelled.wait(WAIT / 1000)
            yield moment

    monkeypatch.setattr(engine_file, "draw_stepwise", held)
    draw(page, steps=60, n=6)
    page.wait_for_selector("#previews img", timeout=WAIT)
    assert page.is_disabled("#draw")
    shot(page, "drawing")
    page.click("#cancel")
    sync_api.expect(page.locator("#status")).to_have_text("Cancelled.")
    cancelled.set()
    assert page.locator("#previews img").count() == 0
    draw(page, steps=2)
    drawn(page)


def test_redraw_a_painted_part(page, asked):
    draw(page)
    drawn(page)
    page.click("text=Send to image-to-image")
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.7 * box["height"], steps=8)
    page.mouse.up()
    shot(page, "painted")
    page.click("#draw")
    drawn(page, 2)
    mask = asked[-1].mask
    assert 0.02 < mask.mean() < 0.4
    assert mask[SIDE // 2, SIDE // 5]
    assert not mask[:, SIDE // 2 :].any()
    page.click("#clear_mask")
    page.select_option("#mask_part", "left")  # the way without a mouse
    page.click("#draw")
    drawn(page, 3)
    assert asked[-1].mask[:, : SIDE // 2].all()
    assert not asked[-1].mask[:, SIDE // 2 :].any()
    page.click("#clear_image")
    assert page.locator("#canvas").is_hidden()


def test_settings_of_a_png(page, tmp_path):
    draw(page, prompt="a red dragon", steps=3, seed=21)
    (address,) = drawn(page)
    file = tmp_path / "dragon.png"
    file.write_bytes(base64.b64decode(address.partition(",")[2]))
    page.reload()
    sync_api.expect(page.locator("#model")).to_have_text(NAME)
    page.set_input_files("#settings", file)
    sync_api.expect(page.locator("#status")).to_have_text("The settings are back.")
    assert page.input_value("#prompt") == "a red dragon"
    assert (page.input_value("#steps"), page.input_value("#seed")) == ("3", "21")
    page.click("#draw")
    assert drawn(page) == [address]  # the same image to the byte
    (tmp_path / "other.png").write_bytes(b"no image")
    page.set_input_files("#settings", tmp_path / "other.png")
    sync_api.expect(page.locator("#status")).to_contain_text("cannot be read")


def test_errors_are_said(page):
    draw(page, prompt="x" * 3000 + " BREAK" * 40)
    sync_api.expect(page.locator("#status.error")).to_contain_text("shorten it")


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1300, "light"), (1300, "dark")])
def test_narrow_and_wide_light_and_dark(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    for part in ("image", "control", "upscale"):
        page.click(f"#{part}_part summary")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    shot(page, f"{width}-{scheme}")


def test_labels_and_keyboard(page):
    """Every control has a name that a screen reader says; the keyboard alone draws."""
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button')]"
        ".filter(e => !(e.labels && e.labels.length) && !e.textContent.trim() && !e.ariaLabel).map(e => e.id)"
    )
    assert unnamed == []
    page.fill("#steps", "2")
    page.focus("#prompt")
    page.keyboard.type("a castle")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "draw":
            break
    page.keyboard.press("Enter")
    drawn(page)


def test_outpaint(page, asked, grey):
    """What is added and a seam are drawn, in the size whose shape is nearest."""
    draw(page)
    drawn(page)
    page.click("text=Send to image-to-image")
    page.fill("#right", str(SIDE))
    shot(page, "outpaint")
    page.click("#draw")
    drawn(page, 2)
    request = asked[-1]
    assert (request.width, request.height, request.strength) == (2 * SIDE, SIDE, 1)
    assert request.mask[:, SIDE:].all()
    assert not request.mask[:, : SIDE // 4].any()
    assert page.evaluate("document.querySelector('#canvas').width") == 2 * SIDE
    assert page.evaluate("document.querySelector('#gallery img').naturalWidth") == 2 * SIDE
    assert f"{2 * SIDE}x{SIDE}" in page.locator("#gallery figcaption").first.inner_text()


def test_controlnet_with_its_edges(page, asked, grey, tmp_path):
    """From text alone, and beside an image to start from."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[4:12, 4:12] = 255
    Image.fromarray(image).save(tmp_path / "square.png")
    page.click("#control_part summary")
    page.set_input_files("#control_0", tmp_path / "square.png")
    page.check("#control_edges")
    page.fill("#controlnet_scale", "0.7")
    draw(page)
    drawn(page)
    page.uncheck("#control_edges")
    page.click("text=Send to image-to-image")
    page.click("#draw")
    drawn(page, 2)
    for request, expected in zip(asked, (canny(image), image), strict=True):
        (followed,) = request.control_images
        np.testing.assert_array_equal(followed, expected)
        assert request.controlnet_scale == 0.7
    assert asked[0].image is None
    assert asked[1].image is not None


def test_prompt_matrix(page, asked, grey):
    page.check("#matrix")
    draw(page, prompt="a {red|blue} castle")
    drawn(page, 2)
    captions = page.locator("#gallery figcaption").all_inner_texts()
    assert [caption.split(" (")[0] for caption in captions] == ["a red castle", "a blue castle"]
    assert [request.matrix for request in asked] == [True]
    shot(page, "matrix")
    page.locator("#gallery .again").nth(1).click()
    assert page.input_value("#prompt") == "a blue castle"
    assert not page.is_checked("#matrix")
    draw(page, prompt="{" + "|".join("abcdefgh") + "}")  # nothing is expanded any more
    drawn(page, 3)
    page.check("#matrix")
    page.click("#draw")
    sync_api.expect(page.locator("#status.error")).to_contain_text("leave out alternatives")


def test_upscale(page, grey, tmp_path):
    """An image of the gallery, and one from a file; its PNG holds the settings of what it was made of."""
    draw(page, prompt="a red dragon")
    drawn(page)
    page.click("#gallery .upscale")
    address, _ = drawn(page, 2)
    assert page.evaluate("document.querySelector('#gallery img').naturalWidth") == 4 * SIDE
    assert "upscaled 4" in page.locator("#gallery figcaption").first.inner_text()
    shot(page, "upscaled")
    (tmp_path / "small.png").write_bytes(base64.b64decode(address.partition(",")[2]))
    page.set_input_files("#settings", tmp_path / "small.png")
    sync_api.expect(page.locator("#status")).to_have_text("The settings are back.")
    assert page.input_value("#prompt") == "a red dragon"
    page.click("#upscale_part summary")
    page.select_option("#scale", "2")
    page.set_input_files("#upscale_image", tmp_path / "small.png")
    drawn(page, 3)
    assert page.evaluate("document.querySelector('#gallery img').naturalWidth") == 8 * SIDE


def test_the_apis_are_described(page, page_server):
    """Without scripts of others."""
    page.goto(f"{page_server[0]}/docs")
    page.click("text=POST /v1/images/generations")
    row = page.locator("details[open] tr", has_text="negative_prompt")
    sync_api.expect(row).to_contain_text("string or null")
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    shot(page, "docs")


def test_loras_are_added_to_the_prompt(page):
    page.fill("#prompt", "a castle")
    page.fill("#lora_weight", "0.5")
    page.click("#add_lora")
    assert page.input_value("#prompt") == "a castle <lora:style/detail:0.5>"


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1300, "light")])
def test_what_the_model_cannot_do_is_greyed_out(browser, tiny, width, scheme):
    """With a word why, which the controls name as their description."""
    limits = Limits(((SIDE, SIDE),), images=1)
    with serving(tiny, limits, start=False) as (address, *_), opened_page(browser, address) as page:
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        for control, why in (
            ("lora", "--lora_dir"),
            ("add_lora", "--lora_dir"),
            ("control_0", "--controlnet"),
            ("control_edges", "--controlnet"),
            ("upscale_image", "upscaler"),
            ("matrix", "one image"),
        ):
            assert page.is_disabled(f"#{control}")
            said = page.get_attribute(f"#{control}", "aria-describedby")
            assert why in page.locator(f"#{said}").inner_text()
        assert page.locator("#control_part summary").is_visible()
        assert page.is_enabled("#negative_prompt")
        for part in ("image", "control", "upscale"):
            page.click(f"#{part}_part summary")
        shot(page, f"greyed-{width}-{scheme}")
