"""The engine: many requests, one model, every step of it shared (continuous batching).

    engine = Engine(model, tokenizer, EngineSettings())
    engine.add(GenerationRequest("a", tokenizer.encode("Once").tolist(), SamplingSettings(max_tokens=20)))
    while engine.has_work:
        for chunk in engine.step():
            print(chunk.text, end="")

A request waits in the queue until slots of the cache are free, joins the batch at the next step, and leaves it at
the step it ends. `step` belongs to one thread; `add` and `cancel` may be called from any other.
"""

import logging
import secrets
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.beams import Beams
from model.cores import count_cores
from model.gpt import GPT
from model.runner import WEIGHTS, Runner, TorchRunner, cache_bytes_per_token, compute_dtype
from model.sampling import SamplingSettings, TokenLogprob, are_numbers, choose, penalize, token_logprobs, uniform
from model.sequence import Chunk, FinishReason, GenerationRequest, Sequence, Work
from model.settings import require
from model.tokenizer import Tokenizer

__all__ = ["Chunk", "Engine", "EngineSettings", "GenerationRequest", "QueueFull", "SamplingSettings", "TokenLogprob"]

log = logging.getLogger(__name__)

Task = Sequence | Beams  # what holds slots: one text, or all beams of a search


class QueueFull(Exception):
    """As many requests wait as may wait; the caller should try again later."""


@dataclass(frozen=True)
class EngineSettings:
    max_batch_size: int = 16  # texts generated at once: slots of the cache
    cache_bytes: int = 2**30  # the cache never takes more; fewer slots if they would not fit
    prefill_chunk_tokens: int = 256  # prompt tokens that one step runs at most, beside the texts being generated
    max_queue: int = 256  # requests waiting at most
    max_lookup_tokens: int = 8  # the most that a request's prompt_lookup_tokens may be
    weights: str = "auto"  # auto (bfloat16 where it is fast), as_is, float32, bfloat16 or int8
    backend: str = "auto"  # auto, torch, or kernel (the C++ forward pass; CPU only)
    threads: int = 0  # of the kernel; 0: the cores that may be used

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "cache_bytes", "prefill_chunk_tokens", "max_queue"):
            require(getattr(self, name) > 0, f"The engine's {name} must be positive.")
        for name in ("max_lookup_tokens", "threads"):
            require(getattr(self, name) >= 0, f"The engine's {name} cannot be negative.")
        require(
            self.weights in WEIGHTS, f"The engine's weights are {self.weights!r}; they can be {', '.join(WEIGHTS)}."
        )
        require(
            self.backend in ("auto", "torch", "kernel"),
            f"The engine's backend is {self.backend!r}; it can be auto, torch or kernel.",
        )


@dataclass
class Answer:
    """One request on its way: its texts in the making, and what was said of them."""

    request: GenerationRequest
    tasks: list[Task]
    prompt_reader: Task | None = None  # runs the prompt; texts beside it wait and take a copy
    started: bool = False  # has had a slot

    @property
    def ranks(self) -> bool:
        """Whether more texts are made than answered, so that nothing can be shown before all have ended."""
        return self.request.settings.num_candidates > self.request.settings.n


Scheduled = tuple[Answer, Task, list[Work]]


