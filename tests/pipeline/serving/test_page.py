"""The page in a real browser, headless: type, stream, stop, compare, errors; by keyboard, on a phone, in the dark."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pipeline.config import ServeConfig
from pipeline.serving.api import PAGE
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import TinyRegistry

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WITHOUT = "no Chromium on PATH; install it (Debian: apt-get install chromium) to test the page"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(WITHOUT)
        pytest.skip(WITHOUT)
    with sync_playwright() as playwright:
        # Chromium's sandbox needs rights that a container or root does not have; the only page it opens is ours.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(tiny_registry: TinyRegistry) -> Iterator[LocalServer]:
    tiny_registry.current()
    settings = ServeConfig(versions=["champion", "other"], watch_seconds=0, threads=1, weights="float32")
    tiny_registry.move_alias("other", tiny_registry.add_version(seed=8))
    local = LocalServer(tiny_registry, settings)
    yield local
    local.close()


@pytest.fixture
def complaints() -> list[str]:
    return []


def open_page(browser: Browser, server: LocalServer, complaints: list[str], **options: Any) -> Page:
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(30_000)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith((server.url, "data:")) else complaints.append(sent.url))
    page.goto(server.url)
    expect(page.locator(".card")).to_have_count(1, timeout=30_000)
    return page


@pytest.fixture
def page(browser: Browser, server: LocalServer, complaints: list[str]) -> Iterator[Page]:
    opened = open_page(browser, server, complaints, viewport={"width": 1280, "height": 900})
    yield opened
    opened.context.close()


def finished(page: Page, pane: int = 0) -> None:
    expect(page.locator(".text").nth(pane)).to_have_attribute("aria-busy", "false", timeout=30_000)
    expect(page.locator("#run")).to_be_enabled(timeout=30_000)


def test_type_and_stream_by_keyboard(page: Page, complaints: list[str]) -> None:
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("Return a new")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".token").nth(3)).to_be_attached(timeout=30_000)
    finished(page)
    assert page.locator(".text").inner_text().startswith("Return a new")
    assert "token" in page.locator(".facts").inner_text()
    assert "tokens/s" in page.locator(".rate").inner_text()
    assert "version 1" in page.locator(".facts").inner_text()
    page.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token").nth(1)).to_be_focused()
    expect(page.locator("#tip")).to_be_visible()
    assert page.locator("#tip tr").count() in (5, 6)
    assert page.locator("#tip .chosen").count() == 1
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    assert complaints == []


def test_tokens_are_tinted_by_their_surprise(page: Page) -> None:
    page.fill("#prompt", "Return")
    page.locator(".pane details summary").click()
    page.fill("[data-setting=seed]", "1")  # an answer with words in it: random weights promise none
    page.click("#run")
    finished(page)
    # Not one that ends a character only in part: it has no text of its own.
    token = page.locator(".token").filter(has_text=re.compile(r"\w")).first
    assert 0 < float(token.evaluate("span => span.style.getPropertyValue('--doubt')")) <= 0.62
    token.hover()
    expect(page.locator("#tip .chosen")).to_contain_text("%")


def test_stop(page: Page, server: LocalServer, complaints: list[str]) -> None:
    engine = server.models.find(None)[1].backend.engine
    step = engine.step

    def slow_step() -> Any:
        time.sleep(0.1)
        return step()

    engine.step = slow_step
    try:
        page.fill("#prompt", "Return")
        page.click("#run")
        expect(page.locator(".token").first).to_be_attached(timeout=30_000)
        page.click("#stop")
        finished(page)
    finally:
        engine.step = step
    expect(page.locator(".facts")).to_contain_text("stopped")
    assert page.locator(".token").count() < 60
    assert complaints == []


def test_errors_are_shown(page: Page, server: LocalServer) -> None:
    page.route("**/v1/completions", lambda route: route.abort())
    page.click("#run")
    expect(page.locator(".pane .error")).to_have_text("The server does not answer.")
    page.unroute("**/v1/completions")
    page.locator(".pane details summary").click()
    page.fill("[data-setting=stop]", "x" * 300)
    page.click("#run")
    expect(page.locator(".pane .error")).to_have_text("Each stop string must have 1 to 256 characters.")
    page.fill("[data-setting=stop]", "")
    page.click("#run")
    finished(page)
    expect(page.locator(".pane .error")).to_be_hidden()


def test_two_versions_side_by_side(page: Page, complaints: list[str]) -> None:
    page.fill("#prompt", "Return")
    page.click("#compare")
    expect(page.locator(".pane")).to_have_count(2)
    expect(page.locator(".card")).to_have_count(2)
    page.click("#run")
    finished(page, 0)
    finished(page, 1)
    expect(page.locator(".facts").nth(0)).to_contain_text("version 1")
    expect(page.locator(".facts").nth(1)).not_to_contain_text("version 1 ")
    assert page.locator(".facts").nth(0).inner_text() != page.locator(".facts").nth(1).inner_text()
    page.click("#compare")
    expect(page.locator(".pane")).to_have_count(1)
    assert complaints == []


def test_card_shows_the_model_and_its_curve(page: Page) -> None:
    card = page.locator(".card")
    for fact in ("58,592", "2.5000", "128 tokens", "0123456789ab", "stored as float32: no loss of quality measured"):
        expect(card).to_contain_text(fact)
    expect(card.locator("svg path")).to_have_count(2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (0.00004, "no loss of quality measured"),
        (0.0021, "0.0021 bits per byte worse than registered"),
        (-0.0021, "0.0021 bits per byte better than registered"),
    ],
)
def test_card_says_in_words_what_the_storage_of_weights_costs(page: Page, change: float, says: str) -> None:
    assert page.evaluate(f"() => costOf({change})") == says


def test_phone_and_dark(browser: Browser, server: LocalServer, complaints: list[str]) -> None:
    phone = {"viewport": {"width": 375, "height": 700}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}
    page = open_page(browser, server, complaints, **phone)
    page.fill("#prompt", "Return")
    page.locator("#run").tap()
    finished(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 375
    red, green, blue = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(red, green, blue) < 60
    page.locator("#compare").tap()
    expect(page.locator(".pane")).to_have_count(2)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 375
    page.context.close()
    assert complaints == []


def test_documentation_is_drawn_without_another_host(
    browser: Browser, server: LocalServer, complaints: list[str]
) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(f"{server.url}/docs")
    page.get_by_text("/v1/completions", exact=True).click()
    page.get_by_text("Complete prompts; with stream=true").last.wait_for()
    page.close()
    assert all(url.startswith((server.url, "data:")) for url in asked), asked
    assert complaints == []


def test_page_is_one_file_of_its_own() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for foreign in ("http://", "https://", "//cdn", "@import", '<link rel="stylesheet"', "src="):
        rest = text.replace("http://www.w3.org/2000/svg", "")
        assert foreign not in rest, foreign
