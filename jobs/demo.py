"""From text to an answer over HTTP on one machine: every stage of a preset, then one question to the served model.

    python -m jobs.demo jobs/presets/demo.yaml [section.key=value ...]

It stays up until Ctrl-C; with CI=true or without a terminal it ends after the answer.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from jobs.command import Command, ray_session
from pipeline import addresses
from pipeline.config import Config

QUESTION = "Return a new"


def run(config: Config, options: argparse.Namespace) -> None:
    stays = sys.stdout.isatty() and os.environ.get("CI", "").lower() not in ("1", "true")
    began = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(ray_session(options.verbose))
        from pipeline import orchestrator, tracking

        tracking_uri = tracking.connect(config)
        mlflow_address = stack.enter_context(mlflow_pages(tracking_uri))
        print(f"MLflow    {mlflow_address}  (watch the run here)")
        manifests = orchestrator.run(config)

        from jobs.serve import serving

        config = replace(config, serve=replace(config.serve, port=free_port(config.serve.port)))
        address = stack.enter_context(serving(config))
        facts, trained = manifests["register"].counts, manifests["train"].counts
        print(f"\n{options.question}", end="", flush=True)
        for piece in ask(address, facts["model_name"], options.question):
            print(piece, end="", flush=True)
        run_id = trained["mlflow_run_id"]
        artifacts = orchestrator.locate(config)
        experiment = experiment_of(run_id)
        print(
            f"\n\n{orchestrator.describe_results(manifests)}\n\n"
            f"shards         {artifacts['prepare'].url}\n"
            f"loss curve     {artifacts['train'].url}/loss.png\n"
            f"MLflow run     {mlflow_address}/#/experiments/{experiment}/runs/{run_id}\n"
            f"model version  {mlflow_address}/#/models/{facts['model_name']}/versions/{facts['version']}\n"
            f"playground     {address}/\n"
            f"API            {address}/v1/completions\n\n"
            f"From text to an answer in {(time.monotonic() - began) / 60:.1f} minutes."
        )
        if stays:
            print("Ctrl-C ends it.")
            wait_for_interrupt()


def ask(address: str, model: str, prompt: str) -> Iterator[str]:
    """Stream the completion of one prompt from an OpenAI-compatible endpoint."""
    body = {"model": model, "prompt": prompt, "max_tokens": 96, "temperature": 0.7, "seed": 1, "stream": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with addresses.open_own(request, timeout=120) as response:
        for line in response:
            event = line.decode().removeprefix("data:").strip()
            if event and event != "[DONE]":
                yield from (choice["text"] for choice in json.loads(event)["choices"])


def experiment_of(run_id: str) -> str:
    """The id of the experiment that a run belongs to."""
    import mlflow

    return str(mlflow.get_run(run_id).info.experiment_id)


@contextmanager
def mlflow_pages(tracking_uri: str) -> Iterator[str]:
    """Show MLflow's pages over a local store while the demo runs; a tracking server has its own."""
    if tracking_uri.startswith("http"):
        yield tracking_uri.rstrip("/")
        return
    port = free_port(5000)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri, "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal ends the demo first, and the demo ends this
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port(preferred: int) -> int:
    """Return the preferred port if nothing listens on it, else one that the system picks."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ValueError("No port is free on 127.0.0.1.")


def wait_for_interrupt() -> None:
    """Sleep until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print()


def main(argv: Sequence[str] | None = None) -> int:
    command = Command(__doc__)
    command.parser.add_argument("--question", default=QUESTION, help="the prompt to ask at the end")
    return command.main(run, argv)


if __name__ == "__main__":
    sys.exit(main())
