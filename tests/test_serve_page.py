"""The page in a real browser: draw, watch, cancel, redraw a painted part, and take a PNG's settings back."""

import base64
import os
import shutil

import pytest

from tests.support.tiny import SIDE

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the packages of the extra test")
pytest.importorskip("uvicorn")

from tests.support.server import NAME, STEPS, serving  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 120_000  # milliseconds, on a busy machine
SHOTS = os.environ.get("JAXDIFF_SCREENSHOTS")  # a folder for pictures of the page, to look at

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")


@pytest.fixture(scope="module")
def server(tiny):
    with serving(tiny) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, server):
    """The page, opened; an error in its script, or something that its policy forbids, fails the test.

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
    opened.goto(server[0])
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


def test_type_a_prompt_and_see_the_image(page):
    draw(page, n=2)
    addresses = drawn(page, 2)
    assert len(set(addresses)) == 2
    assert page.evaluate("document.querySelector('#gallery img').naturalWidth") == SIDE
    sync_api.expect(page.locator("#status")).to_have_text("2 images are drawn.")
    assert "seed 8" in page.locator("#gallery figcaption").first.inner_text()
    page.click("#reuse")
    assert page.input_value("#seed") == "7"
    shot(page, "drawn")


def test_previews_and_cancel(page):
    draw(page, steps=60, n=6)
    page.wait_for_selector("#previews img", timeout=WAIT)
    assert page.is_disabled("#draw")
    shot(page, "drawing")
    page.click("#cancel")
    sync_api.expect(page.locator("#status")).to_have_text("Cancelled.")
    assert page.locator("#previews img").count() == 0
    draw(page, steps=2)
    drawn(page)


def test_redraw_a_painted_part(page, server, monkeypatch):
    asked, submit = [], server[1].submit
    monkeypatch.setattr(server[1], "submit", lambda request, **more: asked.append(request) or submit(request, **more))
    draw(page)
    drawn(page)
    page.click("text=Send to image")
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
    page.click("#image_part summary")
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


def test_what_the_model_cannot_do_is_greyed_out(page):
    assert page.is_disabled("#lora")
    assert page.is_enabled("#negative_prompt")
