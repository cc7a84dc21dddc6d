"""The end of `python -m jobs.demo`: one question to the endpoint."""

from collections.abc import Iterator

import pytest

from jobs import demo
from model.chat import CHAT_TEMPLATE
from pipeline.config import ServeConfig
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import TinyRegistry, make_registry

CONTEXT = 128


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    found = make_registry(tmp_path_factory.mktemp("registry"))
    found.add_version(seed=1, alias="champion")
    found.add_version(seed=1, context_length=256, chat_template=CHAT_TEMPLATE)
    return found


@pytest.fixture(scope="module")
def server(tiny: TinyRegistry) -> Iterator[LocalServer]:
    local = LocalServer(tiny, ServeConfig(watch_seconds=0, threads=1, weights="float32", versions=["champion", "2"]))
    yield local
    local.close()


def test_the_answer_is_streamed(server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.show_answer(server.url, "tiny", "Return a new", CONTEXT)
    assert len(capsys.readouterr().out) > len("\nReturn a new")


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["It is", " a list. It", " has no"], "It is a list."),
        (["It is", " a list. It", " ends."], "It is a list. It ends."),
        (["e.g", ".x is 3.", "5 and", " more"], "e.g.x is 3.5 and more"),
        (["Done!\n", "\nThen"], "Done!\n\n"),
        ([], ""),
    ],
)
def test_an_answer_that_was_cut_is_shown_up_to_its_last_whole_sentence(pieces: list[str], shown: str) -> None:
    assert "".join(demo.whole_sentences(pieces)) == shown


@pytest.mark.parametrize("num_tokens", [0, CONTEXT - 97, CONTEXT - 96, CONTEXT - 2])
def test_a_question_leaves_the_answer_what_room_there_is(server: LocalServer, num_tokens: int) -> None:
    question = "0" * num_tokens  # the tiny tokenizer has no token of two zeros
    assert "".join(demo.ask(server.url, "tiny", question, CONTEXT))


def test_a_question_longer_than_the_context_is_one_sentence(
    server: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not demo.show_answer(server.url, "tiny", "0" * CONTEXT, CONTEXT)
    said = capsys.readouterr().err.strip()
    assert said == (
        "error: The question was not answered: It has 128 tokens, and the model's context is 128;"
        " ask a shorter one with --question."
    )


def test_what_the_endpoint_refuses_is_said_in_its_words(server: LocalServer) -> None:
    with pytest.raises(ValueError, match="There is no model 'none' here"):
        list(demo.ask(server.url, "none", "x", CONTEXT))


def test_one_that_talks_is_asked_in_a_conversation(server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.show_answer(server.url, "tiny@2", "What is this?", 0)
    assert capsys.readouterr().out.startswith("\nWhat is this?\n")
    with pytest.raises(ValueError, match="chat template"):
        list(demo.talk(server.url, "tiny", "What is this?"))
