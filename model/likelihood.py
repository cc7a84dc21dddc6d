"""How likely a model finds given continuations: their log-probabilities, many at once.

    requests = encode_requests(tokenizer, [("The cat", " sat"), ("The cat", " flew")])
    likelihoods = score(model, requests)     # .nats [n] and .greedy [n]

What texts share at their beginning is read once: sorted by their tokens, neighbours share the most, and each row of a
batch is a tree of them, in which a token sees its own ancestors alone. A row has no padding inside, so that short
texts of many lengths fill a batch as well as long ones of one length. A text's figure does not depend on what else
is scored, up to rounding.

Shapes: B rows, T tokens of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model.gpt import DEFAULT_CHUNK_LOGITS, GPT
from model.products import use_fast_products
from model.tokenizer import Tokenizer
from model.training import autocast

# Longer rows share more and cost more attention: tokens of other branches are masked, not left out.
ROW_TOKENS = 128
BATCH_TOKENS = {"cpu": 4096}
DEFAULT_BATCH_TOKENS = 65_536
# On a CPU each product with the head lays its weights out anew, which few rows do not pay for; logits are read once.
LOGITS_AT_ONCE = {"cpu": 2**25}


@dataclass(frozen=True)
class Request:
    """The tokens of a context, never empty, and of the continuation to score after it."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Likelihoods:
    """One figure for each request, in order."""

    nats: np.ndarray  # float64 [n]: the log-probability of the whole continuation, at most 0
    greedy: np.ndarray  # bool [n]: whether each of its tokens is the likeliest in its place


def encode_requests(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Request]:
    """Encode pairs of context and continuation as lm-eval does.

    An empty context is what a document begins after. White space at the end of a context goes to
    the continuation, to which tokenizers attach it. Raises `ValueError` for a continuation without tokens.
    """
    contexts, wholes = [], []
    for context, continuation in texts:
        contexts.append(context.rstrip() if context.strip() else context)
        wholes.append(context + continuation)
    encoded = tokenizer.encode_all([*contexts, *wholes])
    requests = []
    for number, (before, whole) in enumerate(zip(encoded[: len(texts)], encoded[len(texts) :], strict=True)):
        continuation_tokens = whole[len(before) :].tolist()
        if not continuation_tokens:
            raise ValueError(f"Nothing is left to score of {texts[number][1]!r} after {texts[number][0][-40:]!r}.")
        requests.append(Request(before.tolist() or [tokenizer.begin_of_text], continuation_tokens))
    return requests


@torch.inference_mode()
def score(
    model: GPT,
    requests: Sequence[Request],
    *,
    precision: torch.dtype = torch.float32,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int | None = None,
) -> Likelihoods:
    """Score every request on the model's device.

    A context too long for the model loses its beginning. A continuation too long for it is cut into windows, each
    token scored once: the first window begins with the last token of the context, the others with what stands before
    them, the last one with as much of it as fits.
    """
    device = model.embedding.weight.device
    if device.type == "cpu":
        use_fast_products()
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(device.type, DEFAULT_BATCH_TOKENS)
    windows = [
        (window, num_scored, number)
        for number, request in enumerate(requests)
        for window, num_scored in cut(request, model.config.context_length)
    ]
    windows.sort()
    nats = np.zeros(len(requests))
    greedy = np.ones(len(requests), dtype=bool)
    was_training = model.training
    model.eval()
    try:
        with autocast(device, precision, keeps_casts=True):
            for batch in batch_rows(fill_rows(windows, row_tokens), batch_tokens):
                _score_batch(model, batch, nats, greedy)
    finally:
        model.train(was_training)
    return Likelihoods(nats, greedy)


def cut(request: Request, context_length: int) -> Iterator[tuple[list[int], int]]:
    """Yield windows of at most `context_length` + 1 tokens, and how many at the end of each are scored."""
    tokens = request.context + request.continuation
    first = len(request.context)
    if len(request.continuation) <= context_length:
        yield tokens[-(context_length + 1) :], len(request.continuation)
        return
    yield tokens[first - 1 : first + context_length], context_length
    for start in range(first + context_length, len(tokens), context_length):
        end = min(start + context_length, len(tokens))
        yield tokens[end - context_length - 1 : end], end - start


