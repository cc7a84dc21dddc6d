"""How two replicas share a burst: the slowest answers beside one replica's at half the load.

    .venv/bin/python tests/benchmarks/serve_replicas.py [--bursts 40] [--places 4]

Behind Ray Serve's proxy, with our router and with Serve's own. One replica gets bursts of as many requests as it
generates at once, two get bursts of twice as many: dealt evenly, nobody waits for another's answer. The model is tiny
and each step of its engine lasts 20 ms longer, so that a replica is not held up by what runs on the same cores.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx

from jobs.command import set_environment
from tests.benchmarks.serve_http import tiny_serve
from tests.benchmarks.serve_users import percentile

STEP_SECONDS = 0.02
TOKENS = 30
BODY = {"prompt": "Return", "max_tokens": TOKENS, "logit_bias": {"399": -100}}
SERVES_OWN = "ray.serve._private.request_router.pow_2_router:PowerOfTwoChoicesRequestRouter"


def slow_steps() -> None:
    """Make every engine of this process slower, as a big model is; Ray runs this in each of its workers."""
    from model.engine import Engine

    step = Engine.step

    def slow_step(self: Engine) -> list:
        time.sleep(STEP_SECONDS)
        return step(self)

    Engine.step = slow_step


def burst(url: str, size: int) -> list[float]:
    """Milliseconds that each answer of one burst took."""

    def ask(_: int) -> float:
        began = time.perf_counter()
        with httpx.Client(timeout=60, verify=False) as client:
            client.post(f"{url}/v1/completions", json=BODY).raise_for_status()
        return 1000 * (time.perf_counter() - began)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(ask, range(size)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bursts", type=int, default=40)
    parser.add_argument("--places", type=int, default=4, help="texts that one replica generates at once")
    options = parser.parse_args()
    set_environment()
    from ray import serve

    import pipeline.serve
    from pipeline.config import ServeConfig

    times: dict[str, list[float]] = {}
    in_workers = {
        "worker_process_setup_hook": "tests.benchmarks.serve_replicas.slow_steps",
        "env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    }
    with tiny_serve(in_workers) as (registry, url):
        ours = pipeline.serve.ROUTER
        ways = {"one replica": (1, ours), "two, our router": (2, ours), "two, Serve's own router": (2, SERVES_OWN)}
        for way, (replicas, router) in ways.items():
            pipeline.serve.ROUTER = router
            settings = ServeConfig(
                versions=["long"],
                watch_seconds=0,
                replicas=replicas,
                threads=1,
                cpus_per_replica=0.5,
                max_batch_size=options.places,
            )
            app = pipeline.serve.bind_app(registry.name, settings, registry.tracking_uri)
            serve.run(app, name="benchmark", route_prefix="/")
            burst(url, replicas * options.places)  # all is warm
            times[way] = [took for _ in range(options.bursts) for took in burst(url, replicas * options.places)]
            serve.delete("benchmark")
    print(f"{options.bursts} bursts, an answer of {TOKENS} tokens alone {1000 * TOKENS * STEP_SECONDS:.0f} ms or more")
    figures: dict[str, float] = {}
    alone = percentile(times["one replica"], 0.99)
    for way, found in times.items():
        late = percentile(found, 0.99)
        print(f"{way:24} median {percentile(found, 0.5):6.0f} ms   99th percentile {late:6.0f} ms   {late / alone:.2f}")
        figures[f"{way}, ratio_of_99th_percentiles"] = round(late / alone, 3)
    print(f"load average {os.getloadavg()[0]:.1f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
