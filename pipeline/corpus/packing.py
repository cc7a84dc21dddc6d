"""Conversations as batches: packed whole into rows, padded, never split, attention inside each.

    stream = ConversationStream(shards, context_length=1024, batch_sequences=8, seed=1337)     # as a TokenStream
    for batch in ConversationValidation(shards, context_length=1024, batch_sequences=8).batches(): ...

A conversation of n tokens takes n - 1 places: its last token is a target only. Packing is best fit, longest first,
and looks at lengths alone. So the rows of a window are as many in every epoch, and batch s is found as text's is; in
each epoch conversations of equal length change places, and the rows come in a new order. What is not learnt and what
pads a row has the target -100. Padding is a document of its own, so no position is without one to look at.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.artifacts import Artifact
from pipeline.corpus.shards import (
    GIGABYTE,
    LAST,
    LEARNT,
    TOKEN_BITS,
    Shard,
    TokenCache,
    holds_conversations,
    open_shards,
)
from pipeline.corpus.stream import (
    DEFAULT_CACHE_GIGABYTES,
    IGNORED,
    Batch,
    Ring,
    TokenStream,
    ValidationStream,
    Window,
    random_bits,
    random_order,
)


def open_training_stream(shards: Artifact, **options: Any) -> TokenStream:
    """Return the stream that fits what the shards hold; `options` are those of `TokenStream`."""
    return (ConversationStream if holds_conversations(shards) else TokenStream)(shards, **options)


def open_validation_stream(shards: Artifact, **options: Any) -> "ValidationStream | ConversationValidation":
    """Return the validation stream that fits what the shards hold; `options` are those of `ValidationStream`."""
    return (ConversationValidation if holds_conversations(shards) else ValidationStream)(shards, **options)


def pack(lengths: Mapping[int, int], row_length: int) -> list[Counter[int]]:
    """Put things of these lengths (length -> how many) into rows, best fit, longest first; return each row's lengths.

    Raises `ValueError` for one that is longer than a row.
    """
    rows: list[Counter[int]] = []
    rows_with_room: dict[int, list[int]] = {}  # room -> rows that have exactly so much
    rooms = 0  # bit r: there is a row with room r
    for length in sorted(lengths, reverse=True):
        if not 0 < length <= row_length:
            raise ValueError(f"A conversation takes {length} places, and a row has {row_length}.")
        for _ in range(lengths[length]):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                row = rows_with_room[room].pop()
                if not rows_with_room[room]:
                    rooms ^= 1 << room
            else:
                room, row = row_length, len(rows)
                rows.append(Counter())
            rows[row][length] += 1
            left = room - length
            if left:
                rows_with_room.setdefault(left, []).append(row)
                rooms |= 1 << left
    return rows


@dataclass(frozen=True)
class Conversations:
    """The conversations of some shards, in the shards' order."""

    shard: np.ndarray  # which of the shards each lies in
    start: np.ndarray  # its first token there
    places: np.ndarray  # its tokens less one
    learnt: np.ndarray  # its targets that are learnt

    @classmethod
    def find(cls, arrays: list[np.ndarray]) -> "Conversations":
        found = []
        for number, array in enumerate(arrays):
            ends = np.flatnonzero(array & LAST) + 1
            starts = np.concatenate(([0], ends[:-1])).astype(np.int64)
            is_learnt = array >= LEARNT
            # A conversation's first token is nobody's target.
            learnt = np.add.reduceat(is_learnt, starts, dtype=np.int64) - is_learnt[starts]
            found.append((np.full(len(ends), number), starts, ends - starts - 1, learnt))
        return cls(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@dataclass(frozen=True)
class PackedWindow(Window):
    """A window whose sequences are rows of whole conversations."""

    conversations: Conversations
    members: np.ndarray  # conversations, row by row
    starts: np.ndarray  # where in `members` each row begins; one more than there are rows
    learnt: np.ndarray  # targets of each row

    def fill(self, row: int, tokens: np.ndarray, targets: np.ndarray, document_ids: np.ndarray) -> None:
        """Write a row [T]: its conversations one after another, then padding."""
        position = 0
        members = self.members[self.starts[row] : self.starts[row + 1]]
        for number, member in enumerate(members):
            start, places = int(self.conversations.start[member]), int(self.conversations.places[member])
            marked = self.arrays[self.conversations.shard[member]][start : start + places + 1]
            here = slice(position, position + places)
            tokens[here] = marked[:-1] & TOKEN_BITS
            targets[here] = np.where(marked[1:] >= LEARNT, (marked[1:] & TOKEN_BITS).astype(np.int64), IGNORED)
            document_ids[here] = number
            position += places
        tokens[position:], targets[position:], document_ids[position:] = 0, IGNORED, len(members)


class ConversationStream(TokenStream):
    """Batches of conversations by step; the order of windows and what is raised are `TokenStream`'s."""

    def __init__(self, shards: Artifact, **options: Any) -> None:
        self._packed: list[list[Counter[int]]] = []  # of each window: the lengths in each row
        super().__init__(shards, **options)

    def read_rows(self, first: int, count: int, first_row: int, end_row: int) -> Batch:
        batch = empty_batch(end_row - first_row, self.context_length, self.pin_memory)
        for row, window, sequences in self._spans(first, count):
            assert isinstance(window, PackedWindow)
            batch.global_tokens += int(window.learnt[sequences].sum())
            for index, sequence in enumerate(sequences.tolist(), start=row - first_row):
                if 0 <= index < end_row - first_row:
                    window.fill(sequence, *arrays_of(batch, index))
        return batch

    def name_rows(self, first: int, count: int) -> list[list[Any]]:
        """Name each of the `count` rows from row `first` on: its first conversation's shard and place there."""
        rows: list[list[Any]] = []
        for _, window, sequences in self._spans(first, count):
            assert isinstance(window, PackedWindow)
            for member in window.members[window.starts[sequences]].tolist():
                found = window.conversations
                rows.append([window.ring.shards[int(found.shard[member])].name, int(found.start[member])])
        return rows

    def _check_shards(self, name: str) -> None:
        check_conversations(self.shards, name, self.context_length)

    def _count_sequences(self) -> list[int]:
        self._packed = [pack(count_places(window), self.context_length) for window in self._windows]
        return [len(rows) for rows in self._packed]

    def _arrange(self, ring: Ring, arrays: list[np.ndarray], index: int, name: tuple[Any, ...]) -> Window:
        found = Conversations.find(arrays)
        shuffled = np.lexsort((random_bits(len(found.places), *name, "conversations"), found.places))
        return arrange(ring, arrays, found, shuffled, self._packed[index], name)


class ConversationValidation:
    """The held-out conversations in fixed order, each once, until `max_tokens` targets are learnt (0: all of them).

    Every rank gets the same number of batches of the same shape, because a collective operation waits for every rank;
    rows beyond the last conversation are padding.
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
        document_boundaries: bool = True,  # conversations always have them
        pin_memory: bool = False,
    ) -> None:
        self.context_length = context_length
        self.batch_sequences = batch_sequences
        self.pin_memory = pin_memory
        opened = open_shards(shards, split)
        check_conversations(opened, f"The {split} split of {shards.url}", context_length)
        cache = TokenCache(cache_folder, max_bytes=int(cache_gigabytes * GIGABYTE))
        arrays = [cache.open(shard) for shard in opened]
        found = Conversations.find(arrays)
        before = np.cumsum(found.learnt) - found.learnt
        chosen = np.flatnonzero(before < max_tokens) if max_tokens else np.arange(len(before))
        self.num_tokens = int(found.learnt[chosen].sum())
        rows = pack(Counter(found.places[chosen].tolist()), context_length)
        ordered = chosen[np.argsort(found.places[chosen], kind="stable")]
        self._window = arrange(Ring(opened), arrays, found, ordered, rows, None)

    def questions(self, most: int, room: int) -> list[list[int]]:
        """Return what stands before the first answer of `most` conversations at most, evenly spaced.

        Each leaves `room` tokens of the context, or so many as it has beyond half of it.
        """
        found, arrays = self._window.conversations, self._window.arrays
        longest = max(self.context_length - room, self.context_length // 2)
        questions = []
        for number in range(len(found.start)):
            start, places = int(found.start[number]), int(found.places[number])
            marked = arrays[found.shard[number]][start : start + places + 1]
            length = int(np.argmax(marked >= LEARNT))
            if 0 < length <= longest:
                questions.append((marked[:length] & TOKEN_BITS).tolist())
        chosen = np.linspace(0, len(questions) - 1, min(most, len(questions))).round().astype(int)
        return [questions[at] for at in chosen]

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield this rank's batches; each rank's share differs from the others' by at most one row."""
        num_rows = len(self._window.learnt)
        per_rank = -(-num_rows // world_size)
        rows = min(self.batch_sequences, per_rank)
        for step, first in enumerate(range(0, per_rank, rows or 1)):
            batch = empty_batch(rows, self.context_length, self.pin_memory)
            for index in range(rows):
                row = (first + index) * world_size + rank
                if row < num_rows:
                    self._window.fill(row, *arrays_of(batch, index))
            batch.step = step
            yield batch


def arrange(
    ring: Ring,
    arrays: list[np.ndarray],
    found: Conversations,
    by_length: np.ndarray,
    rows: list[Counter[int]],
    name: tuple[Any, ...] | None,
) -> PackedWindow:
    """Give each row conversations of its lengths, in the order of `by_length`, which is sorted by length."""
    lengths = found.places[by_length]
    kinds, firsts = np.unique(lengths, return_index=True)
    following = dict(zip(kinds.tolist(), firsts.tolist(), strict=True))  # length -> the next one of it in `by_length`
    members = np.empty(len(by_length), np.int64)
    starts = np.zeros(len(rows) + 1, np.int64)
    filled = 0
    for number, row in enumerate(rows):
        for length, count in row.items():
            first = following[length]
            members[filled : filled + count] = by_length[first : first + count]
            following[length] += count
            filled += count
        starts[number + 1] = filled
    assert filled == len(by_length), "the footers count what the shards hold"
    learnt = np.add.reduceat(found.learnt[members], starts[:-1])
    order = np.arange(len(rows)) if name is None else random_order(len(rows), *name, "sequences")
    return PackedWindow(ring, arrays, 0, order, found, members, starts, learnt)


def count_places(shards: list[Shard]) -> Counter[int]:
    """Count the conversations of some shards by the places they take."""
    counted: Counter[int] = Counter()
    for shard in shards:
        for tokens, count in (shard.lengths or {}).items():
            counted[tokens - 1] += count
    return counted


def check_conversations(shards: list[Shard], name: str, context_length: int) -> None:
    """Raise `ValueError` if there is no conversation, or one that is longer than a row."""
    longest = max(count_places(shards), default=0)
    if not longest:
        raise ValueError(f"{name} holds no conversation; add some, or change prepare.validation_fraction.")
    if longest > context_length:
        raise ValueError(
            f"{name} holds a conversation of {longest + 1} tokens, and model.context_length is {context_length};"
            " run the prepare stage again with this context."
        )


def empty_batch(rows: int, context_length: int, pin_memory: bool) -> Batch:
    """A batch of padding."""
    shape = (rows, context_length)
    tokens = torch.zeros(shape, dtype=torch.int64, pin_memory=pin_memory)
    targets = torch.full(shape, IGNORED, dtype=torch.int64, pin_memory=pin_memory)
    return Batch(tokens, targets, torch.zeros(shape, dtype=torch.int32, pin_memory=pin_memory))


def arrays_of(batch: Batch, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row of a batch, to be written to."""
    assert batch.document_ids is not None
    return batch.tokens[row].numpy(), batch.targets[row].numpy(), batch.document_ids[row].numpy()
