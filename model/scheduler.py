"""Which texts run in the next step: the slots of the cache, the queue before them, and how much of the prompts is read.

    scheduler = Scheduler(num_slots=16, max_queue=256, prefill_chunk_tokens=256)
    scheduler.add(group)
    for one in scheduler.schedule(): ...        # what one pass of the model runs
    for copied in scheduler.take_copies(): ...  # before that pass, in this order
    scheduler.release(group, task); scheduler.end(group)

A slot that is free keeps the text that it holds, and a prompt that begins so does not read that beginning again. The
prompt goes on in that slot, or in a copy where the slot holds much else.

A request is a `SequenceGroup`: tasks that share its prompt. A task holds slots and goes on step by step; it is one
text (`Sequence`) or all beams of a search (`Beams`).
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from model.sampling import Draw, TokenLogprob
from model.sequence import Advance, Chunk, FinishReason, GenerationRequest, Work


class QueueFull(Exception):
    """As many requests wait as may wait; the caller should try again later."""


class Task(Protocol):
    slots: list[int]  # of the cache; empty before the task has its place, and after it has ended
    finish_reason: FinishReason | None

    @property
    def prompt_logprobs(self) -> list[TokenLogprob]:
        """The prompt's tokens with their log-probabilities, where `echo` asks for them."""

    @property
    def reused_tokens(self) -> int:
        """Tokens of the prompt that its slot held from before."""

    @property
    def num_slots(self) -> int:
        """Slots that the task needs, all at once."""

    @property
    def in_prompt(self) -> bool:
        """Whether part of the prompt has yet to run."""

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values its slots hold."""

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token, by which `best_of` ranks."""

    def next_work(self, chunk_tokens: int) -> list[Work]:
        """Return what the model runs next for the task: a chunk of the prompt, or the newest tokens."""

    def read_prompt(self, num_tokens: int, logits: Tensor) -> None:
        """Note that so many more tokens of the prompt have run and gave these logits [rows, V]."""

    @property
    def reusable_prompt(self) -> list[int]:
        """The prompt as far as a slot may hold it from before."""

    @property
    def held_tokens(self) -> list[int]:
        """What its slot holds: the prompt as far as it was read, and of the answer all but the newest token.

        Empty where its slots hold several texts.
        """

    def reuse_prompt(self, num_tokens: int) -> None:
        """Note that the first slot holds so much of the prompt from before."""

    def share_prompt(self, reader: "Task") -> None:
        """Note that the slot holds the whole prompt, copied from the task that has read it."""

    def draws(self) -> list[Draw]:
        """Return what decides each token that is to be chosen now; none where the task chooses by itself."""

    def advance(self, logits: Callable[[], Tensor], chosen: list[int]) -> Advance:
        """Go on, given what reads the logits [rows, V] of the work, and the tokens chosen for `draws`."""

    def take_chunks(self, index: int) -> list[Chunk]:
        """Return what can be shown since the last call, as answer number `index`."""

    def end(self, index: int, reason: FinishReason) -> list[Chunk]:
        """Stop here; return the last chunk if the task has shown its text as it came."""


@dataclass(eq=False)
class SequenceGroup:
    """One request on its way: its tasks, and which of them reads the prompt for all."""

    request: GenerationRequest
    tasks: list[Task]
    prompt_reader: Task | None = None
    ended: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_tokens)

    @property
    def is_done(self) -> bool:
        return all(task.finish_reason is not None for task in self.tasks)

    @property
    def ranks(self) -> bool:
        """Whether more texts are made than answered, so that nothing can be shown before all have ended."""
        return self.request.settings.num_candidates > self.request.settings.n

    def take_chunks(self, task: Task) -> list[Chunk]:
        """Return what can be shown after `task` went on: its own text, or the best n texts once all have ended."""
        if not self.ranks:
            return task.take_chunks(self.tasks.index(task))
        if not self.is_done:
            return []
        best = sorted(self.tasks, key=lambda each: -each.mean_logprob)[: self.request.settings.n]
        return [chunk for index, each in enumerate(best) for chunk in each.take_chunks(index)]

    def end(self, reason: FinishReason, error: str = "") -> list[Chunk]:
        """Stop the whole request; each answer that has not ended gets a last chunk that says why."""
        chunks: list[Chunk] = []
        if not self.ranks:
            for index, task in enumerate(self.tasks):
                if task.finish_reason is None:
                    chunks += task.end(index, reason)
        if not chunks:
            numbers = range(self.request.settings.n)
            chunks = [Chunk(self.request.request_id, number, "", [], None, reason) for number in numbers]
        return [replace(chunk, error=error) for chunk in chunks]