class Engine:
    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: EngineSettings | None = None) -> None:
        self.settings = settings or EngineSettings()
        self.tokenizer = tokenizer
        self.vocab_size = model.vocab_size
        self.context_length = model.config.context_length
        require(
            tokenizer.vocab_size == model.vocab_size,
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {model.vocab_size}; they do not match.",
        )
        self.runner = build_runner(model, self.settings)
        self.max_draft_tokens = self.runner.max_draft_tokens
        self.cache_bytes_per_token = cache_bytes_per_token(model.config, self.runner.cache_dtype)
        self._free = list(range(self.runner.num_slots))
        self._arrivals: deque[Answer] = deque()
        self._cancelled: deque[str] = deque()
        self._answers: dict[str, Answer] = {}
        self._waiting: deque[tuple[Answer, Task]] = deque()
        self._running: list[tuple[Answer, Task]] = []
        self._num_queued = 0  # answers that have had no slot yet, arrivals aside
        self._known: set[str] = set()
        self._totals = dict.fromkeys(
            ("steps", "prompt_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"), 0
        )

    # -- What callers do ---------------------------------------------------------------------------------------------

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `ValueError` with what is wrong with it, or `QueueFull`."""
        self._check(request)
        # Those for whom a slot is free do not wait: the next step takes them.
        if len(self._arrivals) + self._num_queued >= self.settings.max_queue + len(self._free):
            raise QueueFull(f"{self.settings.max_queue} requests are waiting; try again later.")
        settings = request.settings
        tasks: list[Task]
        if settings.num_beams > 1:
            tasks = [Beams(request, self.tokenizer)]
        else:
            seed = secrets.randbits(63) if settings.seed is None else settings.seed
            numbers = range(settings.num_candidates)
            tasks = [Sequence(request, number, seed, self.tokenizer, self.max_draft_tokens) for number in numbers]
        self._known.add(request.request_id)
        self._arrivals.append(Answer(request, tasks))

    def cancel(self, request_id: str) -> None:
        """Stop a request at the next step; one that is not known, or has ended, is nothing to do."""
        self._cancelled.append(request_id)

    def enter_thread(self) -> None:
        """Prepare the calling thread to step this engine and do nothing else: torch itself may keep to one core in it.

        Optional: steps of a thread that was not prepared give the same tokens, more slowly.
        """
        self.runner.enter_thread()

    @property
    def has_work(self) -> bool:
        return bool(self._arrivals or self._answers)

    def step(self) -> list[Chunk]:
        """Schedule, run, sample, emit: one pass of the model for everybody."""
        chunks = self._take_arrivals_and_leavers()
        scheduled = self._schedule()
        chunks += self._advance(scheduled)
        self._totals["steps"] += 1
        return chunks

    def stats(self) -> dict[str, Any]:
        """What an operator wants to see, now and in total."""
        return {
            "queue": len(self._arrivals) + self._num_queued,
            "running": len(self._running),
            "slots": self.runner.num_slots,
            "cache_used_tokens": sum(task.cached_tokens for _, task in list(self._running)),
            "cache_capacity_tokens": self.runner.num_slots * self.context_length,
            "cache_bytes": self.runner.num_slots * self.context_length * self.cache_bytes_per_token,
            "weights": self.runner.weights,
            "weight_bytes": self.runner.weight_bytes(),
            **self._totals,
        }

    # -- Schedule ----------------------------------------------------------------------------------------------------

    def _take_arrivals_and_leavers(self) -> list[Chunk]:
        """Let requests in, and those out that were cancelled or are past their deadline."""
        while self._arrivals:
            answer = self._arrivals.popleft()
            self._answers[answer.request.request_id] = answer
            self._waiting.extend((answer, task) for task in answer.tasks)
            self._num_queued += 1
        leaving: dict[str, FinishReason] = {}
        while self._cancelled:
            leaving[self._cancelled.popleft()] = "cancelled"
        now = time.monotonic()
        for request_id, answer in self._answers.items():
            deadline = answer.request.deadline
            if deadline is not None and deadline <= now:
                leaving.setdefault(request_id, "deadline")
        chunks: list[Chunk] = []
        for request_id, reason in leaving.items():
            if request_id in self._answers:
                chunks += self._end(self._answers[request_id], reason)
        return chunks

    def _schedule(self) -> list[Scheduled]:
        """Fill free slots from the queue, then choose: every text its next token, prompts as far as the step allows."""
        while self._waiting and len(self._free) >= self._waiting[0][1].num_slots:
            answer, task = self._waiting.popleft()
            task.slots = [self._free.pop() for _ in range(task.num_slots)]
            self._num_queued -= not answer.started
            answer.started = True
            if answer.prompt_reader is None:
                answer.prompt_reader = task
            self._running.append((answer, task))
        scheduled = []
        budget = chunk_tokens = self.settings.prefill_chunk_tokens
        for answer, task in self._running:
            if task.in_prompt and task is not answer.prompt_reader:
                continue  # waits for the prompt that is being read for it
            work = task.next_work(chunk_tokens)
            if task.in_prompt:
                # A chunk is never cut to fit the others: its shape is its own, and so are its last bits.
                if len(work[0].tokens) > budget:
                    continue
                budget -= len(work[0].tokens)
            scheduled.append((answer, task, work))
        return scheduled

    # -- Run, sample -------------------------------------------------------------------------------------------------

    def _advance(self, scheduled: list[Scheduled]) -> list[Chunk]:
        """Run one pass of the model and take every text one step on."""
        if not scheduled:
            return []
        try:
            logits = self.runner.run([item for _, _, work in scheduled for item in work])
            healthy = are_numbers(logits)
        except Exception as error:
            if len(scheduled) > 1:
                # Running again alone is harmless (it writes the same keys and values) and finds whose fault it was.
                return [chunk for one in scheduled if self._knows(one[0]) for chunk in self._advance([one])]
            log.exception("A step failed for request %s.", scheduled[0][0].request.request_id)
            return self._end(scheduled[0][0], "error", f"The model failed with {type(error).__name__}.")
        return self._take_tokens(scheduled, logits, healthy)

    def _take_tokens(self, scheduled: list[Scheduled], logits: Tensor, healthy: list[bool]) -> list[Chunk]:
        """Choose from the logits [rows, V] of everybody's work, and say what came of it."""
        chunks: list[Chunk] = []
        rows: list[tuple[Answer, Task, Tensor]] = []
        first = 0
        for answer, task, work in scheduled:
            num_rows = sum(item.num_logits for item in work)
            if all(healthy[first : first + num_rows]):
                rows += self._read(answer, task, work, logits[first : first + num_rows])
            elif self._knows(answer):
                chunks += self._end(answer, "error", "The model's output is not a number.")
            first += num_rows
        rows = [row for row in rows if self._knows(row[0])]
        self._sample([(answer, task, part) for answer, task, part in rows if isinstance(task, Sequence)])
        for _, task, part in rows:
            if isinstance(task, Beams):
                for source, target in task.advance(part):
                    self.runner.copy(source, target, task.num_cached)
        return chunks + self._emit([(answer, task) for answer, task, _ in rows])

    def _read(self, answer: Answer, task: Task, work: list[Work], logits: Tensor) -> list[tuple[Answer, Task, Tensor]]:
        """Note what of a prompt has run; return the texts that have logits [rows, V] to choose tokens from."""
        if not task.in_prompt:
            return [(answer, task, logits)]
        reader = task.prompt if isinstance(task, Beams) else task
        [item] = work
        reader.num_cached += len(item.tokens)
        self._totals["prompt_tokens"] += len(item.tokens)
        if reader.wants_prompt_logprobs:
            following = reader.tokens[item.start + 1 : reader.num_cached + 1]
            num_top = reader.settings.logprobs or 0
            reader.prompt_logprobs += token_logprobs(logits[: len(following)], following, num_top)
        if task.in_prompt:
            return []
        answer.prompt_reader = None
        ready: list[tuple[Answer, Task, Tensor]] = [(answer, task, logits[-1:])]
        for _, other in self._running:
            if isinstance(other, Sequence) and other.request is answer.request and other.in_prompt:
                self.runner.copy(task.slots[0], other.slots[0], reader.prompt_length)
                other.num_cached = reader.prompt_length
                other.prompt_logprobs = reader.prompt_logprobs
                ready.append((answer, other, logits[-1:]))
        return ready

    def _sample(self, rows: list[tuple[Answer, Sequence, Tensor]]) -> None:
        """Choose the next token of each text, and those after its drafted tokens, all rows together."""
        if not rows:
            return
        logits = torch.cat([part for _, _, part in rows])  # a copy: log-probabilities are told from the model's own
        settings: list[SamplingSettings] = []
        uniforms: list[float] = []
        for _, sequence, _ in rows:
            wanted, draft = sequence.settings, sequence.draft
            for place in range(1 + len(draft)):
                if wanted.adjusts_logits:
                    generated = sequence.generated + draft[:place]
                    penalize(logits[len(settings)], wanted, sequence.request.prompt_tokens, generated)
                position = len(sequence.tokens) + place
                drawn = uniform(sequence.seed, sequence.candidate, position) if wanted.temperature else 0.0
                settings.append(wanted)
                uniforms.append(drawn)
        chosen = choose(logits, settings, uniforms)
        first = 0
        for answer, sequence, part in rows:
            tokens = chosen[first : first + 1 + len(sequence.draft)]
            first += len(tokens)
            num_top = sequence.settings.logprobs
            logprobs = None
            if num_top is not None or answer.ranks:
                logprobs = token_logprobs(part, tokens, num_top or 0)
            before, drafted = len(sequence.tokens), len(sequence.draft)
            sequence.accept(tokens, logprobs)
            self._totals["generated_tokens"] += len(sequence.tokens) - before
            self._totals["drafted_tokens"] += drafted
            self._totals["accepted_tokens"] += max(len(sequence.tokens) - before - 1, 0)

    # -- Emit --------------------------------------------------------------------------------------------------------

    def _emit(self, advanced: list[tuple[Answer, Task]]) -> list[Chunk]:
        """Return what can be shown now, and free the places of texts that have ended."""
        chunks: list[Chunk] = []
        for answer, task in advanced:
            if task.finish_reason is not None:
                self._release(task)
            if isinstance(task, Sequence) and not answer.ranks:
                if task.settings.echo and not task.echoed:
                    task.echoed = True
                    chunks.append(task.prompt_chunk(task.candidate))
                chunk = task.take_chunk(task.candidate)
                if chunk is not None:
                    chunks.append(chunk)
            if self._knows(answer) and all(other.finish_reason is not None for other in answer.tasks):
                chunks += _ranked_chunks(answer)
                self._forget(answer)
        return chunks

    def _end(self, answer: Answer, reason: FinishReason, error: str = "") -> list[Chunk]:
        """Stop a whole request; each answer that has not ended gets a last chunk that says why."""
        chunks: list[Chunk] = []
        for task in answer.tasks:
            if task.finish_reason is None:
                if reason == "error":
                    for slot in task.slots:
                        self.runner.clear(slot)
                self._release(task)
                if isinstance(task, Sequence) and not answer.ranks:
                    task.finish(reason)
                    chunk = task.take_chunk(task.candidate)
                    assert chunk is not None
                    chunks.append(replace(chunk, error=error))
        if not chunks:
            request = answer.request
            numbers = range(request.settings.n)
            chunks = [Chunk(request.request_id, number, "", [], None, reason, error=error) for number in numbers]
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] is not answer)
        if not answer.started:
            self._num_queued -= 1
        self._forget(answer)
        return chunks

    def _release(self, task: Task) -> None:
        self._free += task.slots
        task.slots = []
        self._running = [running for running in self._running if running[1] is not task]

    def _forget(self, answer: Answer) -> None:
        del self._answers[answer.request.request_id]
        self._known.discard(answer.request.request_id)

    def _knows(self, answer: Answer) -> bool:
        return answer.request.request_id in self._answers

    def _check(self, request: GenerationRequest) -> None:
        settings, prompt = request.settings, request.prompt_tokens
        require(bool(prompt), "The prompt has no tokens; start from the end-of-text token for a new document.")
        require(
            all(0 <= token < self.tokenizer.vocab_size for token in prompt),
            f"The prompt has a token id outside 0 to {self.tokenizer.vocab_size - 1}.",
        )
        require(
            len(prompt) + settings.max_tokens <= self.context_length,
            f"The prompt has {len(prompt)} tokens and max_tokens is {settings.max_tokens}; "
            f"together they may not exceed the model's context of {self.context_length}.",
        )
        for name, tokens in (("logit_bias", settings.logit_bias), ("stop_tokens", settings.stop_tokens)):
            require(
                all(token < self.tokenizer.vocab_size for token in tokens),
                f"{name} has a token id above {self.tokenizer.vocab_size - 1}, the last of the vocabulary.",
            )
        require(
            settings.num_beams <= self.runner.num_slots,
            f"num_beams is {settings.num_beams}; this engine has {self.runner.num_slots} places.",
        )
        require(request.request_id not in self._known, f"There is a request {request.request_id!r} already.")


