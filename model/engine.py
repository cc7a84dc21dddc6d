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
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.beams import Beams
from model.cores import count_cores
from model.gpt import GPT
from model.runner import WEIGHTS, Runner, TorchRunner, cache_bytes_per_token, compute_dtype
from model.sampling import Draw, SamplingSettings, TokenLogprob, draw_tokens
from model.scheduler import QueueFull, Scheduled, Scheduler, SequenceGroup, Task
from model.sequence import Chunk, FinishReason, GenerationRequest, Sequence
from model.settings import require
from model.tokenizer import Tokenizer

__all__ = ["Chunk", "Engine", "EngineSettings", "GenerationRequest", "QueueFull", "SamplingSettings", "TokenLogprob"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineSettings:
    max_batch_size: int = 0  # texts generated at once: slots of the cache; 0: what suits the device
    cache_bytes: int = 0  # the cache never takes more, but has fewer slots; 0: what suits the device
    prefill_chunk_tokens: int = 0  # of prompts in one step at most, beside the texts being generated; 0: as above
    max_queue: int = 256  # requests waiting at most
    weights: str = "auto"  # auto (bfloat16 where it is fast), as_is, float32, bfloat16 or int8
    backend: str = "auto"  # auto, torch, or kernel (the C++ forward pass; CPU only)
    threads: int = 0  # of the kernel; 0: the cores that may be used

    def __post_init__(self) -> None:
        require(self.max_queue > 0, "The engine's max_queue must be positive.")
        for name in ("max_batch_size", "cache_bytes", "prefill_chunk_tokens", "threads"):
            require(getattr(self, name) >= 0, f"The engine's {name} cannot be negative.")
        require(
            self.weights in WEIGHTS, f"The engine's weights are {self.weights!r}; they can be {', '.join(WEIGHTS)}."
        )
        require(
            self.backend in ("auto", "torch", "kernel"),
            f"The engine's backend is {self.backend!r}; it can be auto, torch or kernel.",
        )


@dataclass(frozen=True)
class Sizes:
    """What suits a kind of device where the settings leave it open."""

    slots: int
    prefill_chunk_tokens: int


# A GPU reads the weights for 128 texts in the time it takes for one, and a prompt of 2,048 tokens keeps it as busy per
# token as a longer one. On a CPU both only make everybody else wait.
SIZES = {"cpu": Sizes(16, 256), "cuda": Sizes(128, 2048)}
CPU_CACHE_BYTES = 2**30
# Of a GPU's free memory: the next version, swapped in while this one still serves, wants a cache too.
FREE_MEMORY_SHARE = 0.5


def sizes_of(device: str) -> Sizes:
    return SIZES.get(device, SIZES["cpu"])


@dataclass
class Pass:
    """What one pass of the model gave: logits [rows, V], and each row's best token or -1, as the runner tells them."""

    logits: Tensor
    best: list[int]


@dataclass
class Ready:
    """A task whose next tokens can be chosen, and the rows of a pass to choose them from."""

    group: SequenceGroup
    task: Task
    ran: Pass
    rows: range

    def logits(self) -> Tensor:
        return self.ran.logits[self.rows.start : self.rows.stop]


class Engine:
    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: EngineSettings | None = None) -> None:
        self.settings = settings or EngineSettings()
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.context_length = model.config.context_length
        require(
            tokenizer.vocab_size <= model.vocab_size,
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {model.vocab_size}; they do not match.",
        )
        self.runner = build_runner(model, self.settings)
        self.runner.vocab_size = tokenizer.vocab_size  # a model may have rows for more: its makers liked a round number
        self.max_draft_tokens = self.runner.max_draft_tokens
        self.cache_bytes_per_token = cache_bytes_per_token(model.config, self.runner.cache_dtype)
        self.scheduler = Scheduler(
            self.runner.num_slots,
            self.settings.max_queue,
            self.settings.prefill_chunk_tokens or sizes_of(model.embedding.weight.device.type).prefill_chunk_tokens,
            has_independent_rows=self.runner.has_independent_rows,
        )
        self._totals = dict.fromkeys(
            ("steps", "prompt_tokens", "reused_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"), 0
        )

    # -- What callers do ---------------------------------------------------------------------------------------------

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `ValueError` with what is wrong with it, or `QueueFull`."""
        self._check(request)
        settings = request.settings
        tasks: list[Task]
        if settings.num_beams > 1:
            tasks = [Beams(request, self.tokenizer)]
        else:
            seed = secrets.randbits(63) if settings.seed is None else settings.seed
            numbers = range(settings.num_candidates)
            tasks = [Sequence(request, number, seed, self.tokenizer, self.max_draft_tokens) for number in numbers]
        self.scheduler.add(SequenceGroup(request, tasks))

    def cancel(self, request_id: str) -> None:
        """Stop a request at the next step; one that is not known, or has ended, is nothing to do."""
        self.scheduler.cancel(request_id)

    def reserve_memory(self) -> None:
        """Take the memory of the whole cache now, for a server: else its first burst of requests waits for it.

        Optional: where few texts are generated, the cache takes no more than they need.
        """
        self.runner.reserve_memory()

    def enter_thread(self) -> None:
        """Prepare the calling thread to step this engine and do nothing else: torch itself may keep to one core in it.

        Optional: steps of a thread that was not prepared give the same tokens, more slowly.
        """
        self.runner.enter_thread()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[Chunk]:
        """End who leaves, schedule, and advance everybody by one pass of the model; return what can be shown now."""
        chunks = [chunk for group, reason in self.scheduler.take_leavers() for chunk in self._end(group, reason)]
        scheduled = self.scheduler.schedule()
        for copied in self.scheduler.take_copies():
            self.runner.copy(copied.source, copied.target, copied.num_tokens)
        chunks += self._advance(scheduled)
        self._totals["steps"] += 1
        return chunks

    def stats(self) -> dict[str, Any]:
        """What an operator wants to see, now and in total."""
        return {
            "queue": self.scheduler.num_queued,
            "running": self.scheduler.num_running,
            "slots": self.runner.num_slots,
            "cache_used_tokens": self.scheduler.cached_tokens,
            "cache_capacity_tokens": self.runner.num_slots * self.context_length,
            "cache_bytes": self.runner.num_slots * self.context_length * self.cache_bytes_per_token,
            "weights": self.runner.weights,
            "weight_bytes": self.runner.weight_bytes(),
            **self._totals,
        }

    # -- One step ----------------------------------------------------------------------------------------------------

    def _advance(self, scheduled: list[Scheduled]) -> list[Chunk]:
        """Run one pass of the model and take every task one step on."""
        if not scheduled:
            return []
        try:
            ran = Pass(self.runner.run([item for one in scheduled for item in one.work]), self.runner.best_tokens())
        except Exception as error:
            if len(scheduled) > 1:
                # Running again alone is harmless (it writes the same keys and values) and finds whose fault it was.
                return [chunk for one in scheduled if not one.group.ended for chunk in self._advance([one])]
            return self._fail(scheduled[0].group, "The model", error)
        chunks: list[Chunk] = []
        ready: list[Ready] = []
        stop = 0
        for one in scheduled:
            rows = range(stop, stop := stop + sum([item.num_logits for item in one.work]))
            if one.group.ended:
                continue
            if -1 in ran.best[rows.start : rows.stop]:
                chunks += self._end(one.group, "error", "The model's output is not a number.")
                continue
            try:
                ready += self._read(one, ran, rows)
            except Exception as error:
                chunks += self._fail(one.group, "Reading the prompt", error)
        return chunks + self._sample(ready)

    def _read(self, scheduled: Scheduled, ran: Pass, rows: range) -> list[Ready]:
        """Note what of a prompt has run; return the tasks that have rows of logits to choose tokens from."""
        group, task = scheduled.group, scheduled.task
        if not task.in_prompt:
            return [Ready(group, task, ran, rows)]
        [item] = scheduled.work
        task.read_prompt(len(item.tokens), ran.logits[rows.start : rows.stop])
        self._totals["prompt_tokens"] += len(item.tokens)
        if task.in_prompt:
            return []
        group.prompt_reader = None
        self._totals["reused_tokens"] += task.reused_tokens
        last = rows[-1:]
        ready = [Ready(group, task, ran, last)]
        for other in group.tasks:
            if other.slots and other.in_prompt:  # it waited for this prompt
                self.runner.copy(task.slots[0], other.slots[0], len(group.request.prompt_tokens))
                other.share_prompt(task)
                ready.append(Ready(group, other, ran, last))
        return ready

    def _sample(self, ready: list[Ready]) -> list[Chunk]:
        """Choose the next tokens of all tasks together, and say what came of them."""
        ready = [one for one in ready if not one.group.ended]
        if not ready:
            return []
        try:
            chosen = self._choose(ready)
        except Exception as error:
            if len(ready) > 1:
                # Nothing was taken yet, and choosing again gives the same tokens: alone, so only one can fail.
                return [chunk for one in ready for chunk in self._sample([one])]
            return self._fail(ready[0].group, "Choosing a token", error)
        chunks: list[Chunk] = []
        for one, tokens in zip(ready, chosen, strict=True):
            if one.group.ended:
                continue
            try:
                chunks += self._take(one, tokens)
            except Exception as error:
                chunks += self._fail(one.group, "Taking a token", error)
        return chunks

    def _choose(self, ready: list[Ready]) -> list[list[int]]:
        """Choose a token for each draw of each task; those whose settings want no more take the pass's best."""
        chosen: list[list[int]] = []
        places: list[tuple[list[int], int]] = []  # where the tokens go that are drawn
        rows: list[int] = []
        drawn: list[Draw] = []
        for one in ready:
            tokens: list[int] = []
            for row, draw in zip(one.rows, one.task.draws(), strict=False):  # beams draw nothing
                best, settings = one.ran.best[row], draw.settings
                if not settings.takes_best or best in settings.logit_bias:
                    places.append((tokens, len(tokens)))
                    rows.append(row)
                    drawn.append(draw)
                tokens.append(best)
            chosen.append(tokens)
        if drawn:
            # A copy of the logits, because log-probabilities are told from the model's own.
            for (tokens, place), token in zip(places, draw_tokens(ready[0].ran.logits[rows], drawn), strict=True):
                tokens[place] = token
        return chosen

    def _take(self, ready: Ready, tokens: list[int]) -> list[Chunk]:
        """Give a task its tokens, and return what of its request can be shown now."""
        group, task = ready.group, ready.task
        advance = task.advance(ready.logits, tokens)  # which reads them only where it has to
        for source, target, num_tokens in advance.copies:
            self.runner.copy(source, target, num_tokens)
        self._totals["generated_tokens"] += advance.generated
        self._totals["drafted_tokens"] += advance.drafted
        self._totals["accepted_tokens"] += max(advance.generated - 1, 0)
        if task.finish_reason is not None:
            self.scheduler.release(group, task)
        chunks = group.take_chunks(task)
        if group.is_done:
            self.scheduler.end(group)
        return chunks

    def _fail(self, group: SequenceGroup, what: str, error: Exception) -> list[Chunk]:
        """End the request whose fault an exception was; everybody else goes on."""
        log.error("%s failed for request %s.", what, group.request.request_id, exc_info=error)
        return self._end(group, "error", f"{what} failed with {type(error).__name__}.")

    def _end(self, group: SequenceGroup, reason: FinishReason, error: str = "") -> list[Chunk]:
        """Stop a whole request; each answer that has not ended gets a last chunk that says why."""
        if reason == "error":
            for task in group.tasks:
                for slot in task.slots:
                    self.runner.clear(slot)
        self.scheduler.end(group, keep=reason != "error")
        return group.end(reason, error)

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
        fast = kernel is not None or (device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
        weights = "bfloat16" if fast else "float32"
    if kernel is not None and weights == "as_is":
        weights = "float32" if model.embedding.weight.dtype == torch.float32 else "bfloat16"
    dtype = kernel_cache_dtype(weights) if kernel is not None else compute_dtype(model, weights)
    slot_bytes = model.config.context_length * cache_bytes_per_token(model.config, dtype)
    free_bytes = torch.cuda.mem_get_info(model.embedding.weight.device)[0] if device == "cuda" else 0
    num_slots = count_slots(settings, device, slot_bytes, free_bytes)
    if kernel is not None:
        return KernelRunner(kernel, model, num_slots, weights, settings.threads or count_cores())
    return TorchRunner(model, num_slots, weights, use_graph=settings.backend != "torch")


def count_slots(settings: EngineSettings, device: str, slot_bytes: int, free_bytes: int) -> int:
    """How many texts the cache holds: as many as were asked for or suit the device, if they fit.

    Raises `ValueError` where not even one does.
    """
    allowed = settings.cache_bytes or (int(FREE_MEMORY_SHARE * free_bytes) if device == "cuda" else CPU_CACHE_BYTES)
    num_slots = min(settings.max_batch_size or sizes_of(device).slots, allowed // slot_bytes)
    whose = "the engine's cache_bytes allow" if settings.cache_bytes else "there is room for"
    require(num_slots > 0, f"One text of the whole context takes {slot_bytes} bytes of cache; {whose} {allowed}.")
    return num_slots
