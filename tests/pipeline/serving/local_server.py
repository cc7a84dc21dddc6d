"""The API as Ray Serve would host it, but on a thread of the test's own process: quick to start, easy to look into."""

import asyncio
import socket
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import torch
import uvicorn

from pipeline.config import ServeConfig
from pipeline.serving.access import Access, ApiKey
from pipeline.serving.api import build_api
from pipeline.serving.backend import StartBackend
from pipeline.serving.live_engine import engine_starter
from pipeline.serving.metrics import ServingMetrics
from pipeline.serving.versions import ServedModels
from tests.pipeline.tiny_registry import TinyRegistry


class LocalServer:
    """Serves a tiny registry on a port, a free one by itself, until `close`."""

    def __init__(
        self,
        registry: TinyRegistry,
        settings: ServeConfig,
        keys: tuple[ApiKey, ...] = (),
        start_backend: StartBackend | None = None,
        port: int = 0,
    ) -> None:
        registry.current()
        self.registry = registry
        self.deadline_seconds = settings.deadline_seconds
        self.max_body_bytes = settings.max_body_bytes
        self.metrics = ServingMetrics("local")
        self.access = Access(keys, open_access=settings.open_access)
        self.models = ServedModels(
            registry.name,
            settings.versions,
            start_backend or engine_starter(settings),
            self.metrics,
            device=torch.device("cpu"),
            probe_tolerance=settings.probe_tolerance,
            drain_seconds=10,
            mlflow_pages=settings.mlflow_pages,
        )
        self._settings = settings
        # With proto 0 asyncio would leave Nagle's algorithm on: 40 ms for every answer.
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        self._started.wait(60)
        if self._error is not None:
            raise self._error

    async def metrics_page(self) -> str:
        self.metrics.read_backends((each.record.version, each.backend.stats()) for each in self.models.versions)
        return self.metrics.page()

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the server's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await self.models.start()
        except BaseException as error:
            self._error = error
            self._started.set()
            return
        self.app = build_api(self)
        options: dict[str, Any] = {"log_level": "error", "access_log": False, "timeout_graceful_shutdown": 1}
        self._server = uvicorn.Server(uvicorn.Config(self.app, lifespan="off", **options))
        watcher = None
        if self._settings.watch_seconds:
            watcher = asyncio.create_task(self.models.watch(self._settings.watch_seconds))
        asyncio.get_running_loop().call_later(0.05, self._started.set)
        await self._server.serve(sockets=[self._socket])
        if watcher is not None:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        await self.models.close()
