"""The API against everything: what its own description generates, and ten thousand broken requests."""

import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from pipeline.config import ServeConfig
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import TinyRegistry


@pytest.fixture(scope="module")
def server(tiny_registry: TinyRegistry) -> Iterator[LocalServer]:
    local = LocalServer(tiny_registry, ServeConfig(watch_seconds=0, threads=1, weights="float32", max_batch_size=8))
    yield local
    local.close()


def test_no_request_from_the_schema_breaks_the_server(server: LocalServer) -> None:
    """What schemathesis makes of the OpenAPI description, right and wrong, for every operation."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [each.ok() for each in schema.get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            send_all(operation, mode)


def send_all(operation: Any, mode: Any) -> None:
    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        answer = case.call()
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            error = json.loads(answer.text)["error"]
            assert error["message"]
            assert error.keys() == {"message", "type", "param", "code"}

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters has nothing that could be wrong
        send()


STRANGE: list[Any] = [
    None, True, 0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 0.5, -0.0, 1e308, "", "x", "\0", "\ud800", "é" * 50, "🌍",
    [], [0], [399], [400], [-1], [[]], [[1, 2], [3]], [[[1]]], ["a", "b"], ["a", 1], {}, {"1": 1}, {"a": "b"},
]  # fmt: skip
FIELDS = [
    "model", "prompt", "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n",
    "presence_penalty", "seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user", "top_k",
    "min_p", "typical_p", "repetition_penalty", "stop_token_ids", "num_beams", "prompt_lookup_tokens",
    "truncate_prompt_tokens", "unknown",
]  # fmt: skip


def strange_body(chance: random.Random) -> bytes:
    """A body that is sometimes right, mostly wrong, and sometimes not even JSON."""
    body = {"prompt": "a", "max_tokens": 2} | {
        chance.choice(FIELDS): chance.choice(STRANGE) for _ in range(chance.randint(0, 3))
    }
    content = json.dumps(body).encode()
    mischief = chance.random()
    if mischief < 0.1:
        content = content[: chance.randrange(len(content))]
    elif mischief < 0.2:
        broken = bytearray(content)
        broken[chance.randrange(len(broken))] = chance.randrange(256)
        content = bytes(broken)
    return content


def fuzz(server: LocalServer, requests: int, seed: int) -> dict[int, int]:
    chance = random.Random(seed)
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(requests):
            path = chance.choice(["/v1/completions"] * 6 + ["/v1/tokenize", "/v1/detokenize", "/tokenize"])
            kind = chance.choice(["application/json"] * 9 + ["text/plain"])
            answer = client.post(path, content=strange_body(chance), headers={"Content-Type": kind})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]
    return statuses


def test_broken_requests_are_refused(server: LocalServer) -> None:
    statuses = fuzz(server, 500, seed=1)
    assert statuses[200] > 10
    assert statuses[400] > 100


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_broken_requests_leave_memory_flat(server: LocalServer) -> None:
    fuzz(server, 2_000, seed=2)  # what is allocated once
    process = psutil.Process()
    before = process.memory_info().rss
    fuzz(server, 10_000, seed=3)
    grown = process.memory_info().rss - before
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert not server.models.versions[0].backend.tickets
    assert grown < 32 * 2**20, f"{grown / 2**20:.0f} MiB more"
