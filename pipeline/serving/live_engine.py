"""An engine at work: one thread steps it, an event loop adds requests and reads their chunks.

    live = LiveEngine(engine, max_active=80)
    async with live.submit([request]) as ticket:
        while chunks := await ticket.read(): ...

Whatever happens, every ticket ends: with its last chunk, or with the error that ended the thread.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from model.engine import Chunk, Engine, GenerationRequest, QueueFull

PROMISE = 0.6  # share of a request's time that the work ahead may take by our measure: machines have bad moments
RATE_WEIGHTS = (0.02, 0.3)  # of the newest step in our measure: one that remembers, and one that notices at once

logger = logging.getLogger("ray.serve")


class Overloaded(Exception):
    """No place for a request now; `retry_after` says in how many seconds there may be one."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class EngineDied(Exception):
    """The engine's thread ended; nothing it was asked will be answered."""


class Ticket:
    """The way of one or more requests through the engine, read by one coroutine on the event loop.

    What is not yet read waits here, at most the tokens that the requests may generate; the engine never waits
    for a reader. Leaving the `async with` cancels what still runs.
    """

    def __init__(self, live: "LiveEngine", requests: Sequence[GenerationRequest]) -> None:
        self.requests = tuple(requests)
        self.owed_tokens = sum(map(most_tokens, requests))  # at most still to come
        self._live = live
        self._chunks: list[Chunk] = []
        self._arrived = asyncio.Event()
        self._ended = asyncio.Event()
        self._open = {(each.request_id, index) for each in requests for index in range(each.settings.n)}
        self._error: Exception | None = None

    async def __aenter__(self) -> "Ticket":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.leave(self)

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
        """On the loop: take one chunk from the engine."""
        self._chunks.append(chunk)
        if not chunk.is_prompt:
            self.owed_tokens = max(0, self.owed_tokens - len(chunk.tokens))
        if chunk.finish_reason is not None:
            self._open.discard((chunk.request_id, chunk.index))
            if not self._open:
                self._ended.set()
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """On the loop: end with an error."""
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


class LiveEngine:
    """Owns the thread that steps an engine; its other methods belong to the event loop that made it."""

    def __init__(self, engine: Engine, *, max_active: int, stall_seconds: float = 60.0) -> None:
        self.engine = engine
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
        `EngineDied` if there is no engine any more, `ValueError` if they are too many for any queue.
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
        ticket = Ticket(self, requests)
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

    def stats(self) -> dict[str, Any]:
        return self.engine.stats()

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
