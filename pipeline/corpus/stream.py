"""The token stream: which tokens are in global batch s, on any number of workers, after any restart.

    stream = TokenStream(shards, context_length=1024, batch_sequences=256, seed=1337)
    for batch in stream.batches(first_step=4000, rank=rank, world_size=world_size): ...

Batch s is a pure function of (the shards' digests, the seed, s), so the state of a run is its step alone:

    corpus   its shards in a seeded order, cut into windows of about `window_tokens` tokens
    epoch    a permutation of the windows
    window   a ring: its shards joined in a new order, read from a new starting point; cut into sequences of
             `context_length`, and these fully shuffled
    batch s  sequences s * batch_sequences … (s + 1) * batch_sequences - 1 of the endless row of epochs

Every token is a target exactly once per epoch. The ragged end: if a window's tokens do not fill its last sequence,
the sequence is filled up from the start of the ring, and those targets are masked (-100): at most context_length - 1
positions per window. The batch in which an epoch ends is filled up from the next epoch.
"""

import bisect
import hashlib
import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.artifacts import Artifact
from pipeline.corpus.shards import GIGABYTE, Shard, TokenCache, data_digest, open_shards

logger = logging.getLogger(__name__)

IGNORED = -100  # the target that cross-entropy skips
DEFAULT_WINDOW_TOKENS = 1_000_000_000  # 2 GB of local cache at 16 bits
DEFAULT_CACHE_GIGABYTES = 64.0
DECODERS = 4  # threads of each process that download and decode shards


