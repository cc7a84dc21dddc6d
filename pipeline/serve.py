"""The endpoint: one Ray Serve deployment whose replicas hold both the HTTP API and the engine.

    address = deploy(config)     # http://127.0.0.1:8000
    take_down(config)

`python -m jobs.serve PRESET` does this from a terminal, Ray's `serve build` and `serve deploy` with `jobs.serve:app`.
"""

import asyncio
import logging
import socket
from collections.abc import Mapping
from typing import Any

import mlflow
import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from model.cores import count_cores
from pipeline import registry, tracking
from pipeline.config import Config, ServeConfig
from pipeline.serving.access import Access, ApiKey, is_local_host, read_keys
from pipeline.serving.api import build_api
from pipeline.serving.backend import StartBackend
from pipeline.serving.live_engine import engine_starter, max_active
from pipeline.serving.metrics import ServingMetrics, merge_pages
from pipeline.serving.versions import ServedModels

logger = logging.getLogger("ray.serve")

DEPLOYMENT = "completions"
METRICS_TIMEOUT_SECONDS = 2.0
ROUTER = "pipeline.serving.router:LeastBusyRouter"  # by name: Serve sends its code to the proxies


@serve.ingress()
class CompletionServer:
    """One replica: the versions in service, an engine for each, and the API in front of them."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, name: str, settings: ServeConfig, tracking_uri: str, keys: tuple[ApiKey, ...]
    ) -> None:
        tracking.prepare_client(tracking_uri)
        mlflow.set_tracking_uri(tracking_uri)
        device = choose_device(settings)
        if settings.threads or device.type == "cpu":
            torch.set_num_threads(settings.threads or count_cores())
        context = serve.get_replica_context()
        self.deadline_seconds = settings.deadline_seconds
        self.max_body_bytes = settings.max_body_bytes
        self.metrics = ServingMetrics(context.replica_tag)
        self.access = Access(keys, open_access=settings.open_access)
        self.models = ServedModels(
            name,
            settings.versions,
            backend_starter(settings),
            self.metrics,
            device=device,
            probe_tolerance=settings.probe_tolerance,
            drain_seconds=settings.deadline_seconds,
            mlflow_pages=settings.mlflow_pages,
        )
        await self.models.start()
        self._watcher: asyncio.Task[None] | None = None
        if settings.watch_seconds:
            self._watcher = asyncio.get_running_loop().create_task(self.models.watch(settings.watch_seconds))
        self._handle = serve.get_deployment_handle(context.deployment, context.app_name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self)

    def check_health(self) -> None:
        """What Serve asks: it replaces a replica whose engine has died or hangs."""
        self.access.share_among(max(1, serve.get_replica_context().world_size))
        self.models.check()

    async def metrics_page(self) -> str:
        """All replicas' metrics on one page: a scrape reaches any one of them."""
        try:
            pages = await self._handle.broadcast("own_metrics").results_async(timeout_s=METRICS_TIMEOUT_SECONDS)
        except Exception as error:  # a replica that just died must not hide the others
            logger.warning("Only this replica's metrics are shown: %s", error)
            pages = [self.own_metrics()]
        return merge_pages(pages)

    def own_metrics(self) -> str:
        """This replica's metrics page."""
        self.metrics.read_backends((each.record.version, each.backend.stats()) for each in self.models.versions)
        return self.metrics.page()

    async def __del__(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        await self.models.close()


def choose_device(settings: ServeConfig) -> torch.device:
    """A GPU where the settings reserve one; never one that other work was given."""
    if not settings.gpus_per_replica:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("serve.gpus_per_replica asks for a GPU, and torch finds none here.")
    return torch.device("cuda")


def backend_starter(settings: ServeConfig) -> StartBackend:
    """What generates; raises `ValueError` where it is not installed."""
    if settings.backend == "vllm":
        from pipeline.serving.vllm_engine import vllm_starter

        return vllm_starter(settings)
    return engine_starter(settings)


def build_app(config: Config) -> serve.Application:
    """Describe the application; the registry is asked, but nothing is loaded before Serve starts its replicas.

    Raises `ValueError` where the registry has no such model or version.
    """
    tracking_uri = tracking.connect(config)
    for selector in config.serve.versions:
        registry.resolve(config.registered_name, selector)
    return bind_app(config.registered_name, config.serve, tracking_uri, read_keys())


def describe_app(config: Config) -> serve.Application:
    """Describe the application from the settings alone: `serve build` may run where no registry can be reached.

    Raises `ValueError` where storage is not local and MLFLOW_TRACKING_URI names no server.
    """
    return bind_app(config.registered_name, config.serve, tracking.address(config), read_keys())


def bind_app(name: str, settings: ServeConfig, tracking_uri: str, keys: tuple[ApiKey, ...] = ()) -> serve.Application:
    """The application of a registered model's name; the keys travel as hashes only."""
    most = max_active(settings)
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas:
        autoscaling = AutoscalingConfig(
            min_replicas=settings.replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing_requests,
            downscale_delay_s=settings.downscale_delay_seconds,
        )
        scaling = {"autoscaling_config": autoscaling}
    deployment: Any = serve.deployment(  # its bind() has no type
        CompletionServer,
        name=DEPLOYMENT,
        # Above what the backend takes, so that it is the backend's bound that answers, with a 429 and Retry-After.
        max_ongoing_requests=2 * most + 64,
        max_queued_requests=2 * most + 64,
        graceful_shutdown_timeout_s=settings.deadline_seconds + 10,
        graceful_shutdown_wait_loop_s=1,
        health_check_period_s=5,
        health_check_timeout_s=30,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),  # type: ignore[arg-type]  # takes a name
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        logging_config=LoggingConfig(enable_access_log=settings.access_log),
        **scaling,
    )
    return deployment.bind(name, settings, tracking_uri, keys)


