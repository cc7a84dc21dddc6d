"""One text being generated: its tokens, what of them the cache holds, and the text that may already be shown.

A `Sequence` knows nothing of the others. It says what to run next (`next_work`) and what decides the next tokens
(`draws`), takes the tokens that were chosen (`advance`), and gives out text as soon as it is certain (`take_chunks`).
"""

import codecs
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from model.sampling import Draw, SamplingSettings, TokenLogprob, token_logprobs, uniform
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from model.scheduler import Task

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
LONGEST_LOOKUP = 3  # tokens that must repeat before what followed them is guessed to follow again


@dataclass(frozen=True)
class GenerationRequest:
    request_id: str
    prompt_tokens: list[int]
    settings: SamplingSettings
    deadline: float | None = None  # on the clock of time.monotonic()
    owner: str = ""  # only requests of one owner share what of a prompt was read before


@dataclass
class Chunk:
    """What one step adds to one answer; the last of an answer has a finish_reason."""

    request_id: str
    index: int
    text: str
    tokens: list[int]  # without the stop token; their number over all chunks is the usage
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    is_prompt: bool = False
    reused_tokens: int = 0  # of the prompt, which a request before had read
    error: str = ""


@dataclass(frozen=True)
class Work:
    """Tokens of one slot to run at positions `start`, `start + 1`, ...; the last `num_logits` rows need logits."""

    slot: int
    start: int
    tokens: list[int]
    num_logits: int


@dataclass(frozen=True)
class Advance:
    """What one step did for a text: tokens generated, tokens that had been drafted for it, and what is to be copied."""

    generated: int
    drafted: int = 0
    copies: tuple[tuple[int, int, int], ...] = ()  # source slot, target slot, number of tokens


