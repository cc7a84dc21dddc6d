"""Living with the endpoint: overload, clients that leave or read slowly, deadlines, keys, versions that change."""

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pipeline.config import ServeConfig
from pipeline.serving.access import Allowance, ApiKey, is_local_name, read_keys
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import TinyRegistry, make_registry

Start = Callable[..., LocalServer]
LONG = {"prompt": "Return", "max_tokens": 120, "logit_bias": {"399": -100}}  # 399 would end the text


@pytest.fixture
def start(tiny_registry: TinyRegistry) -> Iterator[Start]:
    """Start servers with settings of a test's own."""
    servers: list[LocalServer] = []

    def begin(registry: TinyRegistry = tiny_registry, keys: tuple[ApiKey, ...] = (), **settings: Any) -> LocalServer:
        defaults: dict[str, Any] = {"watch_seconds": 0, "threads": 1, "weights": "float32", "max_batch_size": 4}
        servers.append(LocalServer(registry, ServeConfig(**defaults | settings), keys))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


# One for all: making a client reads the certificates of the web, which takes longer than most requests here.
CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def post(server: LocalServer, body: dict[str, Any], **more: Any) -> httpx.Response:
    return CLIENT.post(f"{server.url}/v1/completions", json=body, **more)


def timed_post(server: LocalServer, body: dict[str, Any]) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    return post(server, body), time.monotonic() - began


def live_engine(server: LocalServer) -> Any:
    return server.models.versions[0].backend


def slow_down(server: LocalServer, seconds: float) -> None:
    """Make every step of the engine take longer: a big model, as far as the API can tell."""
    engine = live_engine(server).engine
    step = engine.step

    def slow_step() -> Any:
        time.sleep(seconds)
        return step()

    engine.step = slow_step


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "It did not happen in time."
        time.sleep(0.005)


# -- overload --


def test_full_queue_answers_429_at_once(start: Start) -> None:
    server = start(max_batch_size=2, max_queue=2)
    slow_down(server, 0.02)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: timed_post(server, LONG), range(12)))
    accepted = [answer for answer, _ in answers if answer.status_code == 200]
    refused = [(answer, seconds) for answer, seconds in answers if answer.status_code == 429]
    assert len(accepted) == 4
    assert len(accepted) + len(refused) == 12
    for answer, seconds in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert seconds < 2
    assert all(answer.json()["usage"]["completion_tokens"] == 120 for answer in accepted)


def test_twice_the_load_finishes_what_it_accepts(start: Start) -> None:
    """Requests come twice as fast as they can be served; each is answered in time or told to come back."""
    server = start(max_batch_size=4, max_queue=64, deadline_seconds=3.0)
    slow_down(server, 0.005)
    body = LONG | {"max_tokens": 60}
    with ThreadPoolExecutor(4) as pool:
        began = time.monotonic()
        list(pool.map(lambda _: post(server, body), range(8)))
        per_second = 8 / (time.monotonic() - began)
    results: list[tuple[int, float]] = []

    def ask() -> None:
        answer, seconds = timed_post(server, body)
        results.append((answer.status_code, seconds))

    threads = []
    for _ in range(int(per_second * 2 * 5)):
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        time.sleep(1 / (2 * per_second))
    for thread in threads:
        thread.join(30)
    assert len(results) == len(threads)
    statuses = [status for status, _ in results]
    assert set(statuses) <= {200, 429}, sorted(statuses)
    assert statuses.count(200) >= 0.3 * len(statuses)
    assert max(seconds for status, seconds in results if status == 200) < 3.5


def test_deadline_ends_a_request_with_an_error(start: Start) -> None:
    server = start(deadline_seconds=0.5)
    slow_down(server, 0.05)
    answer = post(server, LONG)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="deadline"),
    ):
        list(client.completions.create(model="tiny", stream=True, **LONG))  # type: ignore[call-overload]
    assert live_engine(server).engine.stats()["running"] == 0


# -- clients that leave, or read slowly --


