"""The page in a real browser, headless: talk and complete; by keyboard, on a phone, in the dark, with hostile text.

Long because one browser and one server do for all of it.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from model.chat import CHAT_TEMPLATE
from pipeline.config import ServeConfig
from pipeline.serving.api import PAGE
from tests.pipeline.serving.asking import CLIENT
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
    tiny_registry.move_alias("other", tiny_registry.add_version(seed=8))
    tiny_registry.add_version(seed=1, alias="talker", context_length=512, chat_template=CHAT_TEMPLATE)
    # Version 1 is served under two names.
    versions = ["champion", "1", "other", "talker"]
    local = LocalServer(tiny_registry, ServeConfig(versions=versions, watch_seconds=0, threads=1, weights="float32"))
    yield local
    local.close()


@pytest.fixture(scope="module")
def single(tiny_registry: TinyRegistry) -> Iterator[LocalServer]:
    """Serves one version, which does not talk; MLflow's pages are at an address of their own."""
    settings = ServeConfig(watch_seconds=0, threads=1, weights="float32", mlflow_pages="http://pages.test:5000/")
    local = LocalServer(tiny_registry, settings)
    yield local
    local.close()


@pytest.fixture
def complaints() -> list[str]:
    return []


def open_page(
    browser: Browser, server: LocalServer, complaints: list[str], address: str = "/?complete", **options: Any
) -> Page:
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(30_000)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith((server.url, "data:")) else complaints.append(sent.url))
    page.goto(f"{server.url}{address}")
    expect(page.locator(".card")).to_have_count(1, timeout=30_000)
    return page


@pytest.fixture
def page(browser: Browser, server: LocalServer, complaints: list[str]) -> Iterator[Page]:
    opened = open_page(browser, server, complaints, viewport={"width": 1280, "height": 900})
    yield opened
    opened.context.close()


@pytest.fixture
def talk(browser: Browser, server: LocalServer, complaints: list[str]) -> Iterator[Page]:
    opened = open_page(browser, server, complaints, "/?talk=talker", viewport={"width": 1280, "height": 900})
    opened.evaluate(
        """() => {
            const put = (name, value) => {
                const input = document.querySelector(`#talk-settings [data-setting=${name}]`);
                input.value = value;
                input.dispatchEvent(new Event("input", { bubbles: true }));
            };
            put("max_tokens", 12);
            put("seed", 1);
        }"""
    )
    yield opened
    opened.context.close()


def finished(page: Page, pane: int = 0) -> None:
    expect(page.locator(".text").nth(pane)).to_have_attribute("aria-busy", "false", timeout=30_000)
    expect(page.locator("#run")).to_be_enabled(timeout=30_000)


def test_type_and_stream_by_keyboard(page: Page, complaints: list[str]) -> None:
    page.evaluate("() => document.querySelector('.pane [data-setting=seed]').value = 1")  # others may end at once
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
    page.get_by_text("More settings").last.click()
    page.fill(".pane [data-setting=seed]", "1")  # an answer with words in it: random weights promise none
    page.click("#run")
    finished(page)
    # Not one that ends a character only in part: it has no text of its own.
    token = page.locator(".token").filter(has_text=re.compile(r"\w")).first
    assert 0 < float(token.evaluate("span => span.style.getPropertyValue('--doubt')")) <= 0.62
    token.hover()
    expect(page.locator("#tip .chosen")).to_contain_text("%")


@contextlib.contextmanager
def slowly(server: LocalServer, model: str) -> Iterator[None]:
    """Make every step of a version take longer."""
    engine: Any = server.models.find(model)[1].backend.engine  # type: ignore[attr-defined]
    step = engine.step

    def slow_step() -> Any:
        time.sleep(0.1)
        return step()

    engine.step = slow_step
    try:
        yield
    finally:
        engine.step = step


def test_stop(page: Page, server: LocalServer, complaints: list[str]) -> None:
    with slowly(server, "tiny"):
        page.fill("#prompt", "Return")
        page.click("#run")
        expect(page.locator(".token").first).to_be_attached(timeout=30_000)
        page.click("#stop")
        finished(page)
    expect(page.locator(".facts")).to_contain_text("stopped")
    assert page.locator(".token").count() < 60
    assert complaints == []


