"""Serve's proxy deals requests out evenly, also where many arrive before any is answered."""

import asyncio
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig

from jobs.demo import free_port
from pipeline.serve import ROUTER


@pytest.fixture
def url(ray_session: None) -> Iterator[str]:
    """Two replicas that say who they are, after as many milliseconds as the request's path asks for."""

    @serve.deployment(
        num_replicas=2,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )
    class Slow:
        async def __call__(self, request: object) -> str:
            await asyncio.sleep(int(request.url.path.strip("/")) / 1000)  # type: ignore[attr-defined]
            return serve.get_replica_context().replica_tag

    port = free_port(18_500)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    serve.run(Slow.bind(), name="router", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


async def ask(client: httpx.AsyncClient, *milliseconds: int) -> list[str]:
    """Ask for all at once; returns which replica answered each."""
    answers = await asyncio.gather(*(client.get(f"/{each}") for each in milliseconds))
    assert {answer.status_code for answer in answers} == {200}
    return [answer.text for answer in answers]


async def ask_in_bursts(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        for _ in range(20):
            dealt = Counter(await ask(client, *[50] * 8))
            assert set(dealt.values()) == {4}, dealt
        # Three that last make one replica busier than the other, and it gets one less of the five after them.
        lasting = [asyncio.create_task(ask(client, 1500)) for _ in range(3)]
        await asyncio.sleep(0.3)
        dealt = Counter(await ask(client, *[50] * 5))
        busy = Counter([replica for task in lasting for replica in await task])
    assert sorted(busy.values()) == [1, 2]
    assert {replica: busy[replica] + dealt[replica] for replica in busy} == dict.fromkeys(busy, 4)


def test_bursts_are_dealt_out_evenly_and_the_busy_get_fewer(url: str) -> None:
    asyncio.run(ask_in_bursts(url))
