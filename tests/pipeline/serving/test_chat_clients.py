"""Clients that people use hold a conversation with a running endpoint; those that are installed (extra `clients`)."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from model.chat import CHAT_TEMPLATE
from pipeline.config import ServeConfig
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import make_registry

TURNS: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Return a new list."}]
TOKENS = 20


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    registry = make_registry(tmp_path_factory.mktemp("clients"))
    registry.add_version(seed=1, alias="champion", context_length=256, chat_template=CHAT_TEMPLATE)
    server = LocalServer(registry, ServeConfig(watch_seconds=0, threads=1, weights="float32", max_batch_size=4))
    yield f"{server.url}/v1"
    server.close()


@pytest.fixture(scope="module")
def answer(address: str) -> str:
    """What every client must give."""
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        found = client.chat.completions.create(model="tiny", messages=TURNS, max_tokens=TOKENS, seed=1)
        said = found.choices[0].message.content
    assert said
    return said


def test_openais_own_stream_gathers_the_answer(address: str, answer: str) -> None:
    with (
        openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client,
        client.chat.completions.stream(model="tiny", messages=TURNS, max_tokens=TOKENS, seed=1) as stream,
    ):
        kinds = {event.type for event in stream}
        found = stream.current_completion_snapshot
    assert {"chunk", "content.delta"} <= kinds
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (answer, "length")


def test_langchain_talks(address: str, answer: str) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    chat = langchain_openai.ChatOpenAI(
        model="tiny", base_url=address, api_key="none", max_tokens=TOKENS, seed=1, temperature=1, max_retries=0
    )
    turns = [("system", "Be brief."), ("human", "Return a new list.")]
    first = chat.invoke(turns)
    assert first.content == answer
    assert first.usage_metadata["output_tokens"] == TOKENS
    assert first.response_metadata["finish_reason"] == "length"
    pieces = list(chat.stream(turns, stream_usage=True))
    assert "".join(piece.content for piece in pieces) == answer
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == TOKENS
    assert chat.invoke([*turns, first, ("human", "More.")]).content
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(turns)
    assert len(scored.response_metadata["logprobs"]["content"]) == TOKENS


def test_litellm_talks(address: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else importing it asks the internet
    litellm = pytest.importorskip("litellm")
    ask: dict[str, Any] = {"model": "openai/tiny", "api_base": address, "api_key": "none", "messages": TURNS}
    ask |= {"max_tokens": TOKENS, "seed": 1}
    whole = litellm.completion(**ask)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (answer, "length")
    assert whole.usage.completion_tokens == TOKENS
    pieces = list(litellm.completion(**ask, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer
    with pytest.raises(litellm.BadRequestError, match="Tools are not supported"):
        litellm.completion(**ask, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])


def test_llm_talks_in_the_terminal(address: str, answer: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: tiny\n  api_base: {address}\n  api_key_name: none\n"
    )
    options = ["--key", "none", "-o", "max_tokens", str(TOKENS)]

    def ask(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *words],
            env=os.environ | {"LLM_USER_PATH": str(tmp_path), "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for how in ([], ["--no-stream"]):
        said = ask("-m", "tiny", *how, "-s", "Be brief.", "-o", "seed", "1", *options, "Return a new list.")
        assert said.removesuffix("\n") == answer
    assert ask("-c", *options, "More.")
