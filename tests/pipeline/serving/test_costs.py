"""What a refused request may cost: its work is bounded before it is done, so that nobody else waits for it."""

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from model.chat import CHAT_TEMPLATE
from pipeline.config import ServeConfig
from pipeline.serving.gate import CHARACTER_COST, COSTS, MOST_COST, JsonCost
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import make_registry

LONGEST_HOLD_SECONDS = 0.05
LIMIT = ServeConfig().max_body_bytes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    registry = make_registry(tmp_path_factory.mktemp("registry"))
    registry.add_version(seed=1, alias="champion", chat_template=CHAT_TEMPLATE)
    local = LocalServer(registry, ServeConfig(watch_seconds=0, threads=1, weights="float32", max_batch_size=8))
    yield local
    local.close()


class Holds:
    """The longest time that one callback kept the server's event loop."""

    def __init__(self) -> None:
        self.longest = 0.0


@contextmanager
def watching(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Holds]:
    """Measure the processor time of each callback: what other processes do on this machine does not count."""
    holds = Holds()
    run = asyncio.Handle._run

    def timed_run(handle: asyncio.Handle) -> None:
        if threading.current_thread() is not server._thread:
            run(handle)
            return
        began = time.thread_time()
        run(handle)
        holds.longest = max(holds.longest, time.thread_time() - began)

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", timed_run)
        yield holds


def cost_of(text: str) -> int:
    cost = JsonCost()
    cost.feed(text.encode())
    return cost.nanoseconds