def open_stream(server: LocalServer, body: dict[str, Any]) -> socket.socket:
    """Send a streaming request by hand, and read only the first bytes of its answer."""
    content = json.dumps(body | {"stream": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    assert b"200" in connection.recv(64)
    return connection


def test_leaving_frees_the_place_within_a_step(start: Start) -> None:
    server = start()
    slow_down(server, 0.05)
    live = live_engine(server)
    connection = open_stream(server, LONG)
    until(lambda: live.stats().running == 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    until(lambda: not live.tickets)
    steps = live.steps
    until(lambda: live.stats().running == 0)
    assert live.steps - steps <= 2


def test_leaving_a_whole_answer_too(start: Start) -> None:
    server = start()
    slow_down(server, 0.05)
    with pytest.raises(httpx.ReadTimeout):
        post(server, LONG, timeout=0.4)
    until(lambda: live_engine(server).stats().running == 0, seconds=3)


def test_slow_reader_holds_nobody_up(start: Start) -> None:
    server = start()
    sleepers = [open_stream(server, LONG | {"logprobs": 20}) for _ in range(3)]
    began = time.monotonic()
    assert post(server, LONG).json()["usage"]["completion_tokens"] == 120
    assert time.monotonic() - began < 10
    until(lambda: live_engine(server).stats().running == 0)  # their tokens are made, whoever reads them
    for connection in sleepers:
        connection.close()


def test_tokens_are_gathered_per_write_under_load(start: Start) -> None:
    server = start(max_batch_size=8)
    slow_down(server, 0.002)

    def events(_: int) -> int:
        with CLIENT.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}) as answer:
            return sum(line.startswith("data: {") for line in answer.iter_lines())

    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(events, range(8)))
    assert max(counts) < 110  # of 120 tokens


# -- an engine that fails --


def test_dead_engine_fails_requests_clearly(start: Start) -> None:
    server = start()
    live = live_engine(server)
    slow_down(server, 0.01)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(post, server, LONG) for _ in range(3)]
        until(lambda: live.stats().running == 3)

        def broken_step() -> Any:
            raise RuntimeError("out of memory")

        live.engine.step = broken_step
        for answer in answers:
            assert answer.result().status_code == 503
            assert "out of memory" in answer.result().json()["error"]["message"]
    assert post(server, LONG).status_code == 503
    assert CLIENT.get(f"{server.url}/readyz").status_code == 503
    assert CLIENT.get(f"{server.url}/healthz").status_code == 200
    with pytest.raises(Exception, match="out of memory"):
        server.models.check()


# -- versions that change --


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    """A registry with two good versions, and a third whose figures are not those of its weights."""
    registry = make_registry(tmp_path_factory.mktemp("moving"))
    registry.add_version(seed=1, alias="champion")
    registry.add_version(seed=2)
    registry.add_version(seed=3, probe_shift=1.0)
    return registry


def test_champion_moves_under_load_and_drops_nothing(start: Start, moving: TinyRegistry) -> None:
    moving.move_alias("star", "1")
    server = start(moving, versions=["star"], watch_seconds=0.2)
    slow_down(server, 0.005)
    answers: list[httpx.Response] = []
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            answers.append(post(server, LONG | {"seed": 1}))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(answers) > 2)
        moving.move_alias("star", "2")
        until(lambda: answers[-1].headers.get("x-model-version") == "2", seconds=30)
    finally:
        ends.set()
        for thread in threads:
            thread.join(20)
    assert {answer.status_code for answer in answers} == {200}
    texts = {(each.headers["x-model-version"], each.json()["choices"][0]["text"]) for each in answers}
    assert sorted(version for version, _ in texts) == ["1", "2"]  # each version has one answer to one seed
    assert len(server.models.versions) == 1


def test_version_that_fails_its_probe_does_not_take_over(start: Start, moving: TinyRegistry) -> None:
    moving.move_alias("star", "1")
    server = start(moving, versions=["star"])
    seat = server.models._seats["star"]
    moving.move_alias("star", "3")
    server.call(server.models.follow(seat))
    assert post(server, {"prompt": "x"}).headers["x-model-version"] == "1"
    listed = CLIENT.get(f"{server.url}/v1/models").json()["data"]
    assert "Version 3 did not take over" in listed[0]["last_swap_error"]
    assert "the registry says" in listed[0]["last_swap_error"]
    moving.move_alias("star", "2")
    server.call(server.models.follow(seat))
    assert post(server, {"prompt": "x"}).headers["x-model-version"] == "2"
    assert CLIENT.get(f"{server.url}/v1/models").json()["data"][0]["last_swap_error"] is None


