"""What the HTTP stack costs: the same requests to a bare engine and through Ray Serve, side by side.

    .venv/bin/python tests/benchmarks/serve_http.py [--rounds 40] [--users 16]

The model is tiny, so that almost all of the time is the stack's: the first token's way through Serve's proxy, the
replica and the engine's thread, and how many tokens per second can be written to many streams at once.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx
import torch

from jobs.command import set_environment

BODY = {"prompt": "Return a new list", "logit_bias": {"399": -100}, "temperature": 0}


def bare_milliseconds(rounds: int, name: str) -> float:
    """Median time from a request to its first token in an engine of our own."""
    from model.engine import Engine, EngineSettings, GenerationRequest
    from model.sampling import SamplingSettings
    from pipeline import registry

    loaded, model = registry.load(registry.resolve(name, "long"), torch.device("cpu"))
    engine = Engine(model, loaded.tokenizer, EngineSettings())
    engine.enter_thread()
    times = []
    for number in range(rounds):
        began = time.perf_counter()
        tokens = loaded.tokenizer.encode(BODY["prompt"]).tolist()
        engine.add(GenerationRequest(str(number), tokens, SamplingSettings(max_tokens=2, temperature=0)))
        while not engine.step():
            pass
        times.append(1000 * (time.perf_counter() - began))
        while engine.has_work:
            engine.step()
    return statistics.median(times)


def http_milliseconds(rounds: int, url: str) -> float:
    """Median time from a request to the first event with text, over one kept connection."""
    times = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(rounds):
            began = time.perf_counter()
            with client.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 2, "stream": True}) as answer:
                lines = answer.iter_lines()
                next(line for line in lines if line.startswith("data: {"))
                times.append(1000 * (time.perf_counter() - began))
                for _ in lines:
                    pass
    return statistics.median(times)


def streamed_tokens_per_second(users: int, url: str, tokens: int = 1000) -> tuple[float, float]:
    """Tokens per second that reach all users together, and tokens per event."""

    def ask(_: int) -> int:
        with (
            httpx.Client(base_url=url, timeout=120) as client,
            client.stream("POST", "/v1/completions", json=BODY | {"max_tokens": tokens, "stream": True}) as answer,
        ):
            return sum(line.startswith("data: {") for line in answer.iter_lines())

    began = time.perf_counter()
    with ThreadPoolExecutor(users) as pool:
        events = sum(pool.map(ask, range(users)))
    return users * tokens / (time.perf_counter() - began), users * tokens / events


@contextmanager
def tiny_serve(runtime_env: dict[str, Any] | None = None) -> Iterator[tuple[Any, str]]:
    """Ray Serve on a free port of this machine, and a registry whose version `long` has room for long answers."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from tests.pipeline.tiny_registry import make_registry

    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        registry = make_registry(Path(folder))
        registry.add_version(seed=1, alias="long", context_length=1100)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
        ray.init(address="local", num_cpus=4, runtime_env=runtime_env, **quiet)
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        try:
            yield registry, f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--users", type=int, default=16)
    options = parser.parse_args()
    set_environment()
    from ray import serve

    from pipeline.config import ServeConfig
    from pipeline.serve import bind_app

    with tiny_serve() as (registry, url):
        settings = ServeConfig(versions=["long"], watch_seconds=0, max_batch_size=max(16, options.users))
        serve.run(bind_app(registry.name, settings, registry.tracking_uri), name="benchmark", route_prefix="/")
        for measure in (http_milliseconds(5, url), bare_milliseconds(5, registry.name)):
            assert measure > 0  # and all is warm
        # Taking turns, so that a busy moment of the machine falls on both.
        halves = [
            (bare_milliseconds(options.rounds // 2, registry.name), http_milliseconds(options.rounds // 2, url))
            for _ in range(2)
        ]
        bare, http = (statistics.mean(half[side] for half in halves) for side in (0, 1))
        rate, gathered = streamed_tokens_per_second(options.users, url)
    load = os.getloadavg()[0]
    print(f"first token   bare engine {bare:6.1f} ms   over HTTP {http:6.1f} ms   (load average {load:.1f})")
    print(f"{options.users} streams    {rate:6.0f} tokens/s, {gathered:.1f} tokens per event")
    figures = {
        "bare_first_token_milliseconds": bare,
        "http_first_token_milliseconds": http,
        "http_overhead_milliseconds": http - bare,
        "streamed_tokens_per_second": rate,
        "tokens_per_event": gathered,
    }
    print(json.dumps({key: round(value, 2) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
