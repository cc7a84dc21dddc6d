"""Living with the endpoint: overload, clients that leave or read slowly, deadlines, an engine that fails."""

import asyncio
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from model.engine import Engine
from pipeline.serving import completion
from pipeline.serving.access import ApiKey
from pipeline.serving.gate import Gate
from tests.pipeline.serving.asking import CLIENT, LONG, Start, live_engine, post, slow_down, timed_post, until
from tests.pipeline.serving.local_server import LocalServer

# -- overload --


def test_a_server_takes_its_caches_memory_before_it_is_ready(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its first burst waits for it, page by page."""
    taken: list[Engine] = []
    monkeypatch.setattr(Engine, "reserve_memory", lambda engine: taken.append(engine))
    server = start()
    assert taken == [live_engine(server).engine]


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


Send = Callable[[dict[str, Any]], Any]


async def ask_as_a_server(app: Any, body: dict[str, Any], receive: Callable[[], Any], send: Send, **more: Any) -> None:
    """Call the application as a server of one's own would, to be in hand of when a client leaves."""
    content: list[bytes] = [json.dumps(body).encode()]

    async def receive_all() -> dict[str, Any]:
        return {"type": "http.request", "body": content.pop()} if content else await receive()

    headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer k")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    await app(scope | {"client": ("127.0.0.1", 1), "http_version": "1.1"} | more, receive_all, send)


@pytest.mark.parametrize("moment", ["before the first token", "while the headers are sent", "as the headers arrive"])
def test_a_client_that_leaves_before_the_first_event_holds_nothing(start: Start, moment: str) -> None:
    """The events' generator has not begun then, so nothing that it would do at its end is done."""
    server = start(keys=(ApiKey("a", hashlib.sha256(b"k").hexdigest(), 0, 1000),))
    slow_down(server, 0.02)
    allowance = server.access._tokens[hashlib.sha256(b"k").hexdigest()]

    async def ask() -> None:
        headers_sent = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if moment != "before the first token":
                await headers_sent.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            headers_sent.set()
            if moment == "as the headers arrive":
                raise OSError("the connection is closed")
            await asyncio.sleep(5)

        version = "2.4" if moment == "as the headers arrive" else "2.0"
        asked = LONG | {"stream": True, "max_tokens": 100}
        with contextlib.suppress(Exception):
            await ask_as_a_server(server.app, asked, receive, send, asgi={"version": "3.0", "spec_version": version})

    server.call(asyncio.wait_for(ask(), 20))
    assert not live_engine(server).tickets
    until(lambda: live_engine(server).stats().running == 0, seconds=3)
    assert allowance._level > 900, "what was reserved and not used is given back"
    assert 'gpt_cancelled_requests_total{replica="local"} 1.0' in server.metrics.page()


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


@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_wrong_here_is_not_counted_as_a_client_that_left(
    start: Start, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    server = start()
    monkeypatch.setattr(completion.Answer, "_take", lambda *_: {}["nothing"])
    assert post(server, LONG | {"stream": stream}).status_code == 500
    monkeypatch.undo()
    live_engine(server).engine.step = lambda: {}["nothing"]
    assert post(server, LONG | {"stream": stream}).status_code == 503
    count = 'gpt_requests_total{endpoint="/v1/completions",replica="local",status="%d"} 1.0'
    for status in (500, 503):  # an answer is counted after its last byte, which may be after the client has read it
        until(lambda status=status: count % status in server.metrics.page())
    page = server.metrics.page()
    assert "gpt_cancelled_requests_total{" not in page
    assert 'status="499"' not in page


def test_an_error_that_escapes_the_application_counts_as_500(start: Start) -> None:
    server = start()

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("nobody foresaw this")

    gate = Gate(broken, server)
    with pytest.raises(RuntimeError):
        server.call(ask_as_a_server(gate, LONG, broken, broken))  # type: ignore[arg-type]
    assert 'status="500"' in server.metrics.page()


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
