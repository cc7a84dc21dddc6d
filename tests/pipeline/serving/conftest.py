"""Servers with settings of a test's own, and the clients of the server that a file starts."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from pipeline.config import ServeConfig
from pipeline.serving.access import ApiKey
from tests.pipeline.serving.asking import Start
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import TinyRegistry


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


@pytest.fixture
def client(server: LocalServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
def http(server: LocalServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as found:
        yield found
