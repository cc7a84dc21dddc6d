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
    """Types lines, then ends the input; an exception among them is what the terminal raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[str] = []  # what stood in each line already
        self._monkeypatch = monkeypatch

    def type(self, *lines: str | BaseException) -> None:
        waiting = iter(lines)

        def read(prompt: str, given: str = "") -> str:
            self.given.append(given)
            line = next(waiting, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        self._monkeypatch.setattr(chat, "read_line", read)


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


class Parrot:
    """Answers with what it is asked, and notes all messages."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.fails: dict[int, BaseException] = {}  # by answer: what happens after its first piece

    def __call__(self, messages: list) -> Iterator[str]:
        self.seen.append([message["content"] for message in messages])
        number = len(self.seen)
        if isinstance(self.fails.get(number), ValueError):
            raise self.fails[number]
        yield messages[-1]["content"].upper()
        if number in self.fails:
            raise self.fails[number]
        yield "!"


@pytest.fixture
def parrot() -> Parrot:
    return Parrot()


def test_an_answer_is_stopped_with_what_it_has_said(person: Person, parrot: Parrot) -> None:
    parrot.fails[1] = KeyboardInterrupt()
    person.type("a", "b")
    chat.talk(parrot, chat.Conversation())
    assert parrot.seen == [["a"], ["a", "A", "b"]]


def test_ctrl_c_at_the_prompt_drops_the_line_and_the_end_of_input_ends(person: Person, parrot: Parrot) -> None:
    person.type("a", KeyboardInterrupt(), "b", EOFError(), "never read")
    chat.talk(parrot, chat.Conversation())
    assert parrot.seen == [["a"], ["a", "A!", "b"]]


def test_a_full_context_has_a_sentence_and_a_way_on(
    person: Person, parrot: Parrot, capsys: pytest.CaptureFixture[str]
) -> None:
    parrot.fails[3] = ValueError("The conversation has 9 tokens, and this model's context is 8.")
    person.type("a", "b", "c", "/forget", "/again")
    chat.talk(parrot, chat.Conversation("S"))
    assert parrot.seen[2:] == [["S", "a", "A!", "b", "B!", "c"], ["S", "b", "B!", "c"]]
    assert "context is 8. /forget drops the first question" in capsys.readouterr().out


def test_questions_are_edited_in_their_line_and_what_followed_is_dropped(person: Person, parrot: Parrot) -> None:
    person.type(
        "a", "b", "/edit", "c", "/edit 1", "d", "/edit 9", "/edit x", "/edit 1", "", "/edit", KeyboardInterrupt()
    )
    chat.talk(parrot, chat.Conversation())
    assert parrot.seen[2:] == [["a", "A!", "c"], ["d"]]
    assert [given for given in person.given if given] == ["b", "a", "d", "d"]


def test_the_system_prompt_can_be_changed_and_all_be_shown(
    person: Person, parrot: Parrot, capsys: pytest.CaptureFixture[str]
) -> None:
    person.type(
        "/system", "/again", "/system Be brief.", "a", "/show", "/new", "/show", "b", "/nonsense", "/etc/hosts is?"
    )
    chat.talk(parrot, chat.Conversation())
    assert parrot.seen == [["Be brief.", "a"], ["Be brief.", "b"], ["Be brief.", "b", "B!", "/etc/hosts is?"]]
    assert capsys.readouterr().out.splitlines() == [
        "No system prompt is set.",
        "Nothing was asked yet.",
        "Be brief.",
        "A!",
        "system: Be brief.",
        "1> a",
        "A!",
        "system: Be brief.",
        "B!",
        "There is no command /nonsense; /help names those that there are.",
        "/ETC/HOSTS IS?!",
        "",
    ]


def test_every_command_is_explained(person: Person, parrot: Parrot, capsys: pytest.CaptureFixture[str]) -> None:
    person.type("/help", "/quit", "never read")
    chat.talk(parrot, chat.Conversation())
    said = capsys.readouterr().out
    for command in ("/again", "/edit", "/system", "/show", "/forget", "/new", "/help", "/quit"):
        assert f"\n    {command} " in f"\n{said}"
    assert parrot.seen == []


def test_a_conversation_goes_on_where_it_was_kept(
    person: Person, parrot: Parrot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    person.type("naïve?")
    chat.talk(parrot, chat.Conversation("S", file))
    person.type("b")
    chat.talk(parrot, chat.Conversation("", file))
    assert parrot.seen[-1] == ["S", "naïve?", "NAÏVE?!", "b"]
    for broken in ("{", "[]", '{"messages": [1]}', '{"messages": 5}'):
        file.write_text(broken)
        assert chat.main(["--keep", str(file)]) == 2
        assert "talk.json holds no conversation" in capsys.readouterr().err


def test_a_model_without_a_template_is_refused(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([*settings, "--version", "base"]) == 2
    assert "version 2 of tiny has no chat template" in capsys.readouterr().err


def test_a_conversation_that_fills_the_context_says_so(
    settings: list[str], person: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    person.type("word " * 300, "/new", "Return a new list.")
    assert chat.main(settings) == 0
    said = capsys.readouterr().out
    assert "and this model's context is 256. /forget drops the first question" in said
    assert len(said.splitlines()) >= 2
