"""What Prometheus scrapes at /metrics: one replica's counters, and the sum of all replicas' pages as one page.

Training shows its figures through Ray's metrics; serving does not. /metrics belongs to the HTTP API: it answers with
every replica's numbers as they are now, without a Prometheus and without knowing Ray's ports. Through Ray a number
was on its node's page after 6 to 8 s, a killed replica's gauges stayed there for 17 s, each node would have a page of
its own (330 kB), and a counter took 16 microseconds in place of 8.
"""

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pipeline.serving.backend import BackendStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class ServingMetrics:
    """The counters of one replica, each labelled with its name."""

    def __init__(self, replica: str) -> None:
        self.registry = CollectorRegistry()
        self._replica = replica
        self.requests = self._counter("gpt_requests", "answers by HTTP status and endpoint", ("endpoint", "status"))
        self.prompt_tokens = self._counter("gpt_prompt_tokens", "prompt tokens read", ("version",))
        self.generated_tokens = self._counter("gpt_generated_tokens", "tokens generated", ("version",))
        self.cancelled = self._counter("gpt_cancelled_requests", "requests whose client went away", ())
        self.swaps = self._counter("gpt_model_swaps", "changes of the served version, by outcome", ("outcome",))
        self.first_token = self._histogram("gpt_time_to_first_token_seconds", "from request to first token", SECONDS)
        self.per_token = self._histogram(
            "gpt_time_per_token_seconds", "mean time between a request's later tokens", SECONDS_PER_TOKEN
        )
        self.duration = self._histogram("gpt_request_seconds", "from request to the last byte", SECONDS)
        self.running = self._gauge("gpt_running_sequences", "batch size: sequences decoded in each step")
        self.waiting = self._gauge("gpt_waiting_sequences", "queue: sequences that wait for a place in the batch")
        self.cache_use = self._gauge("gpt_cache_use_ratio", "share of the KV cache in use")
        self.steps = self._gauge("gpt_engine_steps", "steps the engine has made since its version was loaded")

    def _labels(self, *more: str) -> tuple[str, ...]:
        return ("replica", *more)

    def _counter(self, name: str, meaning: str, labels: tuple[str, ...]) -> Any:
        return _Bound(Counter(name, meaning, self._labels(*labels), registry=self.registry), self._replica)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Any:
        histogram = Histogram(name, meaning, self._labels(), registry=self.registry, buckets=buckets)
        return histogram.labels(self._replica)

    def _gauge(self, name: str, meaning: str) -> Any:
        return _Bound(Gauge(name, meaning, self._labels("version"), registry=self.registry), self._replica)

    def read_backends(self, versions: Iterable[tuple[str, BackendStats]]) -> None:
        """Set the gauges from the backends that are in service: (version, statistics) of each."""
        for gauge in (self.running, self.waiting, self.cache_use, self.steps):
            gauge.clear()
        for version, stats in versions:
            self.running.labels(version).set(stats.running)
            self.waiting.labels(version).set(stats.waiting)
            self.cache_use.labels(version).set(stats.cache_use)
            self.steps.labels(version).set(stats.steps)

    def page(self) -> str:
        return generate_latest(self.registry).decode()


class _Bound:
    """A metric whose first label, the replica, is filled in."""

    def __init__(self, metric: Any, replica: str) -> None:
        self._metric = metric
        self._replica = replica

    def labels(self, *values: str) -> Any:
        return self._metric.labels(self._replica, *values)

    def clear(self) -> None:
        self._metric.clear()


def merge_pages(pages: Iterable[str]) -> str:
    """Join the pages of several replicas into one valid page: each metric described once, then all its samples."""
    families: dict[str, Metric] = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            if family.name in families:
                families[family.name].samples += family.samples
            else:
                families[family.name] = family
    return generate_latest(_Families(families.values())).decode()


class _Families:
    """What `generate_latest` asks of a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