@dataclass
class TextStream:
    """Decodes bytes; it gives out no part of a character, and no text that a stop string may still take back."""

    stop: tuple[str, ...] = ()
    released: int = 0  # characters given out
    decoded: int = 0  # characters decoded, those held back included
    stopped: bool = False
    _held: str = ""
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    def push(self, data: bytes, final: bool = False) -> str:
        """Take the bytes of a token and return the text that is certain now."""
        text = self._decoder.decode(data, final)
        self.decoded += len(text)
        if not self.stop:
            self.released += len(text)
            return text
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else self._possible_stop()
            certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.released += len(certain)
        return certain

    @property
    def splits_character(self) -> bool:
        """Whether the last bytes are the beginning of a character."""
        return bool(self._decoder.getstate()[0])

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop string starts with."""
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stop):
                return length
        return 0


@dataclass
class _Pending:
    """A token whose text is not out yet."""

    token: int
    logprob: TokenLogprob | None
    end: int  # characters that must be out before it may go


class Sequence:
    """One candidate of a request."""

    num_slots: int = 1

    def __init__(
        self, request: GenerationRequest, candidate: int, seed: int, tokenizer: Tokenizer, max_draft_tokens: int = 0
    ) -> None:
        self.request = request
        self.settings = request.settings
        self.candidate = candidate
        self.seed = seed
        self.prompt_length = len(request.prompt_tokens)
        self.tokens = list(request.prompt_tokens)
        self.num_cached = 0
        self.reused_tokens = 0  # of the prompt, which its slot held from before
        self.slots: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._echoed = False
        self.draft: list[int] = []  # guessed to follow `tokens`, and running with them
        self.max_draft_tokens = min(request.settings.prompt_lookup_tokens, max_draft_tokens)
        self.prompt_logprobs: list[TokenLogprob] = [TokenLogprob(self.tokens[0], None, [])]
        self._tokenizer = tokenizer
        self._stop_tokens = {*tokenizer.stop_tokens, *request.settings.stop_tokens}
        self._text = TextStream(request.settings.stop)
        self._certain = ""
        self._chosen_logprobs: list[float] = []  # the stop token's included
        self._pending: list[_Pending] = []

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def cached_tokens(self) -> int:
        return self.num_cached

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token, by which `best_of` ranks."""
        return sum(self._chosen_logprobs) / max(len(self._chosen_logprobs), 1)

    @property
    def in_prompt(self) -> bool:
        """Whether part of the prompt has yet to run."""
        return self.num_cached < self.prompt_length

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.settings.echo and self.settings.logprobs is not None

    def next_work(self, chunk_tokens: int) -> list[Work]:
        """Return the next chunk of the prompt, or the last token with a draft of what may follow."""
        end = min(self.num_cached + chunk_tokens, len(self.tokens))
        chunk = self.tokens[self.num_cached : end]
        if self.in_prompt:
            self.draft = []
            num_logits = len(chunk) if self.wants_prompt_logprobs else int(end == len(self.tokens))
        else:
            room = self.settings.max_tokens - (len(self.tokens) - self.prompt_length) - 1
            self.draft = look_up(self.tokens, min(self.max_draft_tokens, room)) if self.max_draft_tokens else []
            num_logits = len(chunk) + len(self.draft)
        return [Work(self.slots[0], self.num_cached, chunk + self.draft, num_logits)]

    def read_prompt(self, num_tokens: int, logits: Tensor) -> None:
        """Note that so many more tokens of the prompt have run and gave these logits [rows, V]."""
        start = self.num_cached
        self.num_cached += num_tokens
        if self.wants_prompt_logprobs:
            following = self.tokens[start + 1 : self.num_cached + 1]
            self.prompt_logprobs += token_logprobs(logits[: len(following)], following, self.settings.logprobs or 0)

    @property
    def reusable_prompt(self) -> list[int]:
        """The prompt as far as its keys and values may come from before; its last token has to run for its logits."""
        return [] if self.wants_prompt_logprobs else self.request.prompt_tokens[:-1]

    @property
    def held_tokens(self) -> list[int]:
        """What of the text its slot holds."""
        return self.tokens[: self.num_cached]

    def reuse_prompt(self, num_tokens: int) -> None:
        """Note that the slot holds so much of the prompt from before."""
        self.num_cached = self.reused_tokens = num_tokens

    def share_prompt(self, reader: "Task") -> None:
        """Note that the slot holds the whole prompt, copied from the task that has read it."""
        self.num_cached = self.prompt_length
        self.prompt_logprobs = reader.prompt_logprobs

    def draws(self) -> list[Draw]:
        """Return what decides the next token, and the one after each drafted token."""
        settings, prompt = self.settings, self.request.prompt_tokens
        return [
            Draw(
                settings,
                0.0 if settings.is_greedy else uniform(self.seed, self.candidate, len(self.tokens) + place),
                prompt,
                self.generated + self.draft[:place] if settings.counts_tokens else (),
            )
            for place in range(1 + len(self.draft))
        ]

    def advance(self, logits: Callable[[], Tensor], chosen: list[int]) -> Advance:
        """Take the tokens chosen for `draws` from logits [rows, V]."""
        logprobs = None
        if self.settings.logprobs is not None or self.settings.num_candidates > self.settings.n:
            logprobs = token_logprobs(logits(), chosen, self.settings.logprobs or 0)
        before, drafted = len(self.tokens), len(self.draft)
        self.accept(chosen, logprobs)
        return Advance(len(self.tokens) - before, drafted)

    def accept(self, chosen: list[int], logprobs: list[TokenLogprob] | None) -> None:
        """Take the token chosen after the last one, and after each drafted token as long as the draft was right."""
        self.num_cached = len(self.tokens)
        for place, token in enumerate(chosen):
            self._append(token, logprobs[place] if logprobs else None)
            if self.finish_reason or place == len(self.draft) or token != self.draft[place]:
                break
            self.num_cached += 1
        self.draft = []

    def end(self, index: int, reason: FinishReason) -> list[Chunk]:
        """Stop here; return the last chunk."""
        self.finish(reason)
        chunk = self._take_chunk(index)
        return [] if chunk is None else [chunk]

    def finish(self, reason: FinishReason) -> None:
        """End the text here and give out what was held back."""
        self.finish_reason = reason
        if not self._text.stopped:
            self._certain += self._text.push(b"", final=True)

    def take_chunks(self, index: int) -> list[Chunk]:
        """Return what became certain since the last call, after the prompt where `echo` asks for that."""
        chunks = []
        if self.settings.echo and not self._echoed:
            self._echoed = True
            chunks.append(self.prompt_chunk(index))
        chunk = self._take_chunk(index)
        return chunks if chunk is None else [*chunks, chunk]

    def prompt_chunk(self, index: int) -> Chunk:
        """Return the prompt as a chunk, for `echo`."""
        prompt = self.request.prompt_tokens
        logprobs = self.prompt_logprobs if self.wants_prompt_logprobs else None
        return Chunk(
            self.request.request_id, index, self._tokenizer.decode(prompt), list(prompt), logprobs, None, is_prompt=True
        )

    def _take_chunk(self, index: int) -> Chunk | None:
        out = [
            pending for pending in self._pending if self.finish_reason is not None or pending.end <= self._text.released
        ]
        if not out and self.finish_reason is None:
            return None
        self._pending = self._pending[len(out) :]
        logprobs = None
        if self.settings.logprobs is not None:
            logprobs = [pending.logprob for pending in out if pending.logprob is not None]
        text, self._certain = self._certain, ""
        tokens = [pending.token for pending in out]
        name, reason, reused = self.request.request_id, self.finish_reason, self.reused_tokens
        return Chunk(name, index, text, tokens, logprobs, reason, reused_tokens=reused)

    def _append(self, token: int, logprob: TokenLogprob | None) -> None:
        if logprob is not None and logprob.logprob is not None:
            self._chosen_logprobs.append(logprob.logprob)
        if token in self._stop_tokens:
            self.finish("stop")
            return
        self.tokens.append(token)
        self._certain += self._text.push(self._tokenizer.token_bytes[token])
        # A token that ends inside a character goes out together with the one that completes it.
        self._pending.append(_Pending(token, logprob, self._text.decoded + self._text.splits_character))
        if self._text.stopped:
            self.finish("stop")
        elif len(self.tokens) - self.prompt_length >= self.settings.max_tokens:
            self.finish("length")


def look_up(tokens: list[int], num_tokens: int) -> list[int]:
    """Guess the next tokens: those that followed the latest earlier occurrence of the last few tokens."""
    if num_tokens <= 0:
        return []
    for length in range(min(LONGEST_LOOKUP, len(tokens) - 1), 0, -1):
        ending = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start] == ending[0] and tokens[start : start + length] == ending:
                return tokens[start + length : start + length + num_tokens]
    return []