def deploy(config: Config, app_name: str = "") -> str:
    """Start Serve if it is not up, run the application, and return its address.

    Raises `ValueError` if the port is taken or the application does not come up.
    """
    app = build_app(config)
    host = choose_host(config.serve, read_keys())
    check_room(config.serve)
    if not serve_is_up():
        check_port(host, config.serve.port)
        serve.start(http_options=HTTPOptions(host=host, port=config.serve.port))
    serve.run(app, name=app_name or config.name, route_prefix="/")
    return listening_address()


def take_down(config: Config, app_name: str = "") -> None:
    """End the application; what it has begun to answer it finishes first."""
    serve.delete(app_name or config.name)


def choose_host(settings: ServeConfig, keys: tuple[ApiKey, ...]) -> str:
    """The address to listen on: without keys only this machine's own, unless open access is asked for."""
    if keys or settings.open_access or is_local_host(settings.host):
        return settings.host
    return "127.0.0.1"


def check_room(settings: ServeConfig) -> None:
    """Raise `ValueError` where the cluster is too small for the replicas: Serve would wait for ever."""
    there = ray.cluster_resources()
    for name, each in (("CPU", settings.cpus_per_replica), ("GPU", settings.gpus_per_replica)):
        if settings.replicas * each > there.get(name, 0):
            raise ValueError(
                f"{settings.replicas} replicas with {each:g} {name}s each do not fit in the Ray cluster, which has"
                f" {there.get(name, 0):g}; change serve.replicas or serve.{name.lower()}s_per_replica."
            )


def check_port(host: str, port: int) -> None:
    """Raise `ValueError` where something listens already: Serve would only log it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"Port {port} on {host} cannot be used ({error.strerror}); set serve.port to another."
            ) from None


def serve_is_up() -> bool:
    """Whether this Ray cluster has Serve's proxies already, with a host and port of their own."""
    try:
        return bool(serve.status().proxies)
    except Exception:  # Serve has no exception of its own for "not started"
        return False


def listening_address() -> str:
    """Where Serve's proxies listen: whoever started Serve in this cluster first has chosen, for all applications."""
    from ray.serve.context import _get_global_client  # Ray has no public name for it

    client = _get_global_client()
    assert client is not None
    options = client.http_config
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    return f"http://{f'[{host}]' if ':' in host else host}:{options.port}"


def describe_access(settings: ServeConfig, keys: tuple[ApiKey, ...]) -> str:
    """One line for the terminal: who may use the endpoint."""
    if keys:
        return f"{len(keys)} API key{'s' if len(keys) > 1 else ''}"
    if settings.open_access:
        return "open to everybody who reaches the port"
    asked = "" if is_local_host(settings.host) else f", not on {settings.host}"
    return f"no API keys are set, so it answers on this machine only{asked} (see SERVE_API_KEYS)"


def settings_of(arguments: Mapping[str, Any]) -> list[str]:
    """The overrides in the arguments of a Serve config file, as `section.key=value`."""
    return [f"{key}={value}" for key, value in arguments.items() if key != "preset"]
