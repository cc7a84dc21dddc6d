"""The application on Ray Serve itself: its proxy, its replicas, and what happens when one of them is killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from pipeline.config import ServeConfig
from pipeline.serving.errors import LOST
from tests.pipeline.tiny_registry import TinyRegistry

APP = "tiny-endpoint"
LONG: dict[str, Any] = {"prompt": "Return", "max_tokens": 1000, "logit_bias": {"399": -100}}


@pytest.fixture(scope="module")
def registry(tiny_registry: TinyRegistry) -> TinyRegistry:
    """Versions with a context long enough for answers that last a second."""
    tiny_registry.current()
    version = tiny_registry.add_version(seed=4, context_length=1100)
    tiny_registry.move_alias("long", version)
    return tiny_registry


@pytest.fixture(scope="module")
def url(ray_session: None) -> Iterator[str]:
    """Serve's proxy on a free port."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def endpoint(url: str, registry: TinyRegistry) -> Iterator[str]:
    """Two replicas of the application."""
    from ray import serve

    from pipeline.serve import bind_app

    settings = ServeConfig(
        versions=["long"], replicas=2, cpus_per_replica=0.5, threads=1, weights="float32", watch_seconds=0.5
    )
    serve.run(bind_app(registry.name, settings, registry.tracking_uri), name=APP, route_prefix="/")
    yield url
    serve.delete(APP)


@pytest.fixture
def http(endpoint: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint, timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        yield client


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "It did not happen in time."
        time.sleep(0.05)


def replica_pids() -> list[int]:
    """The processes of this application's replicas, on this machine and under this Ray session."""
    title = f"ServeReplica:{APP}:"
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if title in " ".join(process.cmdline()) or title in process.name():
                found.append(process.pid)
    return found


def read_metric(http: httpx.Client, name: str) -> list[float]:
    """Its value on each replica."""
    lines = http.get("/metrics").text.splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")]


def running_sequences(http: httpx.Client) -> list[float]:
    """How many answers each replica is writing."""
    return read_metric(http, "gpt_running_sequences")


def test_openai_client_through_the_proxy(endpoint: str) -> None:
    with openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "tiny", "prompt": "Return a new", "max_tokens": 30, "seed": 1}
        whole = client.completions.create(**asked)
        pieces = list(client.completions.create(**asked, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
        assert [model.id for model in client.models.list()] == ["tiny", "tiny@long"]
        with pytest.raises(openai.BadRequestError, match="room for"):
            client.completions.create(model="tiny", prompt="x", max_tokens=1_000_000)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="none", prompt="x")


def test_the_address_is_where_serve_listens(endpoint: str) -> None:
    """Serve was started with a port of its own: not the one that an application's settings name."""
    from pipeline.serve import listening_address

    assert listening_address() == endpoint


def test_a_stream_comes_as_it_is_made(http: httpx.Client) -> None:
    """Its first token is here before half of the time that the last one takes: a proxy that gathers would show."""

    def came_early() -> bool:
        began = time.monotonic()
        with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            assert answer.headers["x-model-version"]
            seconds = [time.monotonic() - began for line in answer.iter_lines() if line.startswith("data: {")]
        assert len(seconds) > 50
        return seconds[0] < seconds[-1] / 2

    until(came_early)  # a busy machine may take long to begin one answer


def test_metrics_are_of_all_replicas(http: httpx.Client) -> None:
    for _ in range(8):
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})

    until(lambda: len(running_sequences(http)) == 2)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_place(http: httpx.Client, stream: bool) -> None:
    def cancelled() -> float:
        return sum(read_metric(http, "gpt_cancelled_requests_total"))

    before = cancelled()

    def leave() -> bool:
        """A busy machine may not have begun in this time, and a fast one may have ended: then it is tried again."""
        with contextlib.suppress(httpx.ReadTimeout):
            asked = http.stream("POST", "/v1/completions", json=LONG | {"stream": stream}, timeout=0.1)
            with asked as answer:
                next(answer.iter_bytes())
        return cancelled() > before

    until(leave)
    until(lambda: running_sequences(http) == [0, 0], seconds=5)


def test_alias_moves_on_every_replica(http: httpx.Client, registry: TinyRegistry) -> None:
    before = http.get("/v1/models").json()["data"][0]["version"]
    version = registry.add_version(seed=5, context_length=1100)
    statuses, ends = [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=str(http.base_url), timeout=60) as client:
            while not ends.is_set():
                statuses.append(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 30}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        registry.move_alias("long", version)
        until(lambda: {http.get("/v1/models").json()["data"][0]["version"] for _ in range(10)} == {version})
    finally:
        ends.set()
        for thread in threads:
            thread.join(30)
    assert before != version
    assert set(statuses) == {200}


def said(status: int, body: dict[str, Any]) -> str:
    assert body["error"]["type"] == "server_error"
    return f"{status} {body['error']['message']}"