def test_errors_are_shown(page: Page, server: LocalServer) -> None:
    page.route("**/v1/completions", lambda route: route.abort())
    page.click("#run")
    expect(page.locator(".pane .error")).to_have_text("The server does not answer.")
    page.unroute("**/v1/completions")
    page.get_by_text("More settings").last.click()
    page.fill(".pane [data-setting=stop]", "x" * 300)
    page.click("#run")
    expect(page.locator(".pane .error")).to_have_text("Each stop string must have 1 to 256 characters.")
    page.fill(".pane [data-setting=stop]", "")
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
    assert page.locator("select").nth(1).locator("option").all_inner_texts()[0] == "tiny version 1 (champion)"
    assert len(page.locator(".pane select").first.locator("option").all()) == 3, "each version once"
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
    # Losses from 7.10 to 9.10 over 19 steps, at round numbers.
    assert card.locator("text.loss").all_text_contents() == ["7.0", "7.5", "8.0", "8.5", "9.0", "9.5"]
    assert card.locator("text.step").all_text_contents() == ["0", "5", "10", "15", "20"]


@pytest.mark.parametrize(
    ("low", "high", "ticks", "decimals"),
    [
        (0, 340, [0, 100, 200, 300, 400], 0),
        (0, 1, [0, 0.5, 1], 1),
        (2.13, 8.97, [2, 4, 6, 8, 10], 0),
        (3.0, 3.0, None, None),
        (0.0012, 0.0019, [0.0012, 0.0014, 0.0016, 0.0018, 0.002], 4),
    ],
)
def test_axes_have_round_numbers(page: Page, low: float, high: float, ticks: list[float] | None, decimals: int) -> None:
    found = page.evaluate(f"async () => (await import('/page/card.js')).ticksOf({low}, {high})")
    assert found["ticks"][0] <= low + 1e-12
    assert found["ticks"][-1] >= high - 1e-12
    assert len(found["ticks"]) <= 7
    if ticks is not None:
        assert found == {"ticks": ticks, "decimals": decimals}


def test_the_runs_id_leads_to_its_page(
    browser: Browser, page: Page, single: LocalServer, complaints: list[str]
) -> None:
    link = page.locator(".card dd a")
    assert re.match(
        r"http://127\.0\.0\.1:5000/#/experiments/\d+/runs/[0-9a-f]{32}\?workflowType=machine_learning$",
        link.get_attribute("href") or "",
    )
    expect(page.locator(".card")).to_contain_text("once this runs: python -m mlflow server --backend-store-uri sqlite:")
    other = open_page(browser, single, complaints)
    assert (other.locator(".card dd a").get_attribute("href") or "").startswith("http://pages.test:5000/#/experiments/")
    expect(other.locator(".card")).not_to_contain_text("once this runs")
    other.context.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (0.00004, "no loss of quality measured"),
        (0.0021, "0.0021 bits per byte worse than registered"),
        (-0.0021, "0.0021 bits per byte better than registered"),
    ],
)
def test_card_says_in_words_what_the_storage_of_weights_costs(page: Page, change: float, says: str) -> None:
    assert page.evaluate(f"async () => (await import('/page/card.js')).costOf({change})") == says


def test_one_version_is_compared_with_itself_under_other_settings(
    browser: Browser, single: LocalServer, complaints: list[str]
) -> None:
    page = open_page(browser, single, complaints, "/")
    expect(page.locator("#prompt")).to_be_visible()  # it does not talk
    expect(page.locator("#compare")).to_have_text("Compare settings")
    page.click("#compare")
    expect(page.locator(".pane")).to_have_count(2)
    expect(page.locator(".pane select").first).to_be_hidden()
    expect(page.locator(".card")).to_have_count(1)
    page.context.close()
    assert complaints == []


def test_a_long_prompt_leaves_the_answer_in_sight(browser: Browser, server: LocalServer, complaints: list[str]) -> None:
    page = open_page(browser, server, complaints, viewport={"width": 390, "height": 700})
    page.fill("#prompt", "Return a new list.\n" * 200)
    # An answer with words in it: random weights promise none.
    page.evaluate("() => document.querySelector('.pane [data-setting=seed]').value = 1")
    page.click("#run")
    finished(page)
    expect(page.locator(".token").filter(has_text=re.compile(r"\w")).first).to_be_in_viewport()
    expect(page.locator("#run")).to_be_in_viewport()
    page.get_by_text("Show the whole prompt (3,800 characters)").click()
    assert page.locator(".given").inner_text().count("Return") == 200
    page.context.close()


