"""The page as people come to use it: texts that can be read, what is said and where, and files that come anyhow."""

import base64
import threading

import numpy as np
import pytest
from PIL import Image

from jaxdiff.sampling.stepwise import draw_stepwise
from jaxdiff.serving import engine as engine_file
from tests.support.browser import WAIT, draw, drawn, shot
from tests.support.tiny import SIDE

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the packages of the extra test")

PHONE = {"width": 390, "height": 800}
# What is written by every element that is shown and not greyed out: its words, its colour and those behind it from the
# nearest on, as the browser computed them.
COLOURS = """() => [...document.querySelectorAll("body *")].filter((element) =>
  !element.closest(":disabled, template, option") && element.checkVisibility()
  && (element.matches("input, select, textarea") || [...element.childNodes].some((node) => (node.data || "").trim()))
).map((element) => {
  const behind = [];
  for (let at = element; at; at = at.parentElement) behind.push(getComputedStyle(at).backgroundColor);
  return [element.id || element.textContent.trim().slice(0, 40), getComputedStyle(element).color, behind];
})"""


def channels(colour):
    """Red, green, blue and how opaque it is, from 0 to 1, of rgb(…) or rgba(…)."""
    numbers = [float(x) for x in colour.partition("(")[2].rstrip(")").split(",")]
    return np.array(numbers[:3]) / 255, numbers[3] if len(numbers) == 4 else 1.0


def luminance(rgb):
    """Relative luminance, of WCAG 2.2."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(colour, behind):
    """Of a text with what is behind it, from 1 to 21."""
    opaque = next(rgb for rgb, alpha in map(channels, behind) if alpha == 1)
    low, high = sorted(luminance(rgb) for rgb in (channels(colour)[0], opaque))
    return (high + 0.05) / (low + 0.05)


def test_contrast():
    """Of black and white, and of the lightest grey that may be written on white."""
    assert contrast("rgb(0, 0, 0)", ["rgba(0, 0, 0, 0)", "rgb(255, 255, 255)"]) == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", ["rgb(255, 255, 255)"]) == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_on_a_phone(page, grey, scheme):
    """They contrast by 4.5:1, which WCAG asks for, and none goes beyond the side: nor are files' names cut off."""
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme=scheme)
    assert page.locator("#state").evaluate("state => state.clientHeight") == 0  # nothing is said yet
    draw(page, prompt="m" * 50)
    drawn(page)
    for part in ("image", "control", "upscale"):
        page.click(f"#{part}_part summary")
    page.click("text=Send to image-to-image")
    page.fill("#left", "4")  # greys out
    for state in ("said", "error"):
        found = page.evaluate(COLOURS)
        assert len(found) > 50
        assert [shown for shown, *colours in found if contrast(*colours) < 4.5] == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        shot(page, f"phone-{scheme}-{state}")
        page.fill("#prompt", "x" * 3000)
        page.click("#draw")
        sync_api.expect(page.locator("#status.error")).to_contain_text("shorten it")
    narrow = "inputs => inputs.filter(input => input.clientWidth < 240).map(input => input.id)"
    assert page.locator("input[type=file]").evaluate_all(narrow) == []


@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 800}])
def test_what_is_said_is_in_view(page, grey, size):
    """Wherever the page is scrolled to."""
    page.set_viewport_size(size)
    draw(page)
    drawn(page)
    sync_api.expect(page.locator("#status")).to_be_in_viewport(ratio=1)
    page.set_viewport_size({**size, "height": 400})
    page.locator("#gallery .again").scroll_into_view_if_needed()
    page.click("#gallery .again")
    sync_api.expect(page.locator("#status")).to_have_text("The settings are back.")
    page.locator("#settings").scroll_into_view_if_needed()
    sync_api.expect(page.locator("#status")).to_be_in_viewport(ratio=1)


def test_one_thing_at_a_time(page, monkeypatch):
    """What cannot begin is greyed out, and the keyboard stays where it was."""
    go = threading.Event()

    def held(*args, **how):
        go.wait(WAIT / 1000)
        yield from draw_stepwise(*args, **how)

    go.set()
    draw(page)
    drawn(page)
    go.clear()
    monkeypatch.setattr(engine_file, "draw_stepwise", held)
    page.click("#upscale_part summary")
    page.focus("#draw")
    page.keyboard.press("Enter")
    for part in ("#draw", "#gallery .upscale", "#upscale_image"):
        sync_api.expect(page.locator(part)).to_be_disabled()
    go.set()
    drawn(page, 2)
    for part in page.locator("#gallery .upscale, #upscale_image").all():
        sync_api.expect(part).to_be_enabled()
    sync_api.expect(page.locator("#draw")).to_be_focused()


