"""How the next token is chosen: the settings of one request, and the arithmetic from logits to a token.

What one row gets never depends on the rows beside it, to the last bit. So every operation here works along the
vocabulary, and none is a reduction that torch may split by the number of rows.

N: rows   V: vocabulary   K: tokens of a row's context
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from model.settings import require

MAX_CANDIDATES = 128
MAX_LOGPROBS = 20
MAX_LOOKUP_TOKENS = 32
GREEDY_BELOW = 1e-5
# Logits that settings have changed stay within this: divided by the smallest temperature they are still numbers.
MAX_ADJUSTED_LOGIT = 1e30


@dataclass(frozen=True)
class SamplingSettings:
    max_tokens: int = 16  # generated tokens at most
    temperature: float = 1.0  # 0 is greedy, and so is what is nearly 0
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    top_p: float = 1.0  # keep the fewest likeliest tokens that hold this share of probability
    min_p: float = 0.0  # keep tokens at least this share as likely as the likeliest
    typical_p: float = 1.0  # keep the tokens nearest to the expected surprise that hold this share
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens already there
    presence_penalty: float = 0.0  # subtracted from the logits of tokens generated before
    frequency_penalty: float = 0.0  # subtracted once per time a token was generated before
    logit_bias: dict[int, float] = field(default_factory=dict)  # added to the logits of these tokens
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_tokens: tuple[int, ...] = ()  # the text ends before any of these, as before the end of text
    seed: int | None = None  # same seed, same answer, whatever else is in the batch
    logprobs: int | None = None  # report each token's log-probability and this many alternatives'
    echo: bool = False  # answer with the prompt first
    n: int = 1  # answers
    best_of: int = 1  # candidates, of which the n likeliest per token are answered; 1 means n
    num_beams: int = 1  # above 1: beam search, deterministic
    prompt_lookup_tokens: int = 0  # guess up to this many tokens from the context; a pass verifies several at once

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, f"max_tokens is {self.max_tokens}; it must be at least 1.")
        require(_within(self.temperature, 0, 100), f"temperature is {self.temperature}; it must lie in 0 to 100.")
        require(self.top_k >= 0, f"top_k is {self.top_k}; it must be 0 (keep all) or more.")
        require(
            _within(self.top_p, 0, 1) and self.top_p > 0, f"top_p is {self.top_p}; it must be above 0 and at most 1."
        )
        require(_within(self.min_p, 0, 1), f"min_p is {self.min_p}; it must lie in 0 to 1.")
        require(
            _within(self.typical_p, 0, 1) and self.typical_p > 0,
            f"typical_p is {self.typical_p}; it must be above 0 and at most 1.",
        )
        require(
            _within(self.repetition_penalty, 0, 100) and self.repetition_penalty > 0,
            f"repetition_penalty is {self.repetition_penalty}; it must be above 0 and at most 100.",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(_within(value, -2, 2), f"{name} is {value}; it must lie in -2 to 2.")
        require(
            all(token >= 0 and _within(bias, -100, 100) for token, bias in self.logit_bias.items()),
            "logit_bias must map token ids to numbers from -100 to 100.",
        )
        require(all(self.stop), "stop must not hold an empty string.")
        require(all(token >= 0 for token in self.stop_tokens), "stop_tokens must be token ids.")
        require(
            self.seed is None or -(2**63) <= self.seed < 2**64,
            f"seed is {self.seed}; it must fit in 64 bits.",
        )
        require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            f"logprobs is {self.logprobs}; it must lie in 0 to {MAX_LOGPROBS}.",
        )
        require(1 <= self.n <= MAX_CANDIDATES, f"n is {self.n}; it must lie in 1 to {MAX_CANDIDATES}.")
        require(
            self.best_of == 1 or self.n <= self.best_of <= MAX_CANDIDATES,
            f"best_of is {self.best_of}; it must lie in n ({self.n}) to {MAX_CANDIDATES}.",
        )
        require(
            1 <= self.num_beams <= MAX_CANDIDATES,
            f"num_beams is {self.num_beams}; it must lie in 1 to {MAX_CANDIDATES}.",
        )
        require(
            0 <= self.prompt_lookup_tokens <= MAX_LOOKUP_TOKENS,
            f"prompt_lookup_tokens is {self.prompt_lookup_tokens}; it must lie in 0 to {MAX_LOOKUP_TOKENS}.",
        )
        if self.num_beams > 1:
            require(self.best_of == 1, "best_of does not go with num_beams: beam search ranks its own candidates.")
            require(self.n <= self.num_beams, f"n is {self.n}; beam search with num_beams={self.num_beams} has fewer.")
            require(self.prompt_lookup_tokens == 0, "prompt_lookup_tokens does not go with num_beams.")

    @property
    def num_candidates(self) -> int:
        """How many texts are generated to answer with n."""
        return max(self.n, self.best_of)

    @cached_property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken; so small a temperature would leave nothing to any other."""
        return self.temperature < GREEDY_BELOW

    @cached_property
    def counts_tokens(self) -> bool:
        """Whether logits depend on which tokens were there before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def adjusts_logits(self) -> bool:
        """Whether the logits are changed before they are divided by the temperature."""
        return self.counts_tokens or bool(self.logit_bias)

    @cached_property
    def takes_best(self) -> bool:
        """Whether the token of the largest logit is taken, wherever `logit_bias` does not name it."""
        return self.is_greedy and not self.counts_tokens and all(bias <= 0 for bias in self.logit_bias.values())

    @cached_property
    def bias(self) -> tuple[Tensor, Tensor]:
        """The tokens of `logit_bias`, and what is added to their logits."""
        return torch.tensor(list(self.logit_bias)), torch.tensor(list(self.logit_bias.values()), dtype=torch.float32)


@dataclass(frozen=True)
class TokenLogprob:
    """A token with the model's own log-probability: before temperature, penalties and filters."""

    token: int
    logprob: float | None  # None: the first token of a prompt has no probability
    top: list[tuple[int, float]]  # the likeliest tokens, best first


