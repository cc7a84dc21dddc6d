"""How tests ask a `LocalServer`, and look into it."""

import time
from collections.abc import Callable
from typing import Any

import httpx

from tests.pipeline.serving.local_server import LocalServer

Start = Callable[..., LocalServer]
LONG = {"prompt": "Return", "max_tokens": 120, "logit_bias": {"399": -100}}  # 399 would end the text

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
