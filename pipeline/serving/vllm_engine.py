"""The backend that is vLLM: token ids go in, token ids come out, and all that makes text of them is ours.

    start = vllm_starter(settings)
    backend = await start(checkpoint, model, tokenizer)

vLLM runs in a process of its own and schedules there. Here each candidate of a request is one of vLLM's requests, whose
tokens a `Sequence` turns into text: stop strings, half characters, log-probabilities and `best_of` are as they are with
our engine. What vLLM has not is refused in a sentence (`UNSUPPORTED`). One promise of ours is not vLLM's: its last
bits, and so an answer's words, may change with what else is in the batch.
"""

import asyncio
import importlib.util
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

import torch

from model.gpt import GPT
from model.runner import cache_bytes_per_token
from model.sampling import SamplingSettings, TokenLogprob
from model.scheduler import SequenceGroup
from model.sequence import FinishReason, GenerationRequest
from model.sequence import Sequence as TextSequence
from model.tokenizer import Tokenizer
from model.training import choose_precision
from pipeline.config import ServeConfig
from pipeline.serving.backend import Backend, BackendStats, StartBackend, Ticket, score_by_echo, sequences
from pipeline.serving.errors import ApiError, EngineDied, Overloaded
from pipeline.serving.live_engine import cache_bytes_for, places

logger = logging.getLogger("ray.serve")

NOT_INSTALLED = "serve.backend=vllm needs vLLM, which is not installed here: pip install 'gpt-53m[vllm]'."
# Field of a request -> whether it asks for what vLLM has not.
UNSUPPORTED: Mapping[str, Callable[[SamplingSettings], bool]] = {
    "num_beams": lambda settings: settings.num_beams > 1,
    "typical_p": lambda settings: settings.typical_p < 1,
    "prompt_lookup_tokens": lambda settings: settings.prompt_lookup_tokens > 0,
}
# Nobody is phoned, and vLLM's process starts afresh: a fork of a replica would hold its threads' locks.
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


class VllmClient(Protocol):
    """What is used of vLLM's `AsyncLLM`."""

    @property
    def errored(self) -> bool: ...
    def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncGenerator[Any, None]: ...
    def shutdown(self) -> None: ...


Parameters = Callable[..., Any]  # makes vLLM's sampling parameters from named ones