def test_no_such_version_is_one_sentence(start: Start, tiny_registry: TinyRegistry) -> None:
    with pytest.raises(ValueError, match="has no version '77'; its versions are"):
        start(versions=["77"])
    with pytest.raises(ValueError, match="has no alias 'nobody'"):
        start(versions=["nobody"])


# -- keys --


def test_keys_from_environment_and_file(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{name: alice, sha256: {digest}, requests_per_minute: 5}}\n")
    keys = read_keys({"SERVE_API_KEYS": "one, two", "SERVE_API_KEYS_FILE": str(file)})
    assert [key.name for key in keys] == ["key-1", "key-2", "alice"]
    assert keys[2] == ApiKey("alice", digest, 5, 0)
    assert "one" not in repr(keys)
    assert read_keys({}) == ()
    for content, says in [
        ("{", "YAML"),
        ("[]", "at least one"),
        ("- {name: a}", "sha256"),
        ("- {name: a, sha256: x}", "64"),
    ]:
        file.write_text(content)
        with pytest.raises(ValueError, match=says):
            read_keys({"SERVE_API_KEYS_FILE": str(file)})


def test_keys_decide_who_may_ask(start: Start) -> None:
    keys = (ApiKey("a", hashlib.sha256(b"first").hexdigest()), ApiKey("b", hashlib.sha256(b"second").hexdigest(), 2))
    server = start(keys=keys)
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first"}):
        answer = post(server, {"prompt": "x"}, headers=header)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    broken = CLIENT.post(f"{server.url}/v1/completions", content=b"{")
    assert broken.status_code == 401  # nothing is parsed for a stranger
    assert post(server, {"prompt": "x"}, headers={"Authorization": "Bearer first"}).status_code == 200
    statuses = [post(server, {"prompt": "x"}, headers={"Authorization": "Bearer second"}) for _ in range(3)]
    assert [answer.status_code for answer in statuses] == [200, 200, 429]
    assert int(statuses[2].headers["retry-after"]) >= 1
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    assert CLIENT.get(f"{server.url}/readyz").status_code == 200


def test_tokens_per_minute_count_what_was_used(start: Start) -> None:
    server = start(keys=(ApiKey("a", hashlib.sha256(b"k").hexdigest(), 0, 100),))
    header = {"Authorization": "Bearer k"}
    assert post(server, LONG | {"max_tokens": 90}, headers=header).status_code == 200
    refused = post(server, LONG | {"max_tokens": 90}, headers=header)
    assert refused.status_code == 429
    assert "tokens per minute" in refused.json()["error"]["message"]


def test_allowance_fills_again() -> None:
    allowance = Allowance(600)
    allowance.take(600)
    assert 0.05 < allowance.seconds_until(1) <= 0.1
    time.sleep(0.11)
    assert allowance.seconds_until(1) == 0
    assert Allowance(0).seconds_until(1e9) == 0


def test_names_of_this_machine() -> None:
    assert all(map(is_local_name, ["localhost", "localhost:80", "127.0.0.1:1", "[::1]:80", None]))
    assert not any(map(is_local_name, ["evil.example", "localhost.evil.example:80", "10.0.0.1", "127.evil"]))


def test_many_streams_at_once(start: Start) -> None:
    """Fifty clients on one event loop, more than the batch holds: all are answered, each with its own text."""
    server = start(max_batch_size=4, max_queue=64)

    async def ask(client: httpx.AsyncClient, seed: int) -> str:
        answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 8, "seed": seed})
        assert answer.status_code == 200
        return str(answer.json()["choices"][0]["text"])

    async def ask_all() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            return list(await asyncio.gather(*(ask(client, index % 5) for index in range(50))))

    texts = asyncio.run(ask_all())
    assert [texts[index] == texts[index % 5] for index in range(50)] == [True] * 50