@dataclass(frozen=True)
class Held:
    """What a free slot still holds of a text, and whose it was."""

    owner: str
    tokens: list[int]


@dataclass(frozen=True)
class Copy:
    """The first tokens of one slot that another slot is to hold too."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True)
class Scheduled:
    """A task that runs in this step, and what of it."""

    group: SequenceGroup
    task: Task
    work: list[Work]


class Scheduler:
    """`add`, `cancel` and the counts may be used from any thread, all else from the one that steps the engine."""

    def __init__(
        self, num_slots: int, max_queue: int, prefill_chunk_tokens: int, *, has_independent_rows: bool = False
    ) -> None:
        self.num_slots = num_slots
        self.max_queue = max_queue
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.has_independent_rows = has_independent_rows  # see `Runner`
        self._free = list(range(num_slots))  # the one that was freed last at the end
        self._held: dict[int, Held] = {}  # of free slots
        self._copies: list[Copy] = []
        self._arrivals: deque[SequenceGroup] = deque()  # added, and not yet taken in by a step
        self._cancelled: deque[str] = deque()
        self._groups: dict[str, SequenceGroup] = {}  # all that were taken in and have not ended
        self._queue: deque[SequenceGroup] = deque()  # of those, the ones without any slot
        self._unplaced: deque[tuple[SequenceGroup, Task]] = deque()  # tasks that wait beside others of their group
        self._running: list[tuple[SequenceGroup, Task]] = []  # tasks with slots
        self._known: set[str] = set()  # the names of all requests that have not ended

    # -- From any thread ---------------------------------------------------------------------------------------------

    def add(self, group: SequenceGroup) -> None:
        """Queue a request. Raises `ValueError` if its name is taken, `QueueFull` if too many wait."""
        name = group.request.request_id
        if name in self._known:
            raise ValueError(f"There is a request {name!r} already.")
        # Those for whom a slot is free do not wait: the next step takes them.
        if self.num_queued >= self.max_queue + self.num_free:
            raise QueueFull(f"{self.max_queue} requests are waiting; try again later.")
        self._known.add(name)
        self._arrivals.append(group)

    def cancel(self, request_id: str) -> None:
        """Stop a request at the next step; one that is not known, or has ended, is nothing to do."""
        self._cancelled.append(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self._arrivals or self._groups)

    @property
    def num_queued(self) -> int:
        """Requests that have had no slot yet."""
        return len(self._arrivals) + len(self._queue)

    @property
    def num_running(self) -> int:
        """Tasks that have slots."""
        return len(self._running)

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    @property
    def cached_tokens(self) -> int:
        """Tokens that the cache holds for all tasks."""
        return sum(task.cached_tokens for _, task in list(self._running))

    # -- From the engine's thread ------------------------------------------------------------------------------------

    def take_leavers(self) -> list[tuple[SequenceGroup, FinishReason]]:
        """Take in the requests that have come; return those that were cancelled or are past their deadline."""
        while self._arrivals:
            group = self._arrivals.popleft()
            self._groups[group.request.request_id] = group
            self._queue.append(group)
        reasons: dict[str, FinishReason] = {}
        while self._cancelled:
            reasons[self._cancelled.popleft()] = "cancelled"
        now = time.monotonic()
        for name, group in self._groups.items():
            if group.request.deadline is not None and group.request.deadline <= now:
                reasons.setdefault(name, "deadline")
        return [(self._groups[name], reason) for name, reason in reasons.items() if name in self._groups]

    def schedule(self) -> list[Scheduled]:
        """Fill free slots from the queue, then choose: every text its next token, prompts as far as the step allows."""
        self._place()
        scheduled: list[Scheduled] = []
        budget = self.prefill_chunk_tokens
        for group, task in self._running:
            if task.in_prompt and task is not group.prompt_reader:
                continue  # waits for the prompt that another task reads for it
            work = task.next_work(self.prefill_chunk_tokens)
            if task.in_prompt:
                # The rows of a chunk are computed together. Cutting the chunk to fit beside the others would change
                # the order of additions, and so the last bits.
                if len(work[0].tokens) > budget:
                    continue
                budget -= len(work[0].tokens)
            scheduled.append(Scheduled(group, task, work))
        return scheduled

    def take_copies(self) -> list[Copy]:
        """Return what is to be copied before the scheduled work runs, in this order."""
        copies, self._copies = self._copies, []
        return copies

    def release(self, group: SequenceGroup, task: Task, keep: bool = True) -> None:
        """Free the slots of a task that has ended; what they hold of its text may serve the next one, if `keep`."""
        held = self._reusable(group, task) if keep else []
        for slot in task.slots:
            if held:
                self._held[slot] = Held(group.request.owner, held)
        self._free += task.slots
        task.slots = []
        self._running = [running for running in self._running if running[1] is not task]

    def end(self, group: SequenceGroup, keep: bool = True) -> None:
        """Forget a request, and free what its tasks hold."""
        for task in group.tasks:
            self.release(group, task, keep)
        self._queue = deque(each for each in self._queue if each is not group)
        self._unplaced = deque(each for each in self._unplaced if each[0] is not group)
        group.ended = True
        del self._groups[group.request.request_id]
        self._known.discard(group.request.request_id)

    def _place(self) -> None:
        """Give free slots to tasks, in the order in which their requests came."""
        while self._unplaced or self._queue:
            group, task = self._unplaced[0] if self._unplaced else (self._queue[0], self._queue[0].tasks[0])
            if len(self._free) < task.num_slots:
                return
            if not self._unplaced:
                self._unplaced.extend((group, each) for each in self._queue.popleft().tasks)
            self._unplaced.popleft()
            if group.prompt_reader is None:
                group.prompt_reader = task
                task.slots = self._take_prefix(group.request.owner, task)
            task.slots += [self._take_empty() for _ in range(task.num_slots - len(task.slots))]
            self._running.append((group, task))

    def _reusable(self, group: SequenceGroup, task: Task) -> list[int]:
        """What a task's slot holds that would have the same bits if it were read as the beginning of a prompt.

        All of it where rows are independent. Elsewhere a prompt's whole chunks alone, which are always computed in the
        same way; an answer, generated token by token, and a shorter last chunk are not.
        """
        held = task.held_tokens
        return held if self.has_independent_rows else held[: self._whole(min(len(held), group.prompt_length))]

    def _whole(self, num_tokens: int) -> int:
        """How many of so many tokens can be taken over."""
        step = 1 if self.has_independent_rows else self.prefill_chunk_tokens
        return num_tokens // step * step

    def _take_prefix(self, owner: str, task: Task) -> list[int]:
        """Take a slot that holds the longest beginning of a task's prompt that any slot has; none where none has."""
        prompt = task.reusable_prompt
        free = [(slot, held.tokens) for slot, held in self._held.items() if held.owner == owner]
        busy = [
            (other.slots[0], self._reusable(group, other))
            for group, other in self._running
            if group.request.owner == owner and other.held_tokens
        ]
        best, source, tokens = 0, -1, []
        for slot, held in free + busy:
            count = self._whole(common_length(held, prompt))
            if count > best:
                best, source, tokens = count, slot, held
        if not best:
            return []
        task.reuse_prompt(best)
        # The slot itself, if most of what it holds goes on in this prompt: as in a conversation's next turn, or when a
        # question is asked again. Two texts that only begin alike are worth a slot each.
        if source in self._held and 2 * best >= len(tokens):
            self._take(source)
            return [source]
        target = self._take_empty()
        if target != source:
            self._copies.append(Copy(source, target, best))
        return [target]

    def _take_empty(self) -> int:
        """Take the free slot that is least likely to serve again: one that holds nothing, or the one freed first."""
        slot = next((each for each in reversed(self._free) if each not in self._held), self._free[0])
        self._take(slot)
        return slot

    def _take(self, slot: int) -> None:
        self._free.remove(slot)
        self._held.pop(slot, None)


def common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two texts have in common from their start."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    return next(place for place in range(most) if first[place] != second[place])
