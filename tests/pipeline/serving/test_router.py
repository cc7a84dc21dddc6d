"""Serve's proxy deals requests out evenly, also where many arrive before any is answered."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ray import serve
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID

from jobs.demo import free_port
from pipeline.serving.router import LeastBusyRouter

DEPLOYMENT = DeploymentID("Slow", "router")
A, B = (ReplicaID(name, DEPLOYMENT) for name in "ab")


class WatchedRouter(LeastBusyRouter):
    """Keeps in a file how many requests it has under way."""

    def initialize_state(self, path: str) -> None:  # type: ignore[override]
        self.path = Path(path)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self.path.write_text(str(self._running.total()))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self.path.write_text(str(self._running.total()))


@pytest.fixture
def under_way(tmp_path: Path) -> Path:
    """The file in which the proxy's router keeps how many requests it has under way."""
    return tmp_path / "under_way"


@pytest.fixture
def url(ray_session: None, under_way: Path) -> Iterator[str]:
    """Two replicas that say who they are, after as many milliseconds as the request's path asks for."""

    @serve.deployment(
        num_replicas=2,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(
            request_router_class=f"{__name__}:{WatchedRouter.__name__}",  # type: ignore[arg-type]  # takes a name
            request_router_kwargs={"path": str(under_way)},
        ),
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


async def wait_for(under_way: Path, requests: int) -> None:
    """Wait until the proxy knows of so many: it hears of a request's end a little after its client does."""
    until = time.monotonic() + 30
    while under_way.read_text() != str(requests):
        assert time.monotonic() < until, under_way.read_text()
        await asyncio.sleep(0.01)


async def ask_in_bursts(url: str, under_way: Path) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        for _ in range(20):
            dealt = Counter(await ask(client, *[50] * 8))
            assert set(dealt.values()) == {4}, dealt
            await wait_for(under_way, 0)
        # Three that last make one replica busier than the other, and it gets one less of the five after them.
        lasting = [asyncio.create_task(ask(client, 3000)) for _ in range(3)]
        await wait_for(under_way, 3)
        dealt = Counter(await ask(client, *[50] * 5))
        busy = Counter([replica for task in lasting for replica in await task])
    assert sorted(busy.values()) == [1, 2]
    assert {replica: busy[replica] + dealt[replica] for replica in busy} == dict.fromkeys(busy, 4)


def test_bursts_are_dealt_out_evenly_and_the_busy_get_fewer(url: str, under_way: Path) -> None:
    asyncio.run(ask_in_bursts(url, under_way))


class Replica:
    """As much of a replica as the router looks at."""

    max_ongoing_requests = 100

    def __init__(self, replica_id: ReplicaID) -> None:
        self.replica_id = replica_id


def make_router() -> LeastBusyRouter:
    return LeastBusyRouter(DEPLOYMENT, DeploymentHandleSource.UNKNOWN, use_replica_queue_len_cache=True)


def make_request() -> PendingRequest:
    return PendingRequest([], {}, RequestMetadata("id", "internal id"))


async def choose(router: LeastBusyRouter, request: PendingRequest) -> ReplicaID:
    ranked = await router.choose_replicas([Replica(A), Replica(B)], request)  # type: ignore[list-item]
    return ranked[0][0].replica_id


def test_the_first_request_of_a_proxy_goes_anywhere() -> None:
    async def choose_first() -> set[ReplicaID]:
        return {await choose(make_router(), make_request()) for _ in range(40)}

    assert asyncio.run(choose_first()) == {A, B}


def test_a_late_report_does_not_make_a_replica_busy() -> None:
    router = make_router()
    for _ in range(4):
        router.on_send_request(A)
    for _ in range(4):
        router.on_request_completed(A, "internal id")
    router.on_new_queue_len_info(A, 4)  # as it was before they ended
    assert router.count_under_way(A) == 0


def test_what_other_proxies_sent_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    router = make_router()
    router.on_send_request(A)
    router.on_new_queue_len_info(A, 3)
    assert [router.count_under_way(A), router.count_under_way(B)] == [3, 0]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    assert router.count_under_way(A) == 1  # the report is old by now


async def refuse_the_first() -> int:
    """The replica that was chosen has no room, and the other one gets the request."""
    router = make_router()
    request = make_request()
    first = await choose(router, request)
    assert router.count_under_way(first) == 1
    assert await choose(router, request) != first  # the next round, after all had no room: its own choice is no load
    assert router.count_under_way(first) == 0
    request.future.set_result(Replica(first))
    await asyncio.sleep(0)
    return router.count_under_way(A) + router.count_under_way(B)


def test_a_choice_that_came_to_nothing_is_not_counted() -> None:
    assert asyncio.run(refuse_the_first()) == 0


async def give_up() -> int:
    router = make_router()
    request = make_request()
    chosen = await choose(router, request)
    request.future.cancel()
    await asyncio.sleep(0)
    return router.count_under_way(chosen)


def test_a_request_whose_client_has_gone_is_not_counted() -> None:
    assert asyncio.run(give_up()) == 0