@dataclass
class Row:
    """A tree of texts with the same beginnings, laid out parents first; all but the last token of each are read."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[tuple[int, list[int]]] = field(default_factory=list)  # (first token, its ancestors)
    edges: dict[tuple[int, int], int] = field(default_factory=dict)  # (parent, scored token) -> number
    members: list[tuple[int, list[int]]] = field(default_factory=list)  # (request, its edges)
    _path: list[int] = field(default_factory=list)  # places of the last text's tokens
    _last: list[int] = field(default_factory=list)

    def shared(self, read: Sequence[int]) -> int:
        """Count the tokens that a text has in common with the last one added."""
        length = 0
        for ours, theirs in zip(self._last, read, strict=False):
            if ours != theirs:
                break
            length += 1
        return length

    def add(self, window: Sequence[int], num_scored: int, number: int, shared: int) -> None:
        """Add a text of which the first `shared` tokens lie here already."""
        read = list(window[:-1])
        start, ancestors = len(self.tokens), self._path[:shared]
        if shared < len(read):
            self.branches.append((start, ancestors))
            self.tokens += read[shared:]
            self.positions += range(shared, len(read))
        self._path = ancestors + list(range(start, len(self.tokens)))
        self._last = read
        scored = range(len(window) - num_scored, len(window))
        edges = [self.edges.setdefault((self._path[at - 1], window[at]), len(self.edges)) for at in scored]
        self.members.append((number, edges))

    def write_mask(self, mask: np.ndarray) -> None:
        """Fill [T, T]: a token sees itself and its ancestors; padding sees itself, for there must be something."""
        np.fill_diagonal(mask, True)
        ends = [start for start, _ in self.branches[1:]] + [len(self.tokens)]
        for (start, ancestors), end in zip(self.branches, ends, strict=True):
            mask[start:end, ancestors] = True
            mask[start:end, start:end] = np.tri(end - start, dtype=bool)


def fill_rows(windows: Iterable[tuple[list[int], int, int]], row_tokens: int) -> list[Row]:
    """Put texts, sorted by their tokens, into rows of at most `row_tokens` tokens, or of one longer text."""
    rows: list[Row] = []
    for window, num_scored, number in windows:
        shared = rows[-1].shared(window[:-1]) if rows else 0
        limit = max(row_tokens, len(window) - 1)
        if not rows or len(rows[-1].tokens) + len(window) - 1 - shared > limit:
            rows.append(Row())
            shared = 0
        rows[-1].add(window, num_scored, number, shared)
    return rows


def batch_rows(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Yield rows of nearly the same length together, the longest first: what does not fit memory fails at once."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score_batch(model: GPT, rows: Sequence[Row], nats: np.ndarray, greedy: np.ndarray) -> None:
    """Run one batch and add each edge's figures to the requests it belongs to."""
    length = len(rows[0].tokens)
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    mask = np.zeros((len(rows), 1, length, length), dtype=bool)
    parents: list[int] = []
    targets: list[int] = []
    first_edges: list[int] = []
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        positions[number, : len(row.tokens)] = row.positions
        row.write_mask(mask[number, 0])
        first_edges.append(len(targets))
        parents += [number * length + parent for parent, _ in row.edges]
        targets += [target for _, target in row.edges]
    device = model.embedding.weight.device
    hidden = model.forward_hidden(
        torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(positions).to(device),
        mask=torch.from_numpy(mask).to(device),
    )
    edge_nats, edge_greedy = _score_edges(model, hidden.flatten(0, 1), np.array(parents), np.array(targets))
    for first, row in zip(first_edges, rows, strict=True):
        for member, edges in row.members:
            places = first + np.array(edges)
            nats[member] += edge_nats[places].sum()
            greedy[member] &= edge_greedy[places].all()


def _score_edges(model: GPT, hidden: Tensor, parents: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each target after its parent, a row of `hidden` [B * T, C], and whether it is likeliest.

    Each parent's logits are computed once, and those of one chunk exist at a time.
    """
    device = hidden.device
    order = np.argsort(parents, kind="stable")
    unique, inverse = np.unique(parents[order], return_inverse=True)
    chunk = max(LOGITS_AT_ONCE.get(device.type, DEFAULT_CHUNK_LOGITS) // len(model.head.weight), 128)
    nats, greedy = np.empty(len(targets)), np.empty(len(targets), dtype=bool)
    bounds = np.searchsorted(inverse, np.arange(0, len(unique) + chunk, chunk))
    for number, start in enumerate(range(0, len(unique), chunk)):
        chosen = torch.from_numpy(unique[start : start + chunk]).to(device)
        logits = model.logits(hidden[chosen])
        places = order[bounds[number] : bounds[number + 1]]
        rows = torch.from_numpy(inverse[bounds[number] : bounds[number + 1]] - start).to(device)
        wanted = torch.from_numpy(targets[places]).to(device)
        log_sums, best = _summarise(logits)
        nats[places] = (logits[rows, wanted].float() - log_sums[rows]).double().cpu().numpy()
        greedy[places] = (best[rows] == wanted).cpu().numpy()
    return nats, greedy


def _summarise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The log of the sum of exponentials of each row of `logits` [N, V], and the place of its largest."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16):
        with suppress(ModuleNotFoundError):  # without the folder model/cpu torch does it, more slowly
            from model.cpu.kernel import load_kernel, summarise_logits

            kernel = load_kernel()
            if kernel is not None:
                return summarise_logits(kernel, logits)
    logits = logits.float()
    return logits.logsumexp(dim=-1), logits.argmax(dim=-1)
