"""Chat completions over a real engine and a tiny model: conversations in, messages out, and sentences for the rest."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from model.chat import CHAT_TEMPLATE, OwnTemplate, encode
from pipeline.config import ServeConfig
from pipeline.serving.chat import ChatRequest
from tests.pipeline.serving.asking import Start, live_engine
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import make_registry, tiny_tokenizer

CONTEXT = 256
ASKED: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Return a new list."},
]
UPPER = (
    "{% for m in messages %}[{{ m.role | upper }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    registry = make_registry(tmp_path_factory.mktemp("chat"))
    registry.add_version(seed=1, alias="champion", context_length=CONTEXT, chat_template=CHAT_TEMPLATE)
    registry.add_version(seed=1, context_length=CONTEXT)
    registry.add_version(seed=1, context_length=CONTEXT, chat_template=UPPER)
    registry.add_version(
        seed=1,
        context_length=CONTEXT,
        chat_template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    )
    versions = ["champion", "1", "2", "3", "4"]
    settings = ServeConfig(watch_seconds=0, threads=1, max_batch_size=8, weights="float32", versions=versions)
    local = LocalServer(registry, settings)
    yield local
    local.close()


def prompt_of(messages: list[dict[str, str]]) -> list[int]:
    return encode(tiny_tokenizer(), OwnTemplate().render(messages, ask=True))[0].tolist()


def test_an_answer_is_what_completions_give_for_the_rendered_prompt(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ASKED, max_completion_tokens=12, seed=3)  # type: ignore[arg-type]
    prompt = prompt_of(ASKED)
    expected = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, seed=3)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.choices[0].text
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)


def test_a_stream_is_the_same_message_in_pieces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_completion_tokens": 40, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [choice.delta.role for choice in mine] == ["assistant", *[None] * (len(mine) - 1)]
        assert "".join(choice.delta.content or "" for choice in mine) == whole.choices[index].message.content
        assert [choice.finish_reason for choice in mine] == [*[None] * (len(mine) - 1), "length"]


def test_content_may_come_in_parts_and_developers_are_systems(client: openai.OpenAI) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Return a new list."}], "name": "Ada"},
    ]
    answers = [
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, temperature=0)  # type: ignore[arg-type]
        for messages in (ASKED, parts)
    ]
    assert answers[0].choices == answers[1].choices


def test_an_answer_can_be_sent_back_as_clients_do(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=5, seed=1)  # type: ignore[arg-type]
    said: Any = first.choices[0].message
    turns = [*ASKED, said, {"role": "user", "content": "More."}]
    second = client.chat.completions.create(model="tiny", messages=turns, max_tokens=5, seed=1)
    plain = [*ASKED, {"role": "assistant", "content": said.content}, turns[-1]]
    assert second.usage is not None
    assert second.usage.prompt_tokens == len(prompt_of(plain))


def test_an_answer_ends_with_the_end_of_text_or_at_a_stop(client: openai.OpenAI) -> None:
    end = tiny_tokenizer().end_of_text
    ask: dict[str, Any] = {"model": "tiny", "messages": ASKED, "seed": 2}
    ended = client.chat.completions.create(**ask, logit_bias={str(end): 100})
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")
    free = client.chat.completions.create(**ask, max_tokens=30).choices[0].message.content
    assert free
    stopped = client.chat.completions.create(**ask, max_tokens=30, stop=[free[4:6]]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (free[: free.index(free[4:6])], "stop")


def test_where_another_turn_begins_an_answer_ends() -> None:
    asked = ChatRequest.model_validate({"messages": ASKED, "stop": "x"})
    assert asked.as_completion([1], 5, OwnTemplate().stops).stop == ["x", "<|chat|>"]


def test_without_a_bound_an_answer_may_fill_the_context(client: openai.OpenAI) -> None:
    never_end = {str(tiny_tokenizer().end_of_text): -100}
    for asked in (None, 10_000):
        answer = client.chat.completions.create(
            model="tiny",
            messages=ASKED,
            max_completion_tokens=asked,
            logit_bias=never_end,
            seed=1,  # type: ignore[arg-type]
        )
        assert answer.usage is not None
        if answer.choices[0].finish_reason == "length":
            assert answer.usage.total_tokens == CONTEXT


def test_logprobs_have_chats_shape(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 6, "seed": 4, "logprobs": True}
    choice = client.chat.completions.create(**ask, top_logprobs=3).choices[0]
    plain = client.completions.create(model="tiny", prompt=prompt_of(ASKED), max_tokens=6, seed=4, logprobs=3)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    expected = plain.choices[0].logprobs
    assert expected is not None
    assert [each.token for each in choice.logprobs.content] == expected.tokens
    assert [each.logprob for each in choice.logprobs.content] == expected.token_logprobs
    assert (
        b"".join(bytes(each.bytes or []) for each in choice.logprobs.content).decode("utf-8", "replace")
        == choice.message.content
    )
    for each in choice.logprobs.content:
        assert len(each.top_logprobs) == 3
        assert each.top_logprobs[0].logprob >= each.logprob - 1e-6
    streamed = [
        entry
        for chunk in client.chat.completions.create(**ask, stream=True)
        for piece in chunk.choices
        for entry in (piece.logprobs.content or [] if piece.logprobs else [])
    ]
    assert [each.logprob for each in streamed] == expected.token_logprobs
    assert all(each.top_logprobs == [] for each in streamed)


def test_a_foreign_template_is_rendered_too(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny@3", messages=ASKED, max_tokens=5, seed=1)  # type: ignore[arg-type]
    text = "[SYSTEM]Be brief.[USER]Return a new list.[A]"
    expected = client.completions.create(model="tiny@3", prompt=text, max_tokens=5, seed=1)
    assert answer.choices[0].message.content == expected.choices[0].text


def test_a_template_without_end_is_stopped_and_holds_up_nobody(http: httpx.Client) -> None:
    began = time.monotonic()
    refused = http.post("/v1/chat/completions", json={"model": "tiny@4", "messages": ASKED})
    assert refused.status_code == 400
    assert "did not end within 2 s" in refused.json()["error"]["message"]
    assert time.monotonic() - began < 25


def test_a_model_without_a_template_says_how_to_get_one(http: httpx.Client) -> None:
    refused = http.post("/v1/chat/completions", json={"model": "tiny@2", "messages": ASKED})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "no_chat_template"
    assert "source.kind=conversations" in error["message"]


USER = ASKED[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": "Hi"}, "at least one message"),
        ({"messages": [USER] * 2049}, "at most 2,048 messages"),
        ({"messages": ["Hi"]}, "messages[0] must be an object"),
        ({"messages": [USER, {"role": "critic", "content": ""}]}, "messages[1] has the role 'critic'"),
        ({"messages": [USER, {"role": "tool", "content": "7", "tool_call_id": "a"}]}, "Tools are not supported"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "Tools are not supported"),
        ({"messages": [{"role": "user"}]}, "messages[0] needs a content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "images are not supported",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "audio is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "without a text"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "parts of type 'None' are not supported"),
        ({"messages": [USER | {"colour": "red"}]}, "there is no field 'colour'"),
        ({"messages": [USER, ASKED[0]]}, "can only be the first"),
        ({"messages": [USER | {"content": "word " * 500}]}, "leave out its first turns"),
        ({"messages": [USER | {"content": "w" * 500_000}]}, "leave out its first turns"),
        ({"tools": [{"type": "function"}]}, "Tools are not supported"),
        ({"functions": [{}]}, "Tools are not supported"),
        ({"tool_choice": "required"}, "Tools are not supported"),
        ({"modalities": ["text", "audio"]}, "modalities are not supported"),
        ({"audio": {"voice": "ash"}}, "audio is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format can only be text"),
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs=true"),
        ({"stream_options": {"include_usage": True}}, "only for stream=true"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"prompt": "Hi"}, "There is no field 'prompt'"),
        ({"model": "another"}, "There is no model 'another'"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_sentence(
    http: httpx.Client, changes: dict[str, Any], sentence: str
) -> None:
    refused = http.post("/v1/chat/completions", json={"messages": [USER]} | changes)
    assert refused.status_code in (400, 404)
    error = refused.json()["error"]
    assert sentence in error["message"]
    assert error["param"]


def test_half_a_character_is_refused(http: httpx.Client) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "\ud800"}]})
    refused = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert "half of a surrogate pair" in refused.json()["error"]["message"]


def test_usage_names_what_was_not_read_again(start: Start) -> None:
    server = start(prefill_chunk_tokens=8)
    url = server.url
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        ask: dict[str, Any] = {"model": "tiny", "prompt": "Return a new list of the sorted items. " * 2, "seed": 1}
        first, again = (client.completions.create(**ask, max_tokens=9) for _ in range(2))
    assert first.choices == again.choices
    assert first.usage is not None
    assert again.usage is not None
    assert first.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details is not None
    most = first.usage.prompt_tokens - 1  # the last token runs for its logits
    by_token = live_engine(server).engine.runner.has_independent_rows
    assert again.usage.prompt_tokens_details.cached_tokens == (most if by_token else most // 8 * 8)


def test_fields_without_a_meaning_here_are_taken(http: httpx.Client) -> None:
    body = {
        "messages": [USER], "max_tokens": 2, "user": "ada", "metadata": {"a": "b"}, "store": False, "tools": [],
        "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "service_tier": "auto",
        "parallel_tool_calls": True, "safety_identifier": "x", "prompt_cache_key": "y", "logprobs": False,
    }  # fmt: skip
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


def test_the_template_came_with_the_checkpoint(server: LocalServer, http: httpx.Client) -> None:
    assert [model["chat"] for model in http.get("/v1/models").json()["data"]] == [True, True, True, False, True, True]
    loaded = [each.loaded.chat_template for each in server.models.versions]
    assert [None if each is None else type(each).__name__ for each in loaded] == [
        "OwnTemplate", None, "ForeignTemplate", "ForeignTemplate",
    ]  # fmt: skip
