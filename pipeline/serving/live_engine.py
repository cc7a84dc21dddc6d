"""The backend that is our own engine: one thread steps it, the event loop adds requests and reads their chunks.

    start = engine_starter(settings)
    backend = await start(checkpoint, model, tokenizer)

Whatever happens, every ticket ends: with its last chunk, or with the error that ended the thread.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.cores import count_cores
from model.engine import Engine, EngineSettings, QueueFull, count_slots, sizes_of
from model.gpt import GPT
from model.runner import cache_bytes_per_token
from model.sequence import Chunk, GenerationRequest
from model.tokenizer import Tokenizer
from pipeline.config import ServeConfig
from pipeline.serving.backend import Backend, BackendStats, StartBackend, Ticket, most_tokens, score_by_echo, sequences
from pipeline.serving.errors import EngineDied, Overloaded

# A request is taken if the work ahead of it fills at most this share of its time at the measured speed; the rest is
# for moments in which the machine is slower than that.
PROMISE = 0.6
RATE_WEIGHTS = (0.02, 0.3)  # weight of the newest step in two moving averages of the speed: a slow and a fast one

logger = logging.getLogger("ray.serve")


def engine_starter(settings: ServeConfig) -> StartBackend:
    """Return what starts our engine with these settings."""

    def load(model: GPT, tokenizer: Tokenizer) -> Engine:
        engine = Engine(model, tokenizer, engine_settings(settings))
        engine.reserve_memory()
        return engine

    async def start(checkpoint: Path, model: GPT, tokenizer: Tokenizer) -> Backend:
        engine = await asyncio.to_thread(load, model, tokenizer)
        return LiveEngine(engine, max_active=max_active(settings))

    return start


def engine_settings(settings: ServeConfig) -> EngineSettings:
    return EngineSettings(
        max_batch_size=settings.max_batch_size,
        cache_bytes=settings.cache_bytes,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        max_queue=settings.max_queue,
        weights=settings.weights,
        threads=settings.threads or count_cores(),
    )


def places(settings: ServeConfig) -> int:
    """How many texts one replica generates at once."""
    return settings.max_batch_size or sizes_of("cuda" if settings.gpus_per_replica else "cpu").slots


def cache_bytes_for(settings: ServeConfig, model: GPT, dtype: torch.dtype) -> int:
    """What a cache of keys and values for all places takes, as far as the settings and the device allow."""
    device = model.embedding.weight.device
    slot_bytes = model.config.context_length * cache_bytes_per_token(model.config, dtype)
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return slot_bytes * count_slots(engine_settings(settings), device.type, slot_bytes, free_bytes)


def max_active(settings: ServeConfig) -> int:
    """How many sequences one replica takes on: those running and those waiting."""
    return places(settings) + settings.max_queue


class LiveEngine:
    """Owns the thread that steps an engine; its other methods belong to the event loop that made it."""

    def __init__(self, engine: Engine, *, max_active: int, stall_seconds: float = 60.0) -> None:
        self.engine = engine
        self.weights: str = engine.runner.weights
        self.max_active = max_active  # sequences running and waiting
        self._rates = [0.0] * len(RATE_WEIGHTS)  # tokens per second while several requests run; 0 while unknown
        self.steps = 0
        self._stall_seconds = stall_seconds
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[str, Ticket] = {}
        self._inbox: deque[Callable[[], None]] = deque()  # what to do to the engine between two steps
        self._wake = threading.Event()
        self._closing = False
        self._error: Exception | None = None
        self._step_began = 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- the event loop's side --

    @property
    def tickets(self) -> set[Ticket]:
        return set(self._tickets.values())

    def submit(self, requests: Sequence[GenerationRequest]) -> Ticket:
        """Hand requests to the engine, all or none.

        Raises `Overloaded` if the queue is full or the work ahead cannot be done by their deadline,
        `EngineDied` if the engine's thread has ended, `ValueError` if they are more than fit at once.
        """
        self.check()
        wanted = sum(map(sequences, requests))
        if wanted > self.max_active:
            raise ValueError(f"The request asks for {wanted} sequences at once; at most {self.max_active} fit.")
        active = sum(sequences(each) for ticket in self.tickets for each in ticket.requests)
        if active + wanted > self.max_active:
            raise Overloaded("The queue is full.", self._seconds_to_drain())
        deadline = min((each.deadline for each in requests if each.deadline is not None), default=math.inf)
        seconds_left = (deadline - time.monotonic()) * PROMISE
        owed = self.owed_tokens + sum(map(most_tokens, requests))
        if active and self.tokens_per_second and owed / self.tokens_per_second > seconds_left:
            raise Overloaded("The work ahead takes longer than a request may.", self._seconds_to_drain())
        ticket = Ticket(requests)
        self._tickets |= {each.request_id: ticket for each in requests}
        self._idle.clear()
        self._tell(lambda: self._add(ticket))
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Forget a ticket; if it has not ended, the engine drops its work before the next step."""
        for request in ticket.requests:
            if self._tickets.pop(request.request_id, None) is not None and not ticket.ended:
                self._tell(partial(self.engine.cancel, request.request_id))
        if not self._tickets:
            self._idle.set()

    def check(self) -> None:
        """Raise `EngineDied` if the thread has ended or one step has lasted too long."""
        if self._error is not None:
            raise EngineDied(f"The engine has failed: {self._error}") from self._error
        if self._closing or not self._thread.is_alive():
            raise EngineDied("The engine has stopped.")
        began = self._step_began
        if began and time.monotonic() - began > self._stall_seconds:
            raise EngineDied(f"The engine's step has lasted over {self._stall_seconds:.0f} s.")

    async def close(self, drain_seconds: float) -> None:
        """Let the requests in the engine finish, for a time; then end the thread, and with it what is left."""
        try:
            if self._tickets:
                await asyncio.wait_for(self._idle.wait(), drain_seconds)
        except TimeoutError:
            logger.warning("Requests were still running after %.0f s; they end with an error.", drain_seconds)
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, 10)
        self._fail_all(EngineDied("The model was unloaded before this request finished."))

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Return the log-probability of each token after the first; raises `ValueError` if no answer comes."""
        return await score_by_echo(self, tokens)

    def stats(self) -> BackendStats:
        found = self.engine.stats()
        cache_use = found["cache_used_tokens"] / max(1, found["cache_capacity_tokens"])
        return BackendStats(found["running"], found["queue"], cache_use, found["steps"])

    @property
    def tokens_per_second(self) -> float:
        """What the engine can be counted on for: the slower of its long and its recent measure; 0 while unknown."""
        return min(self._rates)

    @property
    def owed_tokens(self) -> int:
        """Tokens that the requests in the engine may still generate."""
        return sum(ticket.owed_tokens for ticket in self.tickets)

    def _seconds_to_drain(self) -> int:
        """About how long until a place is free: half of the work ahead, between 1 and 60 s."""
        seconds = self.owed_tokens / 2 / self.tokens_per_second if self.tokens_per_second else 1
        return max(1, min(60, round(seconds)))

    def _tell(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._wake.set()

    def _deliver(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            ticket = self._tickets.get(chunk.request_id)
            if ticket is not None:
                ticket.deliver(chunk)

    def _fail_all(self, error: Exception) -> None:
        for ticket in self.tickets:
            ticket.fail(error)

    # -- the thread's side --

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self.engine.enter_thread()
            while not self._closing:
                self._wake.clear()
                while self._inbox:
                    self._inbox.popleft()()
                if not self.engine.has_work:
                    self._wake.wait()
                    began = time.monotonic()
                    continue
                self._step_began = time.monotonic()
                chunks = self.engine.step()
                self._step_began = 0.0
                self.steps += 1
                if chunks:
                    self._call(self._deliver, chunks)
                # From the end of one step to the end of the next: what lies between them costs time too.
                ended = time.monotonic()
                self._measure(chunks, ended - began)
                began = ended
        except Exception as error:  # whatever it is, nobody may be left waiting for it
            logger.exception("The engine's thread has failed.")
            self._error = error
            self._call(self._fail_all, EngineDied(f"The engine has failed: {error}"))

    def _add(self, ticket: Ticket) -> None:
        for number, request in enumerate(ticket.requests):
            try:
                self.engine.add(request)
            except (QueueFull, ValueError) as error:
                for added in ticket.requests[:number]:
                    self.engine.cancel(added.request_id)
                full = isinstance(error, QueueFull)
                self._call(ticket.fail, Overloaded("The queue is full.", 1) if full else error)
                return

    def _measure(self, chunks: list[Chunk], seconds: float) -> None:
        tokens = sum(len(chunk.tokens) for chunk in chunks if not chunk.is_prompt)
        # A half-empty batch says little about what a full one can do.
        if tokens >= 4 and seconds > 0:
            rate = tokens / seconds
            self._rates = [
                old + (rate - old) * weight if old else rate
                for old, weight in zip(self._rates, RATE_WEIGHTS, strict=True)
            ]

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the process is ending, nobody waits
            self._closing = True
