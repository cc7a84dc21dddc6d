"""`python -m jobs.chat`: a conversation in the terminal, without a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import chat
from model.chat import CHAT_TEMPLATE
from tests.pipeline.tiny_registry import TinyRegistry, make_registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    found = make_registry(tmp_path_factory.mktemp("registry"))
    found.add_version(seed=1, alias="champion", context_length=256, chat_template=CHAT_TEMPLATE)
    found.add_version(seed=1, alias="base")
    return found


@pytest.fixture
def settings(registry: TinyRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    preset = tmp_path / "tiny.yaml"
    preset.write_text("name: tiny\n")
    return [f"--preset={preset}", "--seed=1", "--max-tokens=8"]


class Person:
    """Types lines, then ends the input; sees the model's answers and the messages that they answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[str]] = []
        self._monkeypatch = monkeypatch

    def type(self, *lines: str) -> None:
        waiting = iter(lines)

        def read(prompt: str) -> str:
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        self._monkeypatch.setattr("builtins.input", read)


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> Person:
    return Person(monkeypatch)


def test_a_conversation_goes_on_and_can_be_asked_again(
    settings: list[str], person: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    person.type("Return a new list.", "", "/again", "/new", "Return a new list.", "/quit", "never read")
    assert chat.main([*settings, "--system", "Be brief."]) == 0
    answers = capsys.readouterr().out
    once, rest = answers[: len(answers) // 3], answers[len(answers) // 3 :]
    assert once
    assert rest == once * 2, "the same question, the same seed, the same answer"


def test_an_answer_is_stopped_with_what_it_has_said_and_a_full_context_has_a_sentence(
    person: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def answering(messages: list) -> Iterator[str]:
        seen.append([message["content"] for message in messages])
        if len(seen) == 2:
            raise ValueError("The conversation has 9 tokens, and this model's context is 8.")
        yield "One"
        if len(seen) == 1:
            raise KeyboardInterrupt

    person.type("/again", "a", "b", "c")
    chat.talk(answering, "")
    assert seen == [["a"], ["a", "One", "b"], ["a", "One", "c"]]
    assert "context is 8. /new begins another." in capsys.readouterr().out


def test_a_model_without_a_template_is_refused(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([*settings, "--version", "base"]) == 2
    assert "version 2 of tiny has no chat template" in capsys.readouterr().err


def test_a_conversation_that_fills_the_context_says_so(
    settings: list[str], person: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    person.type("word " * 300, "Return a new list.")
    assert chat.main(settings) == 0
    said = capsys.readouterr().out
    assert "and this model's context is 256. /new begins another." in said
    assert len(said.splitlines()) >= 2