@pytest.mark.parametrize("address", ["/?talk=talker", "/?complete"])
def test_every_control_has_a_name(browser: Browser, server: LocalServer, complaints: list[str], address: str) -> None:
    page = open_page(browser, server, complaints, address)
    page.evaluate("() => document.querySelectorAll('details').forEach((each) => each.open = true)")
    for name in ("Temperature", "Top-p", "Top-k", "Max tokens", "Min-p", "Repetition penalty"):
        slider = page.get_by_role("slider", name=name, exact=True)
        expect(slider).to_have_count(1)
        assert slider.get_attribute("aria-valuetext")
    for role, name in (("combobox", "Model"), ("spinbutton", "Seed"), ("textbox", "Stop at")):
        expect(page.get_by_role(role, name=name, exact=True)).to_have_count(1)  # type: ignore[arg-type]
    for button in page.locator("button:visible").all():
        assert button.inner_text() or button.get_attribute("aria-label")
    page.context.close()


PHONE = {"viewport": {"width": 390, "height": 700}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}


def assert_narrow_and_dark(page: Page) -> None:
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    red, green, blue = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(red, green, blue) < 60


def test_completion_on_a_phone_in_the_dark(browser: Browser, server: LocalServer, complaints: list[str]) -> None:
    page = open_page(browser, server, complaints, **PHONE)
    page.fill("#prompt", "Return")
    page.locator("#run").tap()
    finished(page)
    assert_narrow_and_dark(page)
    page.locator("#compare").tap()
    expect(page.locator(".pane")).to_have_count(2)
    assert_narrow_and_dark(page)
    page.context.close()
    assert complaints == []


# -- talk --


def answered(page: Page, turns: int) -> None:
    expect(page.locator(".turn")).to_have_count(turns, timeout=30_000)
    expect(page.locator("#turns")).to_have_attribute("aria-busy", "false", timeout=30_000)
    expect(page.locator(".running")).to_have_count(0, timeout=30_000)


def ask(page: Page, question: str, turns: int) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")
    answered(page, turns)


def watch_requests(page: Page) -> list[Any]:
    """What the page asks of the model from now on."""
    asked: list[Any] = []
    page.on(
        "request", lambda sent: asked.append(sent.post_data_json) if sent.url.endswith("/chat/completions") else None
    )
    return asked


def said(page: Page) -> list[str]:
    return page.locator(".turn .said").all_inner_texts()


def test_talk_by_keyboard_alone(talk: Page, complaints: list[str]) -> None:
    asked = watch_requests(talk)
    expect(talk.locator("#question")).to_be_focused()
    talk.keyboard.type("Return a new list.")
    talk.keyboard.press("Shift+Enter")
    talk.keyboard.type("Now.")
    talk.keyboard.press("Enter")
    answered(talk, 2)
    expect(talk.locator("#question")).to_be_focused()
    talk.keyboard.type("More.")
    talk.keyboard.press("Enter")
    answered(talk, 4)
    first, second = asked
    assert first["messages"] == [{"role": "user", "content": "Return a new list.\nNow."}]
    assert [each["role"] for each in second["messages"]] == ["user", "assistant", "user"]
    assert second["model"] == "tiny@talker"
    facts = talk.locator(".turn .facts").last.inner_text()
    assert re.search(r"tokens/s .* first after \d+ ms .* \d+ of \d+ prompt tokens reused .* version \d+", facts), facts
    # Back to the last answer's actions, and the question is asked again.
    for _ in range(2):
        talk.keyboard.press("Shift+Tab")
    expect(talk.get_by_role("button", name="Ask the last question again")).to_be_focused()
    before = said(talk)
    talk.keyboard.press("Enter")
    answered(talk, 4)
    assert len(asked) == 3
    assert asked[2]["messages"] == second["messages"]
    assert said(talk) == before, "the same seed"
    assert complaints == []


def test_a_conversation_is_kept_over_a_reload_and_ended_by_a_new_one(talk: Page) -> None:
    talk.locator("#talk-system-box summary").click()
    talk.fill("#talk-system", "Be brief.")
    ask(talk, "Return a new list.", 2)
    talk.fill("#question", "half a que")
    before = said(talk)
    talk.reload()
    expect(talk.locator(".turn")).to_have_count(2)
    assert said(talk) == before
    expect(talk.locator("#question")).to_have_value("half a que")
    expect(talk.locator("#talk-system")).to_have_value("Be brief.")
    expect(talk.locator("#talk-settings [data-setting=max_tokens]")).to_have_value("12")
    asked = watch_requests(talk)
    ask(talk, "More.", 4)
    assert [each["role"] for each in asked[0]["messages"]] == ["system", "user", "assistant", "user"]
    talk.click("#talk-new")
    expect(talk.locator(".turn")).to_have_count(0)
    talk.reload()
    expect(talk.locator(".empty")).to_be_visible()