def vllm_starter(settings: ServeConfig) -> StartBackend:
    """Return what starts vLLM with these settings; raises `ValueError` where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(NOT_INSTALLED)

    async def start(checkpoint: Path, model: GPT, tokenizer: Tokenizer) -> Backend:
        dtype = choose_precision(settings.weights, model.embedding.weight.device)
        cache_bytes = cache_bytes_for(settings, model, dtype)
        client, parameters = await asyncio.to_thread(
            start_client,
            checkpoint,
            dtype,
            context_length=model.config.context_length,
            places=places(settings),
            cache_bytes=cache_bytes,
            compiles=model.embedding.weight.is_cuda,
        )
        return VllmEngine(
            client,
            parameters,
            tokenizer,
            weights=name_of(dtype),
            places=places(settings),
            max_queue=settings.max_queue,
            cache_tokens=cache_bytes // cache_bytes_per_token(model.config, dtype),
            spare_rows=model.vocab_size - tokenizer.vocab_size,
        )

    return start


def start_client(
    checkpoint: Path, dtype: torch.dtype, *, context_length: int, places: int, cache_bytes: int, compiles: bool
) -> tuple[VllmClient, Parameters]:
    """Start vLLM's process on a Hugging Face folder; returns when it has read the weights."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm  # type: ignore[import-not-found, unused-ignore]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found, unused-ignore]

    arguments = vllm.AsyncEngineArgs(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        dtype=name_of(dtype),
        max_model_len=context_length,
        max_num_seqs=places,
        kv_cache_memory_bytes=cache_bytes,
        enforce_eager=not compiles,  # on a CPU, where vLLM is tried out, compiling takes minutes
        generation_config="vllm",  # a request's settings alone decide, not the folder's
        logprobs_mode="raw_logprobs",  # the model's own: before temperature, penalties and filters
        max_logprobs=20,
        disable_log_stats=True,
    )
    client = vllm.AsyncLLMEngine.from_engine_args(arguments)

    def parameters(**named: Any) -> Any:
        return vllm.SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA, **named)

    return client, parameters


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class VllmEngine:
    """Hands requests to vLLM and reads its tokens, one task of the event loop for each candidate."""

    def __init__(
        self,
        client: VllmClient,
        parameters: Parameters,
        tokenizer: Tokenizer,
        *,
        weights: str,
        places: int,
        max_queue: int,
        cache_tokens: int,
        spare_rows: int = 0,
    ) -> None:
        self.client = client
        self.weights = weights
        self.places = places  # texts that vLLM generates at once
        self.max_active = places + max_queue
        self.cache_tokens = cache_tokens
        self.steps = 0  # answers of vLLM's, of a token or several
        self._parameters = parameters
        self._tokenizer = tokenizer
        # A folder of somebody else's may have more rows than its tokenizer has tokens; those spell nothing.
        self._allowed = list(range(tokenizer.vocab_size)) if spare_rows else None
        self._tickets: dict[str, Ticket] = {}
        self._groups: dict[str, SequenceGroup] = {}
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._closing = False
        self._error: Exception | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def tickets(self) -> set[Ticket]:
        return set(self._tickets.values())

    def submit(self, requests: Sequence[GenerationRequest]) -> Ticket:
        """Hand requests to vLLM, all or none.

        Raises `ApiError` for what vLLM has not, `Overloaded` if the queue is full, `EngineDied` if vLLM has ended,
        `ValueError` if they are more than fit at once.
        """
        self.check()
        for request in requests:
            refuse_unsupported(request.settings)
        wanted = sum(map(sequences, requests))
        if wanted > self.max_active:
            raise ValueError(f"The request asks for {wanted} sequences at once; at most {self.max_active} fit.")
        if self._active + wanted > self.max_active:
            raise Overloaded("The queue is full.", 1)
        ticket = Ticket(requests)
        self._idle.clear()
        for request in requests:
            self._tickets[request.request_id] = ticket
            seed = secrets.randbits(63) if request.settings.seed is None else request.settings.seed
            numbers = range(request.settings.num_candidates)
            texts = [TextSequence(request, number, seed, self._tokenizer) for number in numbers]
            group = self._groups[request.request_id] = SequenceGroup(request, list(texts))
            self._tasks[request.request_id] = [
                asyncio.get_running_loop().create_task(self._follow(ticket, group, text)) for text in texts
            ]
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Forget a ticket; what vLLM still does for it ends."""
        for request in ticket.requests:
            if self._tickets.pop(request.request_id, None) is not None:
                self._groups.pop(request.request_id)
                for task in self._tasks.pop(request.request_id):
                    task.cancel()
        if not self._tickets:
            self._idle.set()

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Return the log-probability of each token after the first; raises `ValueError` if no answer comes."""
        return await score_by_echo(self, tokens)

    def check(self) -> None:
        """Raise `EngineDied` if vLLM's process has ended."""
        if self._error is not None:
            raise EngineDied(f"vLLM has failed: {self._error}") from self._error
        if self._closing or self.client.errored:
            raise EngineDied("vLLM has stopped.")

    async def close(self, drain_seconds: float) -> None:
        """Let the requests that were taken finish, for a time; then end vLLM, and fail what is left."""
        try:
            if self._tickets:
                await asyncio.wait_for(self._idle.wait(), drain_seconds)
        except TimeoutError:
            logger.warning("Requests were still running after %.0f s; they end with an error.", drain_seconds)
        self._closing = True
        for ticket in self.tickets:
            ticket.fail(EngineDied("The model was unloaded before this request finished."))
        for tasks in self._tasks.values():
            for task in tasks:
                task.cancel()
        await asyncio.to_thread(self.client.shutdown)

    def stats(self) -> BackendStats:
        """What is known on this side of the process; how vLLM shares out its cache, it keeps to itself."""
        open_texts = [text for group in self._groups.values() for text in group.tasks if text.finish_reason is None]
        running = min(len(open_texts), self.places)
        held = sum(len(text.tokens) for text in open_texts[:running] if isinstance(text, TextSequence))
        return BackendStats(running, len(open_texts) - running, min(1.0, held / max(1, self.cache_tokens)), self.steps)

    @property
    def _active(self) -> int:
        return sum(sequences(each) for ticket in self.tickets for each in ticket.requests)

    async def _follow(self, ticket: Ticket, group: SequenceGroup, text: TextSequence) -> None:
        """Read one candidate's tokens until it ends; whatever happens, the ticket hears of it."""
        try:
            seconds = None if group.request.deadline is None else group.request.deadline - time.monotonic()
            async with asyncio.timeout(seconds):
                await self._read(ticket, group, text)
        except TimeoutError:
            self._end(ticket, group, "deadline")
        except ValueError as error:  # what vLLM finds wrong with a request
            ticket.fail(error)
        except Exception as error:
            # vLLM says of its own end in each request; another failure is this request's alone.
            logger.exception("vLLM failed on request %s.", group.request.request_id)
            if self.client.errored:
                self._error = error
                ticket.fail(EngineDied(f"vLLM has failed: {error}"))
            else:
                self._end(ticket, group, "error", f"vLLM failed with {type(error).__name__}.")

    async def _read(self, ticket: Ticket, group: SequenceGroup, text: TextSequence) -> None:
        request, settings = group.request, group.request.settings
        name = f"{request.request_id}-{text.candidate}"
        prompt = {"prompt_token_ids": request.prompt_tokens}
        stop_tokens = sorted({*self._tokenizer.stop_tokens, *settings.stop_tokens})
        named = parameters_of(settings, text.candidate, text.seed, stop_tokens)
        asked = self._parameters(**named, allowed_token_ids=self._allowed)
        async with aclosing(self.client.generate(prompt, asked, name)) as answers:
            async for answer in answers:
                self.steps += 1
                if text.in_prompt:
                    text.num_cached = text.prompt_length
                    text.reused_tokens = answer.num_cached_tokens or 0
                    if text.wants_prompt_logprobs:
                        text.prompt_logprobs += prompt_logprobs(answer.prompt_logprobs, request)
                [output] = answer.outputs
                rows = output.logprobs or [None] * len(output.token_ids)
                for token, row in zip(output.token_ids, rows, strict=True):
                    if text.finish_reason is None:
                        text.accept([token], row and [read_logprob(token, row, settings.logprobs or 0)])
                if text.finish_reason is None and output.finish_reason is not None:
                    # A stop token that is not among the output's.
                    text.finish("stop" if output.finish_reason == "stop" else "error")
                for chunk in group.take_chunks(text):
                    ticket.deliver(chunk)
                if text.finish_reason is not None:
                    return  # a stop string that vLLM does not know of: closing the generator ends its work

    def _end(self, ticket: Ticket, group: SequenceGroup, reason: FinishReason, error: str = "") -> None:
        if not group.ended:
            group.ended = True
            for chunk in group.end(reason, error):
                ticket.deliver(chunk)