def _ranked_chunks(answer: Answer) -> list[Chunk]:
    """Return the chunks of answers that could only be chosen at the end: beams, and the best n of best_of."""
    chunks: list[Chunk] = []
    if isinstance(answer.tasks[0], Beams):
        chunks = answer.tasks[0].take_chunks()
    elif answer.ranks:
        sequences = [task for task in answer.tasks if isinstance(task, Sequence)]
        sequences.sort(key=lambda sequence: -sequence.mean_logprob)
        for index, sequence in enumerate(sequences[: answer.request.settings.n]):
            if sequence.settings.echo:
                chunks.append(sequence.prompt_chunk(index))
            chunk = sequence.take_chunk(index)
            assert chunk is not None
            chunks.append(chunk)
    return chunks


def build_runner(model: GPT, settings: EngineSettings) -> Runner:
    """Choose what runs the model here, with as many slots as the cache's bound allows."""
    device = model.embedding.weight.device.type
    require(settings.backend != "kernel" or device == "cpu", "The engine's backend=kernel is for the CPU.")
    kernel = None
    if device == "cpu" and settings.backend != "torch":
        with suppress(ModuleNotFoundError):  # without the folder model/cpu torch serves, more slowly
            from model.cpu.kernel import KernelRunner, kernel_cache_dtype, load_kernel

            kernel = load_kernel()
    require(
        settings.backend != "kernel" or kernel is not None,
        "The engine's backend=kernel needs the folder model/cpu and a C++ compiler; take backend=auto without them.",
    )
    weights = settings.weights
    if weights == "auto":
        # The kernel reads bfloat16 at full speed anywhere; torch only where the hardware multiplies it.
        fast = kernel is not None or (device == "cuda" and torch.cuda.is_bf16_supported())
        weights = "bfloat16" if fast else "float32"
    if kernel is not None and weights == "as_is":
        weights = "float32" if model.embedding.weight.dtype == torch.float32 else "bfloat16"
    dtype = kernel_cache_dtype(weights) if kernel is not None else compute_dtype(model, weights)
    slot_bytes = model.config.context_length * cache_bytes_per_token(model.config, dtype)
    num_slots = min(settings.max_batch_size, settings.cache_bytes // slot_bytes)
    require(
        num_slots > 0,
        f"One text of {model.config.context_length} tokens takes {slot_bytes} bytes of cache; "
        f"the engine's cache_bytes allow {settings.cache_bytes}.",
    )
    if kernel is not None:
        return KernelRunner(
            kernel, model, num_slots, weights, settings.max_lookup_tokens, settings.threads or count_cores()
        )
    return TorchRunner(model, num_slots, weights, settings.max_lookup_tokens, use_graph=settings.backend != "torch")