def test_killed_replica_costs_only_its_running_requests(http: httpx.Client, endpoint: str) -> None:
    until(lambda: len(replica_pids()) == 2)
    results: list[str] = []

    def ask(stream: bool) -> None:
        """Notes how one request ended: 200, or the status and the sentence of its error."""
        with httpx.Client(base_url=endpoint, timeout=60) as client:
            if not stream:
                answer = client.post("/v1/completions", json=LONG)
                results.append("200" if answer.status_code == 200 else said(answer.status_code, answer.json()))
                return
            with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
                lines = [line for line in answer.iter_lines() if line]
            if answer.status_code == 200 and lines[-1] == "data: [DONE]":
                results.append("200")
            else:
                results.append(said(answer.status_code, json.loads(lines[-1].removeprefix("data: "))))

    threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: running_sequences(http) == [4, 4], seconds=20)
    os.kill(replica_pids()[0], signal.SIGKILL)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "A request hangs."
    assert len(results) == len(threads)
    assert results.count("200") == 4, results  # the other replica's
    broken = [result for result in results if result != "200"]
    assert broken
    assert set(broken) <= {f"503 {LOST}", f"200 {LOST}"}  # a stream's status is long gone
    until(lambda: len(replica_pids()) == 2, seconds=60)
    until(lambda: http.get("/readyz").status_code == 200)


def test_draining_finishes_what_was_begun(url: str, endpoint: str) -> None:
    """The application is taken down while streams run; they end as they would have."""
    from ray import serve

    def ask(_: int) -> str:
        with httpx.stream("POST", f"{endpoint}/v1/completions", json=LONG | {"stream": True}, timeout=60) as answer:
            begun.release()
            return [line for line in answer.iter_lines() if line][-1]

    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, number) for number in range(3)]
        for _ in asked:
            begun.acquire(timeout=30)
        serve.delete(APP)
        assert [each.result() for each in asked] == ["data: [DONE]"] * 3
    answer = httpx.get(f"{url}/healthz")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"], "the proxy's own errors have the shape of all others"


@pytest.mark.slow
def test_replicas_come_with_load_and_go_without_it(url: str, registry: TinyRegistry) -> None:
    from ray import serve

    from pipeline.serve import bind_app

    settings = ServeConfig(
        versions=["long"], replicas=1, max_replicas=2, target_ongoing_requests=2, downscale_delay_seconds=5,
        cpus_per_replica=0.5, threads=1, weights="float32", watch_seconds=0,
    )  # fmt: skip
    serve.run(bind_app(registry.name, settings, registry.tracking_uri), name=APP, route_prefix="/")
    ends = threading.Event()
    statuses: set[int] = set()

    def ask() -> None:
        while not ends.is_set():
            statuses.add(httpx.post(f"{url}/v1/completions", json=LONG, timeout=60).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    try:
        assert len(replica_pids()) == 1
        for thread in threads:
            thread.start()
        until(lambda: len(replica_pids()) == 2, seconds=120)
        ends.set()
        for thread in threads:
            thread.join(60)
        assert statuses == {200}
        until(lambda: len(replica_pids()) == 1, seconds=120)
    finally:
        ends.set()
        serve.delete(APP)


def test_serve_build_and_deploy(url: str, registry: TinyRegistry, tmp_path: Path) -> None:
    """Ray's own commands, in processes of their own, as on a cluster."""
    from ray import serve

    file = tmp_path / "serve.yaml"
    environment = {
        "MLFLOW_TRACKING_URI": registry.tracking_uri,
        "SERVE_SETTINGS": f"name={registry.name} serve.versions=[long] serve.cpus_per_replica=0.5 serve.threads=1"
        " serve.weights=float32",
    }
    build = [str(Path(sys.executable).with_name("serve")), "build", "jobs.serve:app", "-o", str(file)]
    subprocess.run(build, check=True, env=os.environ | environment, timeout=120)
    config = yaml.safe_load(file.read_text())
    (application,) = config["applications"]
    assert application["import_path"] == "jobs.serve:app"
    assert application["deployments"][0]["ray_actor_options"]["num_cpus"] == 0.5
    # What a person adds to the file.
    application["runtime_env"] = {"env_vars": environment}
    config["http_options"]["port"] = httpx.URL(url).port
    file.write_text(yaml.safe_dump(config))
    dashboard = f"http://{ray_dashboard()}"
    deploy = [str(Path(sys.executable).with_name("serve")), "deploy", str(file), "--address", dashboard]
    subprocess.run(deploy, check=True, timeout=60)

    def answers() -> bool:
        asked = {"prompt": "Return", "max_tokens": 2}
        return httpx.post(f"{url}/v1/completions", json=asked, timeout=60).status_code == 200

    until(answers, seconds=120)
    serve.delete(application["name"])


def ray_dashboard() -> str:
    import ray

    return ray.init(ignore_reinit_error=True).address_info["webui_url"]
