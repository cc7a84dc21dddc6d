"""Beam search: the likeliest texts of a request, found by keeping the best few at every step.

The rule is that of `transformers` with its defaults (length_penalty=1, early_stopping=False): a text's score is
its summed log-probability per token, and the search ends when no running beam can beat the worst text kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.sampling import Draw, TokenLogprob, penalize, token_logprobs
from model.sequence import Advance, Chunk, FinishReason, GenerationRequest, Sequence, Work
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from model.scheduler import Task


@dataclass
class Beam:
    generated: list[int] = field(default_factory=list)
    score: float = 0.0  # summed log-probability
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Beams:
    """All beams of one request. Each needs a slot; the first one's holds the prompt from which all start."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self.request = request
        self.settings = request.settings
        self.num_slots = request.settings.num_beams
        self.slots: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.running = [Beam()]
        self.finished: list[tuple[float, Beam, FinishReason]] = []  # best first
        # Reads the prompt, and afterwards the text of each answer.
        self.prompt = Sequence(request, 0, 0, tokenizer)
        self._tokenizer = tokenizer
        self._stop_tokens = {*tokenizer.stop_tokens, *request.settings.stop_tokens}

    @property
    def in_prompt(self) -> bool:
        return self.prompt.in_prompt

    @property
    def prompt_logprobs(self) -> list[TokenLogprob]:
        return self.prompt.prompt_logprobs

    # Beams have each a slot of their own text: no prompt is taken from before, and none is left behind.

    @property
    def reused_tokens(self) -> int:
        return 0

    @property
    def reusable_prompt(self) -> list[int]:
        return []

    @property
    def held_tokens(self) -> list[int]:
        return []

    def reuse_prompt(self, num_tokens: int) -> None:
        raise AssertionError("no slot holds a prompt for beams")

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token of the best text that has ended."""
        return self.finished[0][0]

    @property
    def num_cached(self) -> int:
        """Tokens of each running beam in its slot: all but the newest."""
        return self.prompt.num_cached + max(len(self.running[0].generated) - 1, 0)

    @property
    def cached_tokens(self) -> int:
        return self.num_cached * len(self.running)

    def next_work(self, chunk_tokens: int) -> list[Work]:
        if self.in_prompt:
            self.prompt.slots = self.slots[:1]
            return self.prompt.next_work(chunk_tokens)
        position = self.prompt.prompt_length + len(self.running[0].generated) - 1
        beams = zip(self.slots, self.running, strict=False)  # more slots than beams where the vocabulary is tiny
        return [Work(slot, position, beam.generated[-1:], 1) for slot, beam in beams]

    def read_prompt(self, num_tokens: int, logits: Tensor) -> None:
        self.prompt.read_prompt(num_tokens, logits)

    def share_prompt(self, reader: "Task") -> None:
        self.prompt.share_prompt(reader)

    def draws(self) -> list[Draw]:
        """Return nothing: `advance` chooses, from all beams' logits together."""
        return []

    def advance(self, logits: Callable[[], Tensor], chosen: list[int]) -> Advance:
        """Extend the beams by one token, given logits [beams, V]; says which slots have to be copied."""
        return self._extend(logits())

    def _extend(self, logits: Tensor) -> Advance:
        settings = self.settings
        width, vocabulary = settings.num_beams, logits.shape[-1]
        scores = logits.float().log_softmax(-1)
        if settings.adjusts_logits:
            prompt = self.request.prompt_tokens
            for row, beam in zip(scores, self.running, strict=True):
                penalize(row, settings, prompt, beam.generated)
        totals = scores + torch.tensor([[beam.score] for beam in self.running], device=scores.device)
        # So many that `width` go on even if every other one stops.
        values, places = totals.flatten().topk(min((1 + len(self._stop_tokens)) * width, totals.numel()))
        length = len(self.running[0].generated) + 1
        last = length == settings.max_tokens
        parents: list[int] = []
        children: list[Beam] = []
        for rank, (score, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, vocabulary)
            generated = [*self.running[parent].generated, token]
            stops = token in self._stop_tokens or self._has_stop_string(generated)
            if (stops or last) and rank >= width:
                continue
            if not stops and len(children) == width:
                continue
            beam = self.running[parent]
            child = Beam(generated, score, beam.logprobs)
            if settings.logprobs is not None:
                report = token_logprobs(logits[parent : parent + 1], [token], settings.logprobs)
                child = replace(child, logprobs=beam.logprobs + report)
            if stops or last:
                self.finished.append((score / length, child, "stop" if stops else "length"))
            else:
                parents.append(parent)
                children.append(child)
        self.finished = sorted(self.finished, key=lambda entry: -entry[0])[:width]
        full = len(self.finished) == width
        if last or not children or (full and children[0].score / length <= self.finished[-1][0]):
            self.finish_reason = self.finished[0][2]
            return Advance(generated=1)
        copies = self._take_slots(parents, children)
        return Advance(1, copies=tuple((source, target, self.num_cached) for source, target in copies))

    def _has_stop_string(self, generated: list[int]) -> bool:
        if not self.settings.stop:
            return False
        text = self._tokenizer.decode(generated)
        return any(stop in text for stop in self.settings.stop)

    def _take_slots(self, parents: list[int], children: list[Beam]) -> list[tuple[int, int]]:
        """Give each beam's first child its own slot and the others spare slots; return what to copy there."""
        spare = [slot for place, slot in enumerate(self.slots) if place not in parents]
        slots, copies, kept = [], [], set()
        for parent in parents:
            slot = self.slots[parent]
            if slot in kept:
                copies.append((slot, spare.pop()))
                slot = copies[-1][1]
            kept.add(slot)
            slots.append(slot)
        self.slots = [*slots, *spare]
        self.running = children
        return copies

    def end(self, index: int, reason: FinishReason) -> list[Chunk]:
        """Stop here; nothing of the texts has been shown."""
        self.finish_reason = reason
        return []

    def take_chunks(self, index: int) -> list[Chunk]:
        """Return all answers of the request, the n best texts, once the search has ended."""
        chunks: list[Chunk] = []
        if self.finish_reason is None:
            return chunks
        for index, (_, beam, reason) in enumerate(self.finished[: self.settings.n]):
            reader = Sequence(self.request, index, 0, self._tokenizer)
            for place, token in enumerate(beam.generated):
                if reader.finish_reason is None:
                    reader.accept([token], beam.logprobs[place : place + 1] or None)
            if reader.finish_reason is None:
                reader.finish(reason)
            reader.prompt_logprobs = self.prompt_logprobs
            chunks += reader.take_chunks(index)
        return chunks