def test_a_mask_and_margins_exclude_each_other(page, asked, grey):
    """The server refuses them together; here one greys out the other, and says why."""
    draw(page)
    drawn(page)
    page.click("text=Send to image-to-image")
    page.select_option("#mask_part", "left")
    for side in ("left", "top", "right", "bottom"):
        assert page.is_disabled(f"#{side}")
    sync_api.expect(page.locator("#outpaint_help")).to_contain_text("Clear the mask")
    page.click("#clear_mask")
    sync_api.expect(page.locator("#outpaint_help small")).to_be_hidden()
    page.fill("#right", "8")
    for control in ("mask_part", "brush", "strength"):
        assert page.is_disabled(f"#{control}")
    sync_api.expect(page.locator("#mask_help")).to_contain_text("nothing is masked")
    page.locator("#canvas").click()  # does not paint
    page.click("#draw")
    drawn(page, 2)
    assert asked[-1].strength == 1
    page.fill("#right", "0")
    page.locator("#canvas").click()
    assert page.is_disabled("#right")
    page.click("#clear_image")
    assert page.is_enabled("#right")


def test_a_quick_stroke_has_no_gaps(page, asked, grey):
    """However few places the mouse is seen at; and a stroke does not go on from the end of another."""
    draw(page)
    drawn(page)
    page.click("text=Send to image-to-image")
    page.fill("#brush", "12")
    canvas = page.locator("#canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for height in (0.25, 0.75):
        page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + height * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + height * box["height"])
        page.mouse.up()
    page.click("#draw")
    drawn(page, 2)
    mask = asked[-1].mask
    inner = slice(SIDE // 4, 3 * SIDE // 4)
    assert mask[SIDE // 4 - 1 : SIDE // 4 + 1, inner].any(0).all()
    assert mask[3 * SIDE // 4 - 1 : 3 * SIDE // 4 + 1, inner].any(0).all()
    assert not mask[SIDE // 2 - 1 : SIDE // 2 + 1].any()


def test_numbers_that_cannot_be_are_shown(page, asked, grey):
    """Also where they are folded away; those between the steps of the arrow keys can be."""
    page.click("#image_part summary")
    page.fill("#strength", "3")
    page.click("#image_part summary")
    draw(page)
    sync_api.expect(page.locator("#strength")).to_be_focused()
    assert asked == []
    page.fill("#strength", "0.33")
    page.fill("#guidance_scale", "7.25")
    page.fill("#pag_scale", "1.25")
    page.click("#draw")
    drawn(page)
    assert [(request.guidance_scale, request.pag_scale) for request in asked] == [(7.25, 1.25)]


def png(page, tmp_path):
    """A file of the gallery's first image."""
    file = tmp_path / "drawn.png"
    file.write_bytes(base64.b64decode(page.get_attribute("#gallery img", "src").partition(",")[2]))
    return file


DROP = """([where, text]) => {
  const data = new DataTransfer();
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  data.items.add(new File([bytes], "drawn.png", { type: "image/png" }));
  const how = { dataTransfer: data, bubbles: true, cancelable: true };
  const target = document.querySelector(where);
  target.dispatchEvent(new DragEvent("dragover", how));
  return !target.dispatchEvent(new DragEvent("drop", how));
}"""


def test_a_file_is_dropped_anywhere_and_chosen_again(page, grey, tmp_path):
    """And never opened by the browser in place of the page; what is dropped on another input is that one's."""
    draw(page, prompt="a red dragon")
    drawn(page)
    file = png(page, tmp_path)
    text = base64.b64encode(file.read_bytes()).decode()
    for where in ("#gallery", "#prompt", "#drop", "header"):
        page.fill("#prompt", "")
        assert page.evaluate(DROP, [where, text])
        sync_api.expect(page.locator("#prompt")).to_have_value("a red dragon")
        assert "over" not in page.get_attribute("#drop", "class").split()
    assert not page.evaluate(DROP, ["#image", text])
    for _ in range(2):
        page.fill("#prompt", "")
        with page.expect_file_chooser() as chooser:
            page.click("#settings")
        chooser.value.set_files(file)
        sync_api.expect(page.locator("#prompt")).to_have_value("a red dragon")
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "other.png")
    page.set_input_files("#settings", tmp_path / "other.png")
    sync_api.expect(page.locator("#status.error")).to_contain_text("does not say how it was drawn")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        pytest.param(lambda route: route.abort(), "cannot be reached", id="gone"),
        pytest.param(lambda route: route.fulfill(status=413, body="<html>"), "The server answers 413.", id="proxy"),
    ],
)
def test_a_server_that_is_gone_and_a_proxy_that_refuses(page, grey, tmp_path, answer, said):
    """Whatever asks says it in a sentence."""
    draw(page)
    drawn(page)
    file = png(page, tmp_path)
    for path, act in (
        ("v1/images/generations", lambda: page.click("#draw")),
        ("sdapi/v1/extra-single-image", lambda: page.click("#gallery .upscale")),
        ("sdapi/v1/png-info", lambda: page.set_input_files("#settings", file)),
    ):
        page.route(f"**/{path}", answer)
        page.click("#random")
        act()
        sync_api.expect(page.locator("#status.error")).to_contain_text(said)
        page.click("#gallery .again")  # says something else
