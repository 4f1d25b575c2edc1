"""Fixtures for the tests of the page: a server of a model with all that the page offers, opened in a browser."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxdiff
from jaxdiff.sampling.stepwise import Progress
from jaxdiff.serving import engine as engine_file
from jaxdiff.serving.loras import Loras
from tests.support.tiny import tiny_controlnet, tiny_upscaler

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 120_000  # milliseconds, on a busy machine
SHOTS = os.environ.get("JAXDIFF_SCREENSHOTS")  # a folder for images of the page, to look at


@pytest.fixture(scope="module")
def page_server(tiny):
    """(address, engine, service)."""
    pytest.importorskip("uvicorn", reason="needs the packages of the extra test")
    from tests.support.server import serving

    model, params = jaxdiff.with_controlnets(*tiny, tiny_controlnet(tiny[0]))
    full = jaxdiff.with_upscaler(model, params, tiny_upscaler())
    with serving(full, loras=Loras(*full, {"style/detail": Path("detail.safetensors")})) as found:
        yield found


@pytest.fixture
def asked(page_server, monkeypatch):
    """The requests that the engine gets."""
    engine = page_server[1]
    found, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda request, **more: found.append(request) or submit(request, **more))
    return found


@pytest.fixture
def grey(monkeypatch):
    """Draws no image, but grey ones at once."""

    def drawn(model, params, request, **more):
        shape = len(request.prompts), request.settings.height, request.settings.width, 3
        yield Progress(1, 1, lambda: np.full(shape, 127, np.uint8), np.ones(shape[0], bool))

    monkeypatch.setattr(engine_file, "draw_stepwise", drawn)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the packages of the extra test")
    if BROWSER is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_api.sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, page_server):
    """The page, opened."""
    with opened_page(browser, page_server[0]) as found:
        yield found


@contextlib.contextmanager
def opened_page(browser, address):
    """The page of a server; an error in its script, a look elsewhere, or what its policy forbids fails the test.

    The browser's own line about an answer that is an error, or that a test keeps back, is none.
    """
    from playwright.sync_api import expect

    context = browser.new_context()
    context.set_default_timeout(WAIT)
    opened, wrong = context.new_page(), []
    own = "status of 4", "ERR_FAILED"
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "console",
        lambda said: said.type == "error" and not any(x in said.text for x in own) and wrong.append(said.text),
    )
    opened.on(
        "request", lambda request: request.url.startswith((address, "data:", "blob:")) or wrong.append(request.url)
    )
    opened.goto(address)
    expect(opened.locator("#model")).not_to_have_text("…")
    yield opened
    context.close()
    assert wrong == []


def draw(page, steps=4, n=1, prompt="a castle", seed=7):
    for name, value in {"prompt": prompt, "steps": steps, "n": n, "seed": seed}.items():
        page.fill(f"#{name}", str(value))
    page.click("#draw")


def drawn(page, count=1):
    """The addresses of the gallery's images, once there are so many."""
    from playwright.sync_api import expect

    expect(page.locator("#gallery img")).to_have_count(count, timeout=WAIT)
    expect(page.locator("#draw")).to_be_enabled(timeout=WAIT)
    return page.locator("#gallery img").evaluate_all("images => images.map(image => image.src)")


def shot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)