@dataclass(frozen=True)
class Draw:
    """What decides one token: settings, a number in [0, 1), and the tokens before it."""

    settings: SamplingSettings
    uniform: float
    prompt: Sequence[int]
    generated: Sequence[int]  # nothing, where the settings do not count tokens


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Choose one token per row of logits [N, V], which penalties and biases change in place."""
    for row, draw in zip(logits, draws, strict=True):
        if draw.settings.adjusts_logits:
            penalize(row, draw.settings, draw.prompt, draw.generated)
    return choose(logits, [draw.settings for draw in draws], [draw.uniform for draw in draws])


def uniform(seed: int, candidate: int, position: int) -> float:
    """Return the number in [0, 1) that decides one token: a pure function, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{candidate}/{position}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def find_best(logits: Tensor) -> list[int]:
    """Return the first place of the largest of each row of logits [N, V].

    -1 where nothing can be chosen: there is a NaN, or no finite maximum.
    """
    # On a CPU numpy takes a tenth of the time of torch; both take the first of equals, and NaN as the largest.
    places = torch.from_numpy(logits.float().numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)
    highest = logits.gather(-1, places[:, None]).squeeze(-1).tolist()
    return [place if math.isfinite(value) else -1 for place, value in zip(places.tolist(), highest, strict=True)]


def penalize(logits: Tensor, settings: SamplingSettings, prompt: Sequence[int], generated: Sequence[int]) -> None:
    """Apply penalties and biases to one row [V], in place: repetition counts the prompt, the others do not."""
    if settings.repetition_penalty != 1:
        seen = torch.tensor([*prompt, *generated], device=logits.device).unique()
        scores = logits[seen]
        penalty = settings.repetition_penalty
        adjusted = torch.where(scores < 0, scores * penalty, scores / max(penalty, 1 / MAX_ADJUSTED_LOGIT))
        # What the model makes impossible (-inf) stays so.
        logits[seen] = torch.where(scores > -math.inf, adjusted.clamp(-MAX_ADJUSTED_LOGIT, MAX_ADJUSTED_LOGIT), scores)
    if generated and (settings.presence_penalty or settings.frequency_penalty):
        tokens, counts = torch.tensor(generated, device=logits.device).unique(return_counts=True)
        logits[tokens] -= settings.presence_penalty + settings.frequency_penalty * counts
    if settings.logit_bias:
        tokens, values = (part.to(logits.device) for part in settings.bias)
        logits.index_add_(0, tokens, values)


