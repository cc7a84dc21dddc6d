"""What generates text for the endpoint: the protocol that versions, probes, completions and metrics speak.

    ticket = backend.submit([request])
    try:
        while chunks := await ticket.read(): ...
    finally:
        backend.leave(ticket)

`live_engine.py` is our engine, `vllm_engine.py` is vLLM. Another one is another file: a class with these methods, and a
`StartBackend` that `serve.py` hands to `ServedModels`.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model.gpt import GPT
from model.sampling import SamplingSettings
from model.sequence import Chunk, GenerationRequest
from model.tokenizer import Tokenizer


@dataclass(frozen=True)
class BackendStats:
    """What an operator wants to see of one backend now."""

    running: int  # sequences that are decoded in each step
    waiting: int  # requests that wait for a place in the batch
    cache_use: float  # share of the KV cache in use, 0 to 1
    steps: int  # since the backend was started


class Backend(Protocol):
    """One version's weights at work. All methods belong to the event loop that started the backend."""

    weights: str  # how they are stored while serving, such as bfloat16

    @property
    def tickets(self) -> Collection["Ticket"]:
        """The tickets that nobody has left yet."""

    def submit(self, requests: Sequence[GenerationRequest]) -> "Ticket":
        """Take requests, all or none, and return the ticket to read their chunks from.

        Raises `Overloaded` if there is no place for them now, `EngineDied` if the backend no longer works,
        `ValueError` if they are too many to fit at any time.
        """

    def leave(self, ticket: "Ticket") -> None:
        """Forget a ticket, and drop what is still to be done for it."""

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Return the log-probability of each token after the first; raises `ValueError` if no answer comes."""

    def check(self) -> None:
        """Raise `EngineDied` if the backend no longer works."""

    async def close(self, drain_seconds: float) -> None:
        """Let the requests that were taken finish, for a time; then end, and fail what is left."""

    def stats(self) -> BackendStats:
        """Return what it does now."""


class StartBackend(Protocol):
    """Starts a backend for one version: from its Hugging Face folder, or from the model that was read from there."""

    async def __call__(self, checkpoint: Path, model: GPT, tokenizer: Tokenizer) -> Backend: ...


class Ticket:
    """The answers to some requests on their way from a backend to the one coroutine that reads them.

    Chunks that were not read yet wait here, at most the tokens that the requests may generate; the backend never
    waits for a reader.
    """

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self.requests = tuple(requests)
        self.owed_tokens = sum(map(most_tokens, requests))  # at most still to come
        self._chunks: list[Chunk] = []
        self._arrived = asyncio.Event()
        self._ended = asyncio.Event()
        self._open = {(each.request_id, index) for each in requests for index in range(each.settings.n)}
        self._error: Exception | None = None

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    async def read(self) -> list[Chunk]:
        """Wait for chunks and return all that have come since the last look; empty once every choice has finished."""
        await self._arrived.wait()
        chunks, self._chunks = self._chunks, []
        if not self.ended:
            self._arrived.clear()
        if not chunks and self._error is not None:
            raise self._error
        return chunks

    async def rest(self, seconds: float) -> None:
        """Let chunks gather for a while, unless the last has come already."""
        if seconds > 0 and not self.ended:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), seconds)

    def deliver(self, chunk: Chunk) -> None:
        """For the backend, on the loop: hand over one chunk."""
        self._chunks.append(chunk)
        if not chunk.is_prompt:
            self.owed_tokens = max(0, self.owed_tokens - len(chunk.tokens))
        if chunk.finish_reason is not None:
            self._open.discard((chunk.request_id, chunk.index))
            if not self._open:
                self._ended.set()
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """For the backend, on the loop: end with an error that the reader gets."""
        if not self.ended:
            self._error = error
            self._ended.set()
            self._arrived.set()


def most_tokens(request: GenerationRequest) -> int:
    """The most tokens that a request may generate."""
    return request.settings.max_tokens * sequences(request)


def sequences(request: GenerationRequest) -> int:
    """How many places in the batch a request takes."""
    return max(request.settings.num_candidates, request.settings.num_beams)


async def score_by_echo(backend: Backend, tokens: Sequence[int]) -> list[float]:
    """Return the log-probability of each token after the first, as the backend tells it where a prompt is echoed.

    Raises `ValueError` if no answer comes.
    """
    # Every request is answered with at least one token, so the context must have room for one more.
    settings = SamplingSettings(max_tokens=1, temperature=0.0, echo=True, logprobs=0)
    ticket = backend.submit([GenerationRequest(f"score-{uuid.uuid4().hex}", list(tokens), settings)])
    found: list[float] = []
    try:
        while chunks := await ticket.read():
            for chunk in chunks:
                if chunk.finish_reason not in (None, "stop", "length"):
                    raise ValueError(f"it does not answer ({chunk.finish_reason}: {chunk.error})")
                if chunk.is_prompt:
                    found += [each.logprob for each in chunk.logprobs or () if each.logprob is not None]
    finally:
        backend.leave(ticket)
    return found