def test_an_answer_is_stopped_and_stays(talk: Page, server: LocalServer) -> None:
    talk.evaluate("() => document.querySelector('#talk-settings [data-setting=max_tokens]').value = 200")
    with slowly(server, "tiny@talker"):
        talk.fill("#question", "Return")
        talk.press("#question", "Enter")
        expect(talk.locator(".turn.assistant .said")).not_to_be_empty(timeout=30_000)
        talk.keyboard.press("Escape")
        answered(talk, 2)
    expect(talk.locator(".turn .facts").last).to_contain_text("stopped")
    kept = said(talk)[1]
    assert kept
    ask(talk, "More.", 4)
    assert said(talk)[1] == kept


def test_a_question_is_edited_and_what_followed_is_dropped(talk: Page) -> None:
    ask(talk, "Return", 2)
    ask(talk, "More.", 4)
    asked = watch_requests(talk)
    talk.get_by_role("button", name="Edit question 1").click()
    field = talk.get_by_role("textbox", name="Your question, changed")
    expect(field).to_be_focused()
    expect(field).to_have_value("Return")
    field.press("Escape")
    expect(talk.locator(".turn")).to_have_count(4)
    talk.get_by_role("button", name="Edit question 1").click()
    field.fill("Sort it.")
    field.press("Enter")
    answered(talk, 2)
    assert [each["messages"] for each in asked] == [[{"role": "user", "content": "Sort it."}]]


HOSTILE = [
    "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script>",
    "w" * 2000,
    "\u202eمرحبا \u202e" + "Z\u0361\u0489\u0337" * 200,
]


def answer_with(body: str, route: Route) -> None:
    route.fulfill(body=body, headers={"content-type": "text/event-stream", "x-model-version": "3"})


