"""From text to an answer over HTTP on one machine: every stage of a preset, then one question to the served model.

    python -m jobs.demo jobs/presets/demo.yaml [section.key=value ...]
    python -m jobs.demo jobs/presets/demo-chat.yaml      after the first: its model, taught to answer

It stays up until Ctrl-C; with CI=true or without a terminal it ends after the answer.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from jobs.command import Command, name_command, ray_session
from pipeline import addresses
from pipeline.config import Config

PROMPT = "Return a new"  # for a model that goes on with a text
QUESTION = "What does `os.path.join` do?"  # for one that answers
KNOWS_LITTLE = (
    "It has 3 million parameters and knows little: its answers are about what was asked, and often wrong.\n\n"
)
SENTENCE_END = re.compile(r"[.!?](?=\s)|\n\n")
SAMPLING = {"max_tokens": 96, "temperature": 0.7, "seed": 1, "stream": True}


def run(config: Config, options: argparse.Namespace) -> int:
    stays = sys.stdout.isatty() and os.environ.get("CI", "").lower() not in ("1", "true")
    began = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(ray_session(options.verbose))
        from pipeline import orchestrator, registry, tracking

        tracking_uri = tracking.connect(config)
        mlflow_address = stack.enter_context(mlflow_pages(tracking_uri))
        print(f"MLflow    {mlflow_address}  (watch the run here)")
        manifests = orchestrator.run(config)

        from jobs.serve import serving

        served = replace(config.serve, port=free_port(config.serve.port))
        config = replace(config, serve=replace(served, mlflow_pages=served.mlflow_pages or mlflow_address))
        address = stack.enter_context(serving(config))
        facts, trained = manifests["register"].counts, manifests["train"].counts
        talks = config.source.holds_conversations
        question = options.question or (QUESTION if talks else PROMPT)
        answered = show_answer(address, facts["model_name"], question, 0 if talks else config.model.context_length)
        artifacts = orchestrator.locate(config)
        print(
            f"\n\n{orchestrator.describe_results(manifests)}\n\n"
            f"shards         {artifacts['prepare'].url}\n"
            f"loss curve     {artifacts['train'].url}/loss.png\n"
            f"MLflow run     {mlflow_address}/{registry.place_of_run(trained['mlflow_run_id'])}\n"
            f"model version  {mlflow_address}/{registry.place_of_version(facts['model_name'], facts['version'])}\n"
            f"playground     {address}/{'?talk' if talks else ''}\n"
            f"API            {address}/v1/{'chat/' if talks else ''}completions\n"
            f"next           {name_command('serve', options)}\n\n"
            f"{KNOWS_LITTLE if talks else ''}From text to an answer in {(time.monotonic() - began) / 60:.1f} minutes."
        )
        if stays:
            print("Ctrl-C ends it.")
            wait_for_interrupt()
    return 0 if answered else 2


def show_answer(address: str, model: str, question: str, context_length: int) -> bool:
    """Print a question and its answer as it comes, or in a sentence why there is none; returns whether there is.

    `context_length` is that of a model which goes on with a text; 0: the question is a turn of a conversation.
    """
    print(f"\n{question}", end="" if context_length else "\n", flush=True)
    try:
        if context_length:
            pieces = whole_sentences(ask(address, model, question, context_length))
        else:
            pieces = talk(address, model, question)
        for piece in pieces:
            print(piece, end="", flush=True)
    except (ValueError, OSError) as error:
        print(f"\nerror: The question was not answered: {error}", file=sys.stderr, flush=True)
        return False
    return True


def whole_sentences(pieces: Iterable[str]) -> Iterator[str]:
    """Pass a text on sentence by sentence; the last one only where it is whole, or the only one there is."""
    held, passed = "", False
    for piece in pieces:
        held += piece
        ends = [found.end() for found in SENTENCE_END.finditer(held)]
        if ends:
            yield held[: ends[-1]]
            held, passed = held[ends[-1] :], True
    if held and (not passed or held.rstrip().endswith((".", "!", "?"))):
        yield held


def ask(address: str, model: str, prompt: str, context_length: int) -> Iterator[str]:
    """Stream the completion of one prompt from our endpoint; raises `ValueError` with what the endpoint says."""
    with post(f"{address}/v1/tokenize", {"model": model, "text": prompt}) as response:
        num_tokens = json.load(response)["count"]
    room = context_length - max(1, num_tokens)
    if room < 1:
        raise ValueError(
            f"It has {num_tokens} tokens, and the model's context is {context_length};"
            f" ask a shorter one with --question."
        )
    body = {"model": model, "prompt": prompt, **SAMPLING, "max_tokens": min(96, room)}
    for event in read_events(f"{address}/v1/completions", body):
        yield from (choice["text"] for choice in event["choices"])


def talk(address: str, model: str, question: str) -> Iterator[str]:
    """Stream the answer to one question from our endpoint; raises `ValueError` with what the endpoint says."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], **SAMPLING, "temperature": 0}
    for event in read_events(f"{address}/v1/chat/completions", body):
        yield from (choice["delta"].get("content") or "" for choice in event["choices"])


def read_events(url: str, body: dict[str, Any]) -> Iterator[Any]:
    """Yield the events of a streamed answer; raises `ValueError` where it ends with an error."""
    with post(url, body) as response:
        for line in response:
            event = line.decode().removeprefix("data:").strip()
            if event and event != "[DONE]":
                answer = json.loads(event)
                if "error" in answer:
                    raise ValueError(answer["error"]["message"])
                yield answer


def post(url: str, body: dict[str, Any]) -> Any:
    """Ask our endpoint; raises `ValueError` with its own sentence where it refuses."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        return addresses.open_own(request, timeout=120)
    except urllib.error.HTTPError as error:
        content = error.read(10_000)
        try:
            sentence = json.loads(content)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            sentence = f"{url} answers {error.code}."
        raise ValueError(sentence) from None


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
    command.parser.add_argument(
        "--question", help=f"what to ask at the end [{PROMPT}; of one that answers: {QUESTION}]"
    )
    return command.main(run, argv)


if __name__ == "__main__":
    sys.exit(main())
