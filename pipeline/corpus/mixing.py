"""Several sources as one: each prepared to shards of its own, their rows interleaved by share.

    stream = open_stream(shards, context_length=1024, batch_sequences=256, seed=1337)   # of a mix, or of one source

The unit is a row of `context_length` tokens, so that a batch is filled evenly and conversations stay whole. Of every
`CYCLE` rows each source has its share to the row, spread evenly: among the first n rows, for any n, no source is more
than a row or two away from its share of n. So global batch s is a function of the step, as each source's rows are, and
a source that is exhausted begins its next epoch while the others go on with theirs.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.artifacts import Artifact, Manifest
from pipeline.corpus.members import Member, members_of
from pipeline.corpus.packing import ConversationStream, count_places, empty_batch, open_training_stream, pack
from pipeline.corpus.shards import GIGABYTE, TokenCache, holds_conversations, open_shards
from pipeline.corpus.stream import (
    DEFAULT_CACHE_GIGABYTES,
    DEFAULT_WINDOW_TOKENS,
    Batch,
    BatchStream,
    rows_of,
)

CYCLE = 10_000  # rows, after which the order of the sources repeats: shares are kept to one in so many


def open_stream(shards: Artifact, **options: Any) -> BatchStream:
    """Return the stream of all that the shards hold; `options` are those of `TokenStream`."""
    members = members_of(shards)
    if len(members) == 1:
        return open_training_stream(members[0].shards, **options)
    return MixedStream(members, **options)


class MixedStream(BatchStream):
    """Batches whose rows come from several sources, by share; the options are those of `TokenStream`."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        context_length: int,
        batch_sequences: int,
        window_tokens: int = DEFAULT_WINDOW_TOKENS,
        pin_memory: bool = False,
        **options: Any,
    ) -> None:
        self.context_length = context_length
        self.batch_sequences = batch_sequences
        self._pin_memory = pin_memory
        self._names = [member.name for member in members]
        self._order, self._before = arrange_cycle([member.share for member in members])
        self.streams = [
            open_training_stream(
                member.shards,
                context_length=context_length,
                batch_sequences=1,  # the least that a source must fill
                window_tokens=max(1, round(member.share * window_tokens)),
                **options,
            )
            for member in members
        ]
        folder, gigabytes = options.get("cache_folder"), options.get("cache_gigabytes", DEFAULT_CACHE_GIGABYTES)
        TokenCache(folder, max_bytes=int(gigabytes * GIGABYTE)).check_room(
            sum(each.cached_bytes for each in self.streams)
        )
        self._has_documents = any(
            stream.document_boundaries or isinstance(stream, ConversationStream) for stream in self.streams
        )
        facts = [(stream.data_digest, quota) for stream, quota in zip(self.streams, self._before[-1], strict=True)]
        self.data_digest = hashlib.sha256(repr([(digest, int(quota)) for digest, quota in facts]).encode()).hexdigest()

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        first_row, end_row = rows_of(rank, world_size, self.batch_sequences)
        first = int(step) * self.batch_sequences
        batch = empty_batch(end_row - first_row, self.context_length, self._pin_memory)
        sources = self._order[np.arange(first + first_row, first + end_row) % CYCLE]
        marks = [self.count_rows(first + row) for row in (0, first_row, end_row, self.batch_sequences)]
        for number, stream in enumerate(self.streams):
            start, mine, end_of_mine, end = (int(mark[number]) for mark in marks)
            if start == end:
                continue
            part = stream.read_rows(start, end - start, mine - start, end_of_mine - start)
            batch.global_tokens += part.global_tokens
            here = np.flatnonzero(sources == number)
            batch.tokens[here], batch.targets[here] = part.tokens, part.targets
            if part.document_ids is not None and batch.document_ids is not None:
                batch.document_ids[here] = part.document_ids
        if not self._has_documents:
            batch.document_ids = None
        batch.step = step
        return batch

    def count_rows(self, row: int) -> np.ndarray:
        """Count each source's rows before row `row`, from the beginning of training."""
        cycles, rest = divmod(row, CYCLE)
        return cycles * self._before[-1] + self._before[rest]

    def count_epochs(self, steps: int) -> dict[str, float]:
        """Say how often each source is read in so many steps."""
        rows = self.count_rows(steps * self.batch_sequences)
        return {
            name: int(count) / stream.sequences_per_epoch
            for name, count, stream in zip(self._names, rows, self.streams, strict=True)
        }

    def identity(self, step: int) -> dict[str, Any]:
        first = int(step) * self.batch_sequences
        start, end = self.count_rows(first), self.count_rows(first + self.batch_sequences)
        named = [
            iter(stream.name_rows(int(begin), int(stop - begin)) if stop > begin else ())
            for stream, begin, stop in zip(self.streams, start, end, strict=True)
        ]
        sources = self._order[np.arange(first, first + self.batch_sequences) % CYCLE].tolist()
        return {
            "step": step,
            "seed": self.streams[0].seed,
            "data_digest": self.data_digest,
            "context_length": self.context_length,
            "rows": [[self._names[source], *next(named[source])] for source in sources],
        }

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


def arrange_cycle(shares: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each row of a cycle, and how many rows of each source lie before each row [CYCLE + 1, n]."""
    wanted = np.array(shares) * CYCLE / sum(shares)
    quotas = np.floor(wanted).astype(np.int64)
    # The rows that rounding down leaves go to those who lost most.
    quotas[np.argsort(quotas - wanted, kind="stable")[: CYCLE - int(quotas.sum())]] += 1
    sources = np.repeat(np.arange(len(quotas)), quotas)
    # The j-th of a source's n rows stands in the middle of the j-th of n equal parts of the cycle.
    places = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
    order = sources[np.lexsort((sources, places))]
    before = np.zeros((CYCLE + 1, len(quotas)), np.int64)
    before[1:] = np.cumsum(order[:, None] == np.arange(len(quotas)), axis=0)
    return order, before


def tokens_per_epoch(shards: Artifact, manifest: Manifest, context_length: int) -> int:
    """How many tokens a training reads of one source until it begins anew; of conversations padding too."""
    if not holds_conversations(shards):
        return int(manifest.counts["train"]["tokens"])
    return len(pack(count_places(open_shards(shards, "train")), context_length)) * context_length