def test_hostile_text_is_text(talk: Page, complaints: list[str]) -> None:
    for number, text in enumerate(HOSTILE):
        words = "".join(
            f"data: {json.dumps(event)}\n\n"
            for event in (
                {"choices": [{"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}]},
                {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            )
        )
        body = f"{words}data: [DONE]\n\n"
        talk.route("**/v1/chat/completions", partial(answer_with, body))
        ask(talk, text, 2 * number + 2)
        talk.unroute("**/v1/chat/completions")
    assert talk.locator("#turns img, #turns script").count() == 0
    assert said(talk)[0] == said(talk)[1] == HOSTILE[0]
    assert talk.title() == "tiny"
    assert talk.evaluate("() => document.documentElement.scrollWidth") <= 1280
    # Characters that stack upwards do not reach the turn above.
    assert talk.locator(".turn").last.evaluate("(turn) => getComputedStyle(turn).overflow") == "clip"
    assert complaints == []


def test_what_goes_wrong_is_said_and_the_question_can_be_asked_again(talk: Page) -> None:
    talk.route("**/v1/chat/completions", lambda route: route.abort())
    ask(talk, "Return", 1)
    expect(talk.locator(".turn .error")).to_have_text("The server does not answer.")
    talk.unroute("**/v1/chat/completions")
    talk.get_by_role("button", name="Ask the last question again").click()
    answered(talk, 2)
    expect(talk.locator(".turn .error").last).to_be_hidden()
    # The context fills; without its first question it has room.
    ask(talk, "0" * 350, 4)
    ask(talk, "1" * 300, 5)
    expect(talk.locator(".turn .error").last).to_contain_text("This model's context is 512 tokens")
    forget = talk.get_by_role("button", name="Forget the first question")
    forget.click()
    answered(talk, 3)
    forget.click()
    answered(talk, 2)
    assert said(talk)[0] == "1" * 300


def test_the_code_that_is_copied_gives_the_same_answer(talk: Page) -> None:
    ask(talk, 'It\'s "quoted" \\ `so` $HOME\n é 你', 2)
    talk.click("#talk-code")
    command = shlex.split(talk.locator("#snippet-text").input_value().replace(" \\\n", " "))  # as a shell joins lines
    assert command[:4] == [
        "curl",
        f"{talk.url.partition('/?')[0]}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
    ]
    answer = CLIENT.post(command[1], content=command[-1].encode(), headers={"Content-Type": "application/json"}).json()
    expected = talk.evaluate("() => JSON.parse(sessionStorage.conversation).turns[1].content")
    assert answer["choices"][0]["message"]["content"] == expected
    talk.get_by_role("button", name="Python").click()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(talk.locator("#snippet-text").input_value(), {})
    assert printed.getvalue() == f"{expected}\n"
    # The key of this tab is nobody else's: the code reads it from the environment.
    talk.evaluate("() => sessionStorage.setItem('api-key', 'secret')")
    for kind, names in (("curl", "$API_KEY"), ("Python", 'os.environ["API_KEY"]')):
        talk.get_by_role("button", name=kind, exact=True).click()
        code = talk.locator("#snippet-text").input_value()
        assert names in code
        assert "secret" not in code
    talk.keyboard.press("Escape")
    expect(talk.locator("#snippet")).to_be_hidden()


def test_the_code_of_a_completion(page: Page) -> None:
    page.fill("#prompt", "Return 'a")
    page.get_by_text("More settings").last.click()
    page.fill(".pane [data-setting=seed]", "1")
    page.click("#run")
    finished(page)
    shown = page.locator(".text").inner_text()
    page.click("#code")
    page.get_by_role("button", name="Python").click()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(page.locator("#snippet-text").input_value(), {})
    assert shown.split()[-1] in printed.getvalue()


def test_a_version_that_does_not_talk_says_why_and_how(talk: Page, browser: Browser, single: LocalServer) -> None:
    talk.goto(talk.url.replace("talker", "1"))
    panel = talk.locator("#talk-none")
    expect(panel).to_contain_text("tiny version 1 (champion) does not talk")
    expect(panel).to_contain_text("source.kind=conversations")
    expect(talk.locator("#asking")).to_be_hidden()
    panel.get_by_role("button", name="Talk with tiny version").click()
    expect(talk.locator("#question")).to_be_focused()
    alone = open_page(browser, single, [], "/?talk")
    alone.locator("#talk-none").get_by_role("link", name="Complete a text instead").click()
    expect(alone.locator("#prompt")).to_be_focused()
    assert alone.url.endswith("/?complete")
    alone.go_back()
    expect(alone.locator("#talk-none")).to_be_visible()
    alone.context.close()


def test_an_address_can_name_the_version(browser: Browser, server: LocalServer, complaints: list[str]) -> None:
    for address, chosen in (
        ("/", "tiny@talker"),
        ("/?talk=tiny@other", "tiny@other"),
        ("/?talk=nobody", "tiny@talker"),
    ):
        page = open_page(browser, server, complaints, address)
        expect(page.locator("#talk-model")).to_have_value(chosen)
        page.context.close()
    page = open_page(browser, server, complaints, "/?talk=nobody")
    expect(page.locator("#notice")).to_contain_text('"nobody" is not served here; there is tiny version 1 (champion)')
    page.context.close()


def test_talk_on_a_phone_in_the_dark(browser: Browser, server: LocalServer, complaints: list[str]) -> None:
    page = open_page(browser, server, complaints, "/?talk=talker", **PHONE)
    page.fill("#question", "w" * 200)
    page.press("#question", "Enter")  # a line more: phones' keyboards have no other key for it
    expect(page.locator(".turn")).to_have_count(0)
    page.locator("#ask").tap()
    answered(page, 2)
    expect(page.locator("#ask")).to_be_in_viewport()
    expect(page.locator(".turn .actions").last).to_be_in_viewport()
    assert_narrow_and_dark(page)
    page.context.close()
    assert complaints == []


# -- what it is made of --


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


def test_the_page_asks_nobody_else() -> None:
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        for own in ("http://www.w3.org/2000/svg", "http://${", "https?:"):
            text = text.replace(own, "")
        text = re.sub(r'href="data:image/svg.*"', "", text)
        for foreign in ("http://", "https://", "//cdn", "@import", "innerHTML", "insertAdjacentHTML", "eval("):
            assert foreign not in text, (path.name, foreign)
        assert set(re.findall(r"(?:src|href)=\"([^\"?#]+)", text)) <= {
            "/page/main.js", "/page/page.css", "/docs", "/metrics"
        }, path.name  # fmt: skip


def test_only_the_pages_own_files_are_given_out(server: LocalServer) -> None:
    for name, kind in (("main.js", "text/javascript"), ("page.css", "text/css"), ("index.html", "text/html")):
        found = CLIENT.get(f"{server.url}/page/{name}")
        assert found.headers["content-type"] == f"{kind}; charset=utf-8"
        assert "script-src 'self';" in found.headers["content-security-policy"]
        assert "unsafe" not in found.headers["content-security-policy"]
    for name in ("api.py", "..%2fapi.py", "../api.py", "none.js", "%00"):
        assert CLIENT.get(f"{server.url}/page/{name}").status_code in (404, 405), name
