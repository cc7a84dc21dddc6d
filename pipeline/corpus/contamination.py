"""Which documents hold what a model will be asked: those that share 13 words in a row with an item of a task.

    runs = Runs.of({"arc_easy": [("Which of these …",), …]})   # each item is one text or several
    runs.find("… a document …")                                # the first task that it shares a run with, or ""

Words are compared as lower-case letters and digits, without what stands between them. A run is a 64-bit number, so
that all runs of a task of a million lie in some megabytes, and a document is looked up in one pass.
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from pipeline.artifacts import Artifact
from pipeline.corpus.cleaning import find_words

RUN_WORDS = 13  # as Brown et al. 2020 (appendix C) and most who came after them
RUNS = "work/decontaminate.npz"  # in the artifact while it is made
REASON = "with items of "  # and then the task's name: why a document was dropped
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class TaskRuns:
    """The runs of one task's items."""

    name: str
    hashes: np.ndarray  # uint64, sorted, each once
    items: int
    short: int  # items of fewer words than a run has: no document is recognised by them


@dataclass(frozen=True)
class Runs:
    """The runs of some tasks, in the order in which a document is counted under them."""

    tasks: tuple[TaskRuns, ...]

    @classmethod
    def of(cls, tasks: Mapping[str, Sequence[Sequence[str]]]) -> "Runs":
        """Collect the runs of items, each given as the texts that are it: a question with each of its answers."""
        made = []
        for name, items in tasks.items():
            hashes = [np.unique(np.concatenate([hash_runs(text) for text in texts])) for texts in items]
            short = sum(not len(each) for each in hashes)
            made.append(TaskRuns(name, np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes])), len(items), short))
        return cls(tuple(made))

    @cached_property
    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        """Every run once, sorted, and the number of the first task that has it."""
        hashes = np.concatenate([task.hashes for task in self.tasks])
        owners = np.concatenate([np.full(len(task.hashes), number) for number, task in enumerate(self.tasks)])
        unique, first = np.unique(hashes, return_index=True)
        return unique, owners[first]

    def find(self, text: str) -> str:
        """Name the first of the tasks that a text shares a run with; empty where it shares none."""
        known, owners = self._all
        hashes = hash_runs(text)
        if not len(known) or not len(hashes):
            return ""
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        found = known[places] == hashes
        return self.tasks[int(owners[places[found]].min())].name if found.any() else ""

    def count(self, dropped: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Return for each task its items, those too short, and the documents that were dropped by it."""
        return {
            task.name: {
                "documents": dropped.get(REASON + task.name, 0),
                "items": task.items,
                "short_items": task.short,
            }
            for task in self.tasks
        }

    def describe(self, dropped: Mapping[str, int]) -> tuple[list[str], list[str]]:
        """Say for each task how many documents held items, and warn where most items can recognise none."""
        lines = [
            f"{found['documents']:,} documents held items of {name} ({found['items']:,} items)"
            for name, found in self.count(dropped).items()
        ]
        warnings = [
            f"{task.short:,} of the {task.items:,} items of {task.name} have fewer than {RUN_WORDS} words: no document"
            " is recognised by those."
            for task in self.tasks
            if task.short > task.items / 2
        ]
        return lines, warnings

    def to_bytes(self) -> bytes:
        """Write the runs as a NumPy archive; the same runs give the same bytes."""
        sink = io.BytesIO()
        np.savez(
            sink,
            names=np.array([task.name for task in self.tasks]),
            counts=np.array([[task.items, task.short, len(task.hashes)] for task in self.tasks]),
            hashes=np.concatenate([task.hashes for task in self.tasks]),
        )
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Runs":
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            names, counts, hashes = archive["names"].tolist(), archive["counts"].tolist(), archive["hashes"]
        parts = np.split(hashes, np.cumsum([length for _, _, length in counts])[:-1])
        return cls(
            tuple(
                TaskRuns(name, part, items, short)
                for name, part, (items, short, _) in zip(names, parts, counts, strict=True)
            )
        )


def keep_runs(runs: Runs, output: Artifact) -> Runs:
    """Write the runs where every worker reads them.

    Raises `ValueError` where an earlier, stopped run dropped documents by those of other items.
    """
    content = runs.to_bytes()
    if output.exists(RUNS) and output.read_bytes(RUNS) != content:
        names = ", ".join(task.name for task in runs.tasks)
        raise ValueError(
            f"The items of {names} have changed since documents were dropped by them; delete {output.url} and run"
            " again."
        )
    output.write_bytes(RUNS, content)
    return runs


@lru_cache(maxsize=1)
def load_runs(output: Artifact) -> Runs:
    """Read the runs of an artifact that is being made, once per process."""
    return Runs.from_bytes(output.read_bytes(RUNS))


def hash_runs(text: str) -> np.ndarray:
    """Return a number for each run of 13 words of a text, in order; none where it has fewer words."""
    words = find_words(text)
    if len(words) < RUN_WORDS:
        return np.zeros(0, dtype=np.uint64)
    numbers = np.fromiter((zlib.crc32(word.encode()) for word in words), dtype=np.uint64, count=len(words))
    length = len(words) - RUN_WORDS + 1
    hashes = np.zeros(length, dtype=np.uint64)
    for place in range(RUN_WORDS):  # a polynomial in 64 bits, for all runs at once
        hashes = hashes * _FACTOR + numbers[place : place + length]
    return hashes ^ (hashes >> np.uint64(29))