def filled(head: str, unit: str, tail: str, *, passes: bool) -> str:
    """A body of one unit again and again: as many as the limit takes, or only as many as the gate lets pass."""
    times = (LIMIT - len(head) - len(tail)) // len(unit)
    if passes:
        times = min(times, (MOST_COST - cost_of(head + tail)) // max(1, cost_of(unit)))
    return head + unit * times + tail


UNITS = {
    "negative numbers": ('{"prompt":[', "-1,", "-1]}"),
    "numbers, the last one negative": ('{"prompt":[', "1,", "-1]}"),
    "floats": ('{"prompt":[', "1.5,", "1.5]}"),
    "long floats": ('{"prompt":[', "1.12345678901e-300,", "1]}"),
    "huge numbers": ('{"prompt":[', "9" * 4300 + ",", "1]}"),
    "texts": ('{"prompt":[', '"a",', '"a"]}'),
    "texts and numbers": ('{"prompt":[', '"a",1,', "1]}"),
    "lists": ('{"prompt":[', "[],", "[]]}"),
    "lists of one": ('{"prompt":[', "[1],", "[1]]}"),
    "lists of texts": ('{"prompt":[', '["a"],', "[1]]}"),
    "objects": ('{"prompt":[', "{},", "{}]}"),
    "nothing": ('{"prompt":[', "null,", "null]}"),
    "depth": ("", "[", ""),
    "fields of one name": ("{", '"a":1,', '"b":1}'),
    "biases": ('{"logit_bias":{', '"7":1,', '"x":1}}'),
    "stops": ('{"stop":[', '"a",', '"a"]}'),
    "stop ids": ('{"stop_token_ids":[', "1,", "1]}"),
    "one long text": ('{"prompt":"', "word, ", '"}'),
    "one long text of quotes": ('{"prompt":"', '\\",', '"}'),
    "one long text of escapes": ('{"prompt":"', "\\u00e9", '"}'),
    "a long stop": ('{"stop":"', "word, ", '"}'),
    "a long name": ('{"model":"', "word, ", '"}'),
    "many fields": ("{", "".join(f'"f{number}":1,' for number in range(10_000)), '"g":1}'),
    "fragments": ('{"prompt":', '"a":,', "}"),
}


@pytest.mark.parametrize("unit", UNITS)
def test_no_refused_body_holds_the_loop(server: LocalServer, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    refused_quickly(server, monkeypatch, filled(*UNITS[unit], passes=True))


@pytest.mark.parametrize("unit", ["negative numbers", "texts", "lists", "huge numbers", "one long text of quotes"])
def test_nor_one_as_large_as_a_body_may_be(server: LocalServer, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    body = filled(*UNITS[unit], passes=False)
    assert LIMIT - 5000 < len(body) <= LIMIT
    refused_quickly(server, monkeypatch, body)


EACH_PROMPT = {
    "200,000 prompts": {"prompt": ["a"] * 200_000},
    "129 prompts": {"prompt": ["a" * 9_999] * 129},
    "long prompts": {"prompt": ["a bc" * 2_500] * 128},
    "long prompts without spaces": {"prompt": ["a" * 9_999] * 128},
    "the last prompt too long": {"prompt": ["a b " * 16] * 127 + ["a b " * 1000]},
    "a bias for many prompts": {
        "prompt": [[1]] * 127 + [[400]],
        "logit_bias": {str(number): 1.5 for number in range(400)},
    },
    "more sequences than fit": {"prompt": ["a b " * 8] * 128, "n": 16, "max_tokens": 64},
    "a bad setting beside them": {"prompt": ["a b " * 500] * 128, "n": 3, "best_of": 2},
    "no such model": {"prompt": ["a b " * 500] * 128, "model": "none"},
}


@pytest.mark.parametrize("name", EACH_PROMPT)
def test_no_refused_request_holds_the_loop(server: LocalServer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    refused_quickly(server, monkeypatch, json.dumps(EACH_PROMPT[name]))


@pytest.mark.parametrize("path", ["tokenize", "detokenize"])
@pytest.mark.parametrize("unit", ["negative numbers", "lists", "many fields", "texts"])
def test_nor_one_of_the_other_endpoints(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, path: str, unit: str
) -> None:
    head, repeated, tail = UNITS[unit]
    body = filled(head.replace("prompt", "tokens"), repeated, tail, passes=True)
    refused_quickly(server, monkeypatch, body, path)


def test_nor_vllms_form_of_them(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    head, repeated, tail = UNITS["negative numbers"]
    refused_quickly(server, monkeypatch, filled(head, repeated, tail, passes=True), "../tokenize")
    refused_quickly(server, monkeypatch, filled(*CHATS["turns"], passes=True), "../tokenize")


CHATS = {
    "texts": ('{"messages":[', '"a",', '"a"]}'),
    "empty messages": ('{"messages":[', "{},", "{}]}"),
    "turns": ('{"messages":[', '{"role":"user","content":"a"},', '{"role":"x"}]}'),
    "turns of parts": ('{"messages":[', '{"role":"user","content":[{"type":"text","text":"a"}]},', "1]}"),
    "one turn of parts": ('{"messages":[{"role":"user","content":[', '{"type":"text","text":"a"},', "1]}]}"),
    "one long turn": ('{"messages":[{"role":"user","content":"', "word, ", '"}]}'),
    "tools": ('{"messages":[{"role":"user","content":"a"}],"tools":[', '{"type":"function"},', "1]}"),
    "formats": ('{"messages":[{"role":"user","content":"a"}],"response_format":[', "1,", "1]}"),
}


@pytest.mark.parametrize("unit", CHATS)
def test_nor_a_conversation(server: LocalServer, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    refused_quickly(server, monkeypatch, filled(*CHATS[unit], passes=True), "chat/completions")


def test_nor_as_many_turns_as_there_may_be(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": role, "content": "a word"} for role in ("user", "assistant") * 1023]
    body = json.dumps({"messages": [*turns, {"role": "user", "content": "a"}]})
    refused_quickly(server, monkeypatch, body, "chat/completions")


def refused_quickly(server: LocalServer, monkeypatch: pytest.MonkeyPatch, body: str, path: str = "completions") -> None:
    with watching(server, monkeypatch) as holds:
        answer = httpx.post(
            f"{server.url}/v1/{path}", content=body, headers={"Content-Type": "application/json"}, timeout=60
        )
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["message"].endswith(".")
    assert len(answer.text) < 1000
    assert holds.longest < LONGEST_HOLD_SECONDS, f"{holds.longest * 1000:.0f} ms"


def test_the_measure_sees_a_held_loop(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hold() -> None:
        ends = time.thread_time() + 2 * LONGEST_HOLD_SECONDS
        while time.thread_time() < ends:
            pass

    with watching(server, monkeypatch) as holds:
        server.call(hold())
    assert holds.longest > LONGEST_HOLD_SECONDS


def reference_cost(body: bytes) -> int:
    """The same sum, one byte at a time."""
    total, in_string, escaped = 0, False, False
    for byte in body:
        character = bytes([byte])
        if in_string:
            if escaped:
                escaped = False
            elif character == b"\\":
                escaped = True
            elif character == b'"':
                in_string = False
        elif character == b'"':
            in_string = True
        else:
            total += CHARACTER_COST + COSTS.get(character, 0)
    return total


def test_the_cost_is_the_same_however_a_body_arrives() -> None:
    chance = random.Random(1)
    for _ in range(300):
        value: Any = ["".join(chance.choices('a\\",[{:.é', k=chance.randrange(8))) for _ in range(chance.randrange(6))]
        body = json.dumps({"a": value, "b": [1.5, {"c": None}]}, ensure_ascii=chance.random() < 0.5).encode()
        cuts = sorted(chance.randrange(len(body)) for _ in range(chance.randrange(6)))
        cost = JsonCost()
        for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
            cost.feed(body[start:end])
        assert cost.nanoseconds == reference_cost(body), body


def test_text_and_token_ids_of_any_use_cost_less_than_the_limit() -> None:
    for body in (
        {"prompt": 'Grüße, \\ "quoted", [1, 2], {a: b}. ' * 100_000},
        {"prompt": [[50_000] * 1000] * 128},
        {"prompt": [1] * 100_000, "logit_bias": {str(number): 1.5 for number in range(1024)}},
    ):
        assert cost_of(json.dumps(body)) < MOST_COST