def refuse_unsupported(settings: SamplingSettings) -> None:
    """Raise `ApiError` for what our engine does and vLLM does not."""
    for field, is_asked in UNSUPPORTED.items():
        if is_asked(settings):
            message = f"{field} is not supported by this server, which runs vLLM (serve.backend=vllm); leave it out."
            raise ApiError(400, message, code="unsupported", param=field)


def parameters_of(settings: SamplingSettings, candidate: int, seed: int, stop_tokens: list[int]) -> dict[str, Any]:
    """vLLM's names for one candidate's settings; stop strings stay here, where the text is made."""
    ranks = settings.num_candidates > settings.n
    wanted = 0 if settings.logprobs is None and ranks else settings.logprobs
    return {
        "max_tokens": settings.max_tokens,
        "temperature": 0.0 if settings.is_greedy else settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "presence_penalty": settings.presence_penalty,
        "frequency_penalty": settings.frequency_penalty,
        "logit_bias": settings.logit_bias or None,
        # Of one request, each candidate draws numbers of its own; vLLM takes 64 bits with a sign.
        "seed": (seed + candidate) % 2**63,
        "logprobs": wanted,
        "prompt_logprobs": settings.logprobs if settings.echo else None,
        "stop_token_ids": stop_tokens,
        "ignore_eos": True,  # the end of the text is among the stop tokens
    }


def read_logprob(token: int, row: Mapping[int, Any], num_top: int) -> TokenLogprob:
    """A token with its log-probability and the likeliest ones; vLLM's row has them by token, each with its rank."""
    ranked = sorted(row.items(), key=lambda entry: entry[1].rank)
    top = [(other, found.logprob) for other, found in ranked if found.rank <= num_top]
    return TokenLogprob(token, row[token].logprob, top[:num_top])


def prompt_logprobs(rows: Sequence[Mapping[int, Any] | None] | None, request: GenerationRequest) -> list[TokenLogprob]:
    """The prompt's tokens after the first, which has no probability."""
    found = list(rows or ())[1:]
    following = request.prompt_tokens[1:]
    num_top = request.settings.logprobs or 0
    return [read_logprob(token, row or {}, num_top) for token, row in zip(following, found, strict=True)]
