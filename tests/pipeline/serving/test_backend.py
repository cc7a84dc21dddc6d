"""The seam: the API, the probes and the metrics work over anything that is a `Backend`."""

import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import httpx
import openai
import pytest

from model.gpt import GPT
from model.sequence import Chunk, GenerationRequest
from model.tokenizer import Tokenizer
from pipeline.config import ServeConfig
from pipeline.serving.backend import Backend, BackendStats, Ticket
from tests.pipeline.serving.local_server import LocalServer
from tests.pipeline.tiny_registry import TinyRegistry


class Parrot:
    """A backend that answers every prompt with the prompt, and finds every token equally likely."""

    weights = "none"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tickets: set[Ticket] = set()

    @property
    def tickets(self) -> Collection[Ticket]:
        return self._tickets

    def submit(self, requests: Sequence[GenerationRequest]) -> Ticket:
        ticket = Ticket(requests)
        self._tickets.add(ticket)
        for each in requests:
            tokens = each.prompt_tokens[: each.settings.max_tokens]
            text = self._tokenizer.decode(tokens)
            ticket.deliver(Chunk(each.request_id, 0, text, tokens, None, "length"))
        return ticket

    def leave(self, ticket: Ticket) -> None:
        self._tickets.discard(ticket)

    async def score(self, tokens: Sequence[int]) -> list[float]:
        return [-math.log(self._tokenizer.vocab_size)] * (len(tokens) - 1)

    def check(self) -> None:
        pass

    async def close(self, drain_seconds: float) -> None:
        pass

    def stats(self) -> BackendStats:
        return BackendStats(running=3, waiting=2, cache_use=0.5, steps=7)


async def start_parrot(checkpoint: Path, model: GPT, tokenizer: Tokenizer) -> Backend:
    assert (checkpoint / "model.safetensors").is_file(), "a backend may read the weights by itself"
    return Parrot(tokenizer)


@pytest.fixture
def server(tiny_registry: TinyRegistry) -> Iterator[LocalServer]:
    local = LocalServer(tiny_registry, ServeConfig(watch_seconds=0), start_backend=start_parrot)
    yield local
    local.close()


def test_another_backend_serves_in_place_of_ours(server: LocalServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="tiny", prompt="Return a new", max_tokens=100)
        assert answer.choices[0].text == "Return a new"
        pieces = list(client.completions.create(model="tiny", prompt="sorted", max_tokens=100, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == "sorted"
    entry = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert entry["weights"] == "none"
    page = httpx.get(f"{server.url}/metrics").text
    assert 'gpt_running_sequences{replica="local",version="1"} 3.0' in page
    assert 'gpt_cache_use_ratio{replica="local",version="1"} 0.5' in page
    assert not server.models.versions[0].backend.tickets


def test_no_character_of_an_answer_ends_a_line_of_the_stream(server: LocalServer) -> None:
    """Clients that split at every line end of Python's, as httpx does, would tear an event in two."""
    prompt = "a\x85b\u2028c\u2029d\x0be\x0cf\x1cg\x1eh\ni\rj"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        pieces = client.completions.create(model="tiny", prompt=prompt, max_tokens=100, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == prompt
    body = {"prompt": prompt, "max_tokens": 100, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-1]]
    assert "".join(texts) == prompt
