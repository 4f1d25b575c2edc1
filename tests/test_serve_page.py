"""The page in a real browser: draw, watch, cancel, redraw a painted part, and take a PNG's settings back."""

import base64
import contextlib
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.io.edges import canny
from jaxdiff.sampling import stepwise
from jaxdiff.sampling.stepwise import Moment
from jaxdiff.serving import engine as engine_file
from jaxdiff.serving.loras import Loras
from tests.support.tiny import SIDE, tiny_controlnet, tiny_upscaler

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the packages of the extra test")
pytest.importorskip("uvicorn")

from jaxdiff.serving.requests import Limits  # noqa: E402
from tests.support.server import NAME, STEPS, serving  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 120_000  # milliseconds, on a busy machine
SHOTS = os.environ.get("JAXDIFF_SCREENSHOTS")  # a folder for images of the page, to look at

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")


@pytest.fixture(scope="module")
def server(tiny):
    """Of a model with all that the page offers."""
    model, params = jaxdiff.with_controlnets(*tiny, tiny_controlnet(tiny[0]))
    full = jaxdiff.with_upscaler(model, params, tiny_upscaler())
    with serving(full, loras=Loras(*full, {"style/detail": Path("detail.safetensors")})) as found:
        yield found


@pytest.fixture
def asked(server, monkeypatch):
    """The requests that the engine gets."""
    found, submit = [], server[1].submit
    monkeypatch.setattr(server[1], "submit", lambda request, **more: found.append(request) or submit(request, **more))
    return found


@pytest.fixture
def grey(monkeypatch):
    """Draws no image, but grey ones at once."""

    def drawn(model, params, request, **more):
        shape = len(request.prompts), request.settings.height, request.settings.width, 3
        yield Moment(1, 1, lambda: np.full(shape, 127, np.uint8), np.ones(shape[0], bool))

    monkeypatch.setattr(engine_file, "draw_stepwise", drawn)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, server):
    """The page, opened."""
    with opened_page(browser, server[0]) as found:
        yield found


@contextlib.contextmanager
def opened_page(browser, address):
    """The page of a server; an error in its script, a look elsewhere, or what its policy forbids fails the test.

    The browser's own line about an answer that is an error is none.
    """
    context = browser.new_context()
    context.set_default_timeout(WAIT)
    opened, wrong = context.new_page(), []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "console",
        lambda message: message.type == "error" and "status of 4" not in message.text and wrong.append(message.text),
    )
    opened.on(
        "request", lambda request: request.url.startswith((address, "data:", "blob:")) or wrong.append(request.url)
    )
    opened.goto(address)
    sync_api.expect(opened.locator("#model")).to_have_text(NAME)
    yield opened
    context.close()
    assert wrong == []


def draw(page, steps=STEPS, n=1, prompt="a castle", seed=7):
    for name, value in {"prompt": prompt, "steps": steps, "n": n, "seed": seed}.items():
        page.fill(f"#{name}", str(value))
    page.click("#draw")


def drawn(page, count=1):
    """The addresses of the gallery's images, once there are so many."""
    sync_api.expect(page.locator("#gallery img")).to_have_count(count, timeout=WAIT)
    sync_api.expect(page.locator("#draw")).to_be_enabled(timeout=WAIT)
    return page.locator("#gallery img").evaluate_all("images => images.map(image => image.src)")


def shot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


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


def test_the_apis_are_described(page, server):
    """Without scripts of others."""
    page.goto(f"{server[0]}/docs")
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