def filter_logits(logits: Tensor, settings: Sequence[SamplingSettings]) -> Tensor:
    """Return logits [N, V] divided by the temperature, with -inf where top-k, top-p, min-p or typical drop a token."""
    # Greedy rows are not divided; nobody asks what they keep.
    logits = logits / _column(logits, [1.0 if s.is_greedy else s.temperature for s in settings])
    if any(s.top_k for s in settings):
        logits = _keep_top_k(logits, [s.top_k for s in settings])
    if any(s.top_p < 1 for s in settings):
        logits = _keep_top_p(logits, [s.top_p for s in settings])
    if any(s.min_p > 0 for s in settings):
        probabilities = logits.softmax(-1)
        threshold = probabilities.amax(-1, keepdim=True) * _column(logits, [s.min_p for s in settings])
        logits = logits.masked_fill(probabilities < threshold, -math.inf)
    if any(s.typical_p < 1 for s in settings):
        logits = _keep_typical(logits, [s.typical_p for s in settings])
    return logits


def choose(logits: Tensor, settings: Sequence[SamplingSettings], uniforms: Sequence[float]) -> list[int]:
    """Choose one token per row of logits [N, V], penalties already applied.

    Whatever the logits are, a token of the vocabulary is returned: where they give no probabilities, the first of the
    largest (numpy and torch count NaN as that).
    """
    # On a CPU numpy's argmax takes a tenth of the time of torch's; both take the first of equals.
    chosen = (logits.float().numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()
    sampled = [row for row, s in enumerate(settings) if not s.is_greedy]
    if sampled:
        filtered = filter_logits(logits[sampled].float(), [settings[row] for row in sampled])
        cumulative = filtered.softmax(-1).double().cumsum(-1)
        targets = cumulative[:, -1:] * _column(cumulative, [uniforms[row] for row in sampled])
        # right=True: the first token whose cumulative probability exceeds the target; one of zero never does.
        tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
        for row, token in zip(sampled, tokens.tolist(), strict=True):
            if token < logits.shape[-1]:  # not where the probabilities are NaN
                chosen[row] = token
    return chosen


def token_logprobs(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Report the log-probability of one token per row of logits [N, V], and the likeliest `num_top`."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(-1).tolist()
    values, indices = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return [
        TokenLogprob(token, logprob, list(zip(ids, tops, strict=True)))
        for token, logprob, ids, tops in zip(tokens, own, indices.tolist(), values.tolist(), strict=True)
    ]


def _keep_top_k(logits: Tensor, top_k: list[int]) -> Tensor:
    vocabulary = logits.shape[-1]
    ranks = [min(k, vocabulary) or vocabulary for k in top_k]
    values = logits.topk(max(min(k, vocabulary) for k in top_k), dim=-1).values
    last_rank = torch.tensor([min(rank, values.shape[-1]) - 1 for rank in ranks], device=logits.device)
    threshold = values.gather(-1, last_rank[:, None])
    keeps_all = torch.tensor([k == 0 for k in top_k], device=logits.device)[:, None]
    return logits.masked_fill((logits < threshold) & ~keeps_all, -math.inf)


def _keep_top_p(logits: Tensor, top_p: list[float]) -> Tensor:
    ordered = logits.sort(-1, descending=True).values
    probabilities = ordered.softmax(-1)
    # A token stays while those likelier than it hold less than top_p; the likeliest always stays.
    dropped = probabilities.cumsum(-1) - probabilities >= _column(logits, top_p)
    dropped[:, 0] = False
    threshold = ordered.masked_fill(dropped, math.inf).amin(-1, keepdim=True)
    keeps_all = torch.tensor([p >= 1 for p in top_p], device=logits.device)[:, None]
    return logits.masked_fill((logits < threshold) & ~keeps_all, -math.inf)


def _keep_typical(logits: Tensor, typical_p: list[float]) -> Tensor:
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()
    # Not sum(): over a single row torch may split it among threads, and the last bits would depend on N.
    entropy = -(logprobs * probabilities).nan_to_num(0.0).cumsum(-1)[:, -1:]
    distance = (-logprobs - entropy).abs()
    ordered, order = distance.sort(-1)
    cumulative = probabilities.gather(-1, order).cumsum(-1)
    last = (cumulative < _column(logits, typical_p)).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    keeps_all = torch.tensor([p >= 1 for p in typical_p], device=logits.device)[:, None]
    return logits.masked_fill((distance > ordered.gather(-1, last)) & ~keeps_all, -math.inf)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _within(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high