@dataclass
class Batch:
    """Some sequences of one global batch; n rows of context_length T."""

    tokens: torch.Tensor  # [n, T] int64
    targets: torch.Tensor  # [n, T] int64, the next tokens; -100 where there is nothing to predict
    document_ids: torch.Tensor | None = None  # [n, T] int32, counted from 0 within each row
    step: int = 0
    global_tokens: int = 0  # targets to predict in the whole global batch, over all ranks

    def split(self, micro_batch_sequences: int, largest_share: int = 0) -> list["Batch"]:
        """Cut into micro-batches of at most so many rows; views, nothing is copied.

        With `largest_share`, the rows of the rank that has most, every rank gets equally many micro-batches, as
        FSDP's ranks must: each pass gathers weights from all of them.
        """
        rows = len(self.tokens)
        if not largest_share:
            return [self._rows(start, start + micro_batch_sequences) for start in range(0, rows, micro_batch_sequences)]
        count = -(-largest_share // micro_batch_sequences)
        cuts = [number * rows // count for number in range(count + 1)] if rows >= count else [*range(rows + 1)]
        parts = [self._rows(start, end) for start, end in pairwise(cuts)]
        if len(parts) < count:  # a row too few, with one row a pass: the pass that is missing learns nothing
            first = parts[0]
            parts.append(replace(first, targets=torch.full_like(first.targets, IGNORED)))
        assert len(parts) == count, (rows, largest_share)
        return parts

    def _rows(self, start: int, end: int) -> "Batch":
        documents = None if self.document_ids is None else self.document_ids[start:end]
        return replace(self, tokens=self.tokens[start:end], targets=self.targets[start:end], document_ids=documents)


def random_bits(count: int, *facts: Any) -> np.ndarray:
    """Random 64-bit integers named by `facts`; raw bits, which numpy promises never to change."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)


def random_order(count: int, *facts: Any) -> np.ndarray:
    """A permutation of range(count) named by `facts`."""
    return np.argsort(random_bits(count, *facts), kind="stable")


@lru_cache(maxsize=64)
def _order_of_windows(count: int, name: tuple[str, int], epoch: int) -> tuple[int, ...]:
    return tuple(random_order(count, *name, "epoch", epoch).tolist())


def rows_of(rank: int, world_size: int, batch_sequences: int) -> tuple[int, int]:
    """Return the first row of a global batch that is this rank's, and the first behind its share."""
    if not 0 <= rank < world_size:
        raise ValueError(f"Rank {rank} is not one of {world_size} workers.")
    return rank * batch_sequences // world_size, (rank + 1) * batch_sequences // world_size


class Ring:
    """Shards joined into one circle of tokens; after the last token comes the first."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.starts: list[int] = [0, *np.cumsum([shard.num_tokens for shard in shards]).tolist()]
        self.num_tokens = self.starts[-1]

    def locate(self, position: int) -> tuple[int, int]:
        """Say which shard holds a position, and where in it."""
        position %= self.num_tokens
        index = bisect.bisect_right(self.starts, position) - 1
        return index, position - self.starts[index]

    def read(self, arrays: list[np.ndarray], position: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `position` on, around the ring as often as it takes."""
        filled = 0
        while filled < len(out):
            index, local = self.locate(position + filled)
            piece = arrays[index][local : local + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)


@dataclass(frozen=True)
class Window:
    """One window in one epoch: its ring with the tokens mapped, and the order of its sequences."""

    ring: Ring
    arrays: list[np.ndarray]
    offset: int  # where in the ring sequence 0 starts
    order: np.ndarray


class BatchStream:
    """What gives batches by step; a training reads them in the background."""

    batch_sequences: int

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return this rank's share of global batch `step`: ranks in order, joined, are the global batch."""
        raise NotImplementedError

    def batches(self, first_step: int = 0, rank: int = 0, world_size: int = 1, prefetch: int = 4) -> Iterator[Batch]:
        """Yield this rank's batches from `first_step` on, without end, `prefetch` of them built in the background."""
        background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="token-batch")
        try:
            pending = deque(background.submit(self.batch, first_step + i, rank, world_size) for i in range(prefetch))
            next_step = first_step + prefetch
            while True:
                batch = pending.popleft().result()
                pending.append(background.submit(self.batch, next_step, rank, world_size))
                next_step += 1
                yield batch
        finally:
            background.shutdown(wait=False, cancel_futures=True)

    def identity(self, step: int) -> dict[str, Any]:
        """Name what is in global batch `step`, row by row."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop fetching ahead; mapped files are closed when the stream is freed."""
        raise NotImplementedError


class TokenStream(BatchStream):
    """Batches of one split, by step; see the head of this file for their order.

    Raises `ValueError` at once if a shard is missing or cut short, or if the split is too small for one batch;
    and, before the first batch that needs it, if a shard's digest is not the one in its manifest.
    """

    def __init__(
        self,
        shards: Artifact,
        *,
        context_length: int,
        batch_sequences: int,
        seed: int,
        split: str = "train",
        cache_folder: Path | str | None = None,
        cache_gigabytes: float = DEFAULT_CACHE_GIGABYTES,
        window_tokens: int = DEFAULT_WINDOW_TOKENS,
        document_boundaries: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.context_length = context_length
        self.batch_sequences = batch_sequences
        self.document_boundaries = document_boundaries
        self.pin_memory = pin_memory
        self.shards = open_shards(shards, split)
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self._check_shards(f"The {split} split of {shards.url}")
        self.data_digest = data_digest(self.shards)
        self.seed = int(seed)
        self._name = (self.data_digest, self.seed)
        self._windows = self._divide(window_tokens)
        self._lengths = self._count_sequences()
        self.sequences_per_epoch = sum(self._lengths)
        self.steps_per_epoch = -(-self.sequences_per_epoch // batch_sequences)  # to see every token at least once

        self._cache = TokenCache(cache_folder, max_bytes=int(cache_gigabytes * GIGABYTE))
        self.cached_bytes = sum(sorted(sum(shard.decoded_bytes for shard in window) for window in self._windows)[-2:])
        self._cache.check_room(self.cached_bytes)
        self._opened: OrderedDict[tuple[int, int], Future[Window]] = OrderedDict()
        self._lock = threading.Lock()
        # Two threads, so that a window which a batch waits for never queues behind one that is fetched ahead.
        self._loaders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="token-window")
        self._closed = False

    def _check_shards(self, name: str) -> None:
        """Raise `ValueError` if these shards cannot be streamed so."""
        if self.num_tokens < self.batch_sequences * self.context_length:
            raise ValueError(
                f"{name} holds {self.num_tokens} tokens, and one batch takes {self.batch_sequences} sequences of"
                f" {self.context_length}; add text, or lower train.batch_tokens or model.context_length."
            )

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        share = rows_of(rank, world_size, self.batch_sequences)
        batch = self.read_rows(int(step) * self.batch_sequences, self.batch_sequences, *share)
        batch.step = step
        return batch

    def read_rows(self, first: int, count: int, first_row: int, end_row: int) -> Batch:
        """Return rows `first_row` to `end_row - 1` of the `count` rows from row `first` of the endless row of epochs.

        The batch's `global_tokens` are the targets in all `count` rows.
        """
        length = self.context_length
        masked: list[tuple[int, int]] = []
        global_tokens = count * length
        buffer: np.ndarray | None = None
        end_of_text = 0
        for row, window, sequences in self._spans(first, count):
            ring = window.ring
            ragged = ring.num_tokens % length
            last_sequence = ring.num_tokens // length if ragged else -1
            if buffer is None:
                buffer = np.empty((end_row - first_row, length + 1), window.arrays[0].dtype)
                end_of_text = window.arrays[0][-1]
            for index, sequence in enumerate(sequences.tolist(), start=row):
                if sequence == last_sequence:
                    global_tokens -= length - ragged
                if first_row <= index < end_row:
                    ring.read(window.arrays, window.offset + sequence * length, buffer[index - first_row])
                    if sequence == last_sequence:
                        masked.append((index - first_row, ragged))
        assert buffer is not None
        batch = _to_batch(buffer, end_of_text if self.document_boundaries else None, self.pin_memory)
        for index, ragged in masked:
            batch.targets[index, ragged:] = IGNORED
        batch.global_tokens = global_tokens
        return batch

    def identity(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": step * self.batch_sequences // self.sequences_per_epoch,
            "seed": self.seed,
            "data_digest": self.data_digest,
            "context_length": self.context_length,
            "rows": self.name_rows(step * self.batch_sequences, self.batch_sequences),
        }

    def name_rows(self, first: int, count: int) -> list[list[Any]]:
        """Name each of the `count` rows from row `first` on: its shard and the first token's place in it."""
        rows: list[list[Any]] = []
        for _, window, sequences in self._spans(first, count):
            for sequence in sequences.tolist():
                index, local = window.ring.locate(window.offset + sequence * self.context_length)
                rows.append([window.ring.shards[index].name, local])
        return rows

    def close(self) -> None:
        self._closed = True
        self._loaders.shutdown(wait=False, cancel_futures=True)

    # The order of windows and sequences: arithmetic only, no token is read.

    def _count_sequences(self) -> list[int]:
        """Return how many sequences each window has, in every epoch."""
        return [-(-sum(shard.num_tokens for shard in window) // self.context_length) for window in self._windows]

    def _divide(self, window_tokens: int) -> list[list[Shard]]:
        """Cut the shards, in a seeded order, into windows of about equal size."""
        shards = [self.shards[index] for index in random_order(len(self.shards), *self._name, "windows")]
        count = max(1, round(self.num_tokens / window_tokens))
        windows: list[list[Shard]] = [[] for _ in range(count)]
        before = 0
        for shard in shards:
            middle = before + shard.num_tokens // 2
            windows[middle * count // self.num_tokens].append(shard)
            before += shard.num_tokens
        return [window for window in windows if window]

    def _window_order(self, epoch: int) -> tuple[int, ...]:
        return _order_of_windows(len(self._windows), self._name, epoch)

    def _spans(self, first: int, count: int) -> Iterator[tuple[int, Window, np.ndarray]]:
        """Yield (row, window, sequences) for each window that `count` rows from row `first` on need.

        Of these rows, those from `row` on are these sequences of the window, in this order.
        """
        row = 0
        epoch, rest = divmod(first, self.sequences_per_epoch)
        while row < count:
            for place, index in enumerate(self._window_order(epoch)):
                here = min(self._lengths[index] - rest, count - row)
                if here > 0:
                    window = self._window(epoch, place)
                    yield row, window, window.order[rest : rest + here]
                    row += here
                rest = max(0, rest - self._lengths[index])
            epoch += 1

    # The windows: a window is opened when a batch needs it, and the one after it is fetched ahead.

    def _window(self, epoch: int, place: int) -> Window:
        last = place + 1 == len(self._windows)
        with self._lock:
            wanted = self._opening(epoch, place)
            if wanted.done() and wanted.exception() is not None:
                # Fetching it ahead failed. Try again: the cause may be mended by now.
                del self._opened[epoch, place]
                wanted = self._opening(epoch, place)
            self._opening(*((epoch + 1, 0) if last else (epoch, place + 1)), ahead=True)
            while len(self._opened) > 3:
                self._opened.popitem(last=False)
        return wanted.result()

    def _opening(self, epoch: int, place: int, ahead: bool = False) -> Future[Window]:
        key = (epoch, place)
        if key not in self._opened:
            self._opened[key] = self._loaders.submit(self._load_ahead if ahead else self._load, epoch, place)
        self._opened.move_to_end(key)
        return self._opened[key]

    def _load_ahead(self, epoch: int, place: int) -> Window:
        try:
            return self._load(epoch, place)
        except CancelledError:
            raise
        except Exception as error:  # the first batch that needs the window raises it; until then it can be mended
            logger.warning("Fetching ahead failed, training will stop when it gets there: %s", error)
            raise

    def _load(self, epoch: int, place: int) -> Window:
        index = self._window_order(epoch)[place]
        name = (*self._name, "window", epoch, index)
        members = self._windows[index]
        ring = Ring([members[i] for i in random_order(len(members), *name, "ring")])
        # The processes of a node start at different shards, so that each decodes some instead of all waiting for one.
        start = os.getpid() * 7919 % len(members)
        turn = [*range(start, len(members)), *range(start)]
        with ThreadPoolExecutor(max_workers=DECODERS) as decoders:
            decoded = dict(zip(turn, decoders.map(self._open_shard, [ring.shards[i] for i in turn]), strict=True))
        return self._arrange(ring, [decoded[i] for i in range(len(members))], index, name)

    def _arrange(self, ring: Ring, arrays: list[np.ndarray], index: int, name: tuple[Any, ...]) -> Window:
        """Cut window `index` into its sequences, in the order that `name` stands for."""
        return Window(
            ring=ring,
            arrays=arrays,
            offset=int(random_bits(1, *name, "offset")[0] % ring.num_tokens),
            order=random_order(self._lengths[index], *name, "sequences"),
        )

    def _open_shard(self, shard: Shard) -> np.ndarray:
        if self._closed or not threading.main_thread().is_alive():
            raise CancelledError  # the program is ending; it should not wait for a whole window
        return self._cache.open(shard)


def _to_batch(buffer: np.ndarray, end_of_text: int | None, pin_memory: bool) -> Batch:
    """Turn rows of context_length + 1 tokens into inputs, targets and, where asked, document ids."""
    shape = (buffer.shape[0], buffer.shape[1] - 1)
    tokens = torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory)
    targets = torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory)
    # numpy widens 16 bits some fifty times as fast as torch does.
    np.copyto(tokens.numpy(), buffer[:, :-1])
    np.copyto(targets.numpy(), buffer[:, 1:])
    if end_of_text is None:
        return Batch(tokens, targets)
    document_ids = torch.zeros(shape, dtype=torch.int32, pin_memory=pin_memory)
    np.cumsum(buffer[:, :-2] == end_of_text, axis=1, dtype=np.int32, out=document_ids.numpy()[:, 1:])
    return Batch(tokens, targets, document_ids)


class ValidationStream:
    """The validation split in fixed order, each token scored once, up to `max_tokens` (0: all of them).

    The first token is predicted from an end of text, as every document's first token is. Every rank gets the same
    number of batches of the same shape, because a collective operation waits for every rank; targets beyond the last
    token are masked.
    """

    def __init__(
        self,
        shards: Artifact,
        *,
        context_length: int,
        batch_sequences: int,
        max_tokens: int = 0,
        split: str = "val",
        cache_folder: Path | str | None = None,
        cache_gigabytes: float = DEFAULT_CACHE_GIGABYTES,
        document_boundaries: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.context_length = context_length
        self.batch_sequences = batch_sequences
        self.document_boundaries = document_boundaries
        self.pin_memory = pin_memory
        found = open_shards(shards, split)
        total = sum(shard.num_tokens for shard in found)
        self.num_tokens = min(total, max_tokens) if max_tokens else total
        needed, covered = [], 0
        for shard in found:
            if covered < self.num_tokens:
                needed.append(shard)
                covered += shard.num_tokens
        self._ring = Ring(needed)
        self._cache = TokenCache(cache_folder, max_bytes=int(cache_gigabytes * GIGABYTE))

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield this rank's batches; each rank's share differs from the others' by at most one sequence."""
        length = self.context_length
        per_rank = -(-self.num_tokens // (length * world_size))
        rows = min(self.batch_sequences, per_rank)
        arrays = [self._cache.open(shard) for shard in self._ring.shards]
        for step, first in enumerate(range(0, per_rank, rows or 1)):
            sequences = [(first + row) * world_size + rank for row in range(rows)]
            buffer = np.empty((rows, length + 1), arrays[0].dtype)
            for row, sequence in enumerate(sequences):
                # A sequence starts one token before its first target. For the first sequence that is position -1:
                # on the ring the last token, which is an end of text.
                self._ring.read(arrays, sequence * length - 1, buffer[row])
            batch = _to_batch(buffer, arrays[0][-1] if self.document_boundaries else None, self.pin_memory)
            for row, sequence in enumerate(sequences):
                batch.targets[row, max(0, self.num_tokens - sequence * length) :] = IGNORED
            batch.step = step
            yield batch
