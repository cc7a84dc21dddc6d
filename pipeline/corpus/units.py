"""Units of work, through Ray Data: what a task knows, what it does, what comes back.

    slice of the input ──────────────▶ unit ─task─▶ outcome: a tally, or the sentence why there is none
    slice that is a stream ─pieces─▶ units

One task does one unit: it writes what it makes whole, and then a record. Nothing else passes between tasks, so a run
that was stopped keeps every unit that has its record, and no text reaches the driver.
"""

import json
import logging
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import ray.data

from pipeline.artifacts import Artifact, FileRecord
from pipeline.config import Config, PrepareConfig, SourceConfig
from pipeline.corpus.files import Slice
from pipeline.corpus.formats import Piece, read_pieces
from pipeline.corpus.omissions import Omissions
from pipeline.corpus.progress import Progress

SPLITS = ("train", "val")
DATA_SETTINGS = {
    # Ray's own bars and log lines would only bury the line that we print; what fails is told by us.
    "enable_progress_bars": False,
    "print_on_execution_start": False,
    "target_max_block_size": 2**20,  # so that each piece of a stream is a block, and so a task, of its own
}
# Where names go into tasks and tallies come out, Ray Data need not hold tasks back for the memory between them. Ray has
# every unit at once then, and gives a CPU the next one in 0.01 s. Else 0.1 s pass between two, and in the first second
# only one unit runs, because Ray Data asks for the cluster's size once a second and does not know it at first.
UNLIMITED = {"op_resource_reservation_enabled": False}
MOST_UNITS_AT_ONCE = 1000  # that Ray has, running and waiting; its driver looks at each of them again and again


@dataclass(frozen=True)
class PreparePlan:
    """What every task knows."""

    source: SourceConfig
    settings: PrepareConfig
    tokenizer: Artifact
    output: Artifact
    slice_bytes: int
    partitions: int  # of the hashes, when looking for duplicates
    # Documents whose 64-bit hash is below this go to val. It is prepare.validation_fraction of the range, or in a tiny
    # corpus, where one split would be empty, just above the lowest hash.
    val_below: int
    duplicates: tuple[str, ...] = ()  # the files that list them
    runs: str = ""  # the file with the runs of words that no document may share with a task's items
    # Of conversations: what makes text of them, and how many tokens one may have. Empty and 0 for text.
    chat_template: str = ""
    most_tokens: int = 0


@dataclass(frozen=True)
class Unit:
    """What one task does: a slice of the input, or one piece of a slice that is a stream."""

    name: str
    slice: Slice
    piece: Piece | None = None
    is_done: bool = False  # by an earlier run
    error: str = ""  # why the stream could not be cut any further


@dataclass
class Tally:
    """What one unit became: the record beside its shards; tallies add up to the corpus's."""

    splits: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})
    dropped: Counter[str] = field(default_factory=Counter)
    replaced: int = 0
    cut: int = 0  # conversations that lost their last turns
    source_bytes: int = 0  # of text that was read, dropped or not
    lengths: list[int] = field(default_factory=lambda: [0] * 40)  # documents of 2^(i-1) to 2^i - 1 tokens
    lowest_hash: int = 2**64  # of the documents in train: the first to move if val has none
    lowest_val_hash: int = 2**64
    val_below: int = 0
    files: dict[str, FileRecord] = field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        for split in SPLITS:
            self.splits[split].update(other.splits[split])
        self.dropped.update(other.dropped)
        self.replaced += other.replaced
        self.cut += other.cut
        self.source_bytes += other.source_bytes
        self.lengths = [mine + theirs for mine, theirs in zip(self.lengths, other.lengths, strict=True)]
        self.lowest_hash = min(self.lowest_hash, other.lowest_hash)
        self.lowest_val_hash = min(self.lowest_val_hash, other.lowest_val_hash)
        self.files.update(other.files)

    def to_json(self) -> str:
        return json.dumps(vars(self), default=asdict)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Tally":
        facts = json.loads(text)
        facts["splits"] = {split: Counter(counts) for split, counts in facts["splits"].items()}
        facts["dropped"] = Counter(facts["dropped"])
        facts["files"] = {name: FileRecord(**record) for name, record in facts["files"].items()}
        return cls(**facts)

    @property
    def omissions(self) -> Omissions:
        return Omissions(self.documents, self.dropped, self.replaced)

    @property
    def documents(self) -> int:
        return sum(counts["documents"] for counts in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(counts["tokens"] for counts in self.splits.values())


@dataclass(frozen=True)
class Outcome:
    """What comes back of a unit: its tally, or why it failed; neither where an earlier run had done it."""

    unit: str
    tally: Tally | None = None
    error: str = ""


@dataclass(frozen=True)
class Task:
    """A function that does one unit, and the ending of the record that says it is done."""

    label: str
    record: str
    do: Callable[[PreparePlan, Unit], Tally]


def sum_tallies(tallies: Mapping[str, Tally]) -> Tally:
    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    return total


def read_records(plan: PreparePlan, there: Mapping[str, int], task: Task) -> dict[str, Tally]:
    """Find what an earlier run finished: the records whose files are all there, going by one listing."""
    names = [name for name in there if name.startswith("work/") and name.endswith(task.record)]
    with ThreadPoolExecutor(max_workers=16) as pool:
        tallies = [Tally.from_json(content) for content in pool.map(plan.output.read_bytes, names)]
    return {
        posixpath.basename(name).removesuffix(task.record): tally
        for name, tally in zip(names, tallies, strict=True)
        if all(there.get(file) == record.bytes for file, record in tally.files.items())
    }


def run_units(plan: PreparePlan, found: list[Slice], finished: Mapping[str, Tally], task: Task) -> dict[str, Tally]:
    """Run a task on every unit that is not finished; return the tally of each unit, in the order of their names.

    Raises `ValueError` with the sentence of the first unit that failed where a person can mend it.
    """
    tallies = dict(finished)
    num_pieces = _read_streams(plan, found)
    expected: set[str] = set()
    to_do = []
    for slice_ in found:
        names = {slice_.name}
        if slice_.is_stream:
            names = {_piece_name(slice_, piece) for piece in range(num_pieces.get(slice_.name, 0))}
        expected |= names
        if not names <= tallies.keys() or (slice_.is_stream and slice_.name not in num_pieces):
            to_do.append(slice_)
    streams = {slice_.name for slice_ in found if slice_.is_stream}
    total = sum_tallies(
        {name: tally for name, tally in tallies.items() if name in expected or name.rpartition("-")[0] in streams}
    )
    estimate = sum(slice_.text_bytes for slice_ in found)
    with Progress(task.label, max(estimate, total.source_bytes), done=total.source_bytes) as progress:
        for outcome in _outcomes(plan, to_do, frozenset(tallies), task) if to_do else ():
            if outcome.error:
                raise ValueError(f"{outcome.error} What is finished is kept: run again to go on.")
            expected.add(outcome.unit)
            if outcome.tally is not None:
                tallies[outcome.unit] = outcome.tally
                total.add(outcome.tally)
                progress.add(outcome.tally.source_bytes, f"{total.documents:,} documents, {total.tokens:,} tokens")
    return {name: tallies[name] for name in sorted(expected)}


def _outcomes(plan: PreparePlan, to_do: list[Slice], done: frozenset[str], task: Task) -> Iterator[Outcome]:
    """The Ray Data pipeline: slices, those that are streams cut into pieces, then one task for each unit."""
    has_streams = any(slice_.is_stream for slice_ in to_do)
    with _data_settings(DATA_SETTINGS if has_streams else DATA_SETTINGS | UNLIMITED):
        _start_workers(task, min(len(to_do), plan.settings.workers or len(to_do)))
        rows = [{"unit": Unit(slice_.name, slice_)} for slice_ in to_do]
        dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        if has_streams:
            # Cutting reserves no CPU: of two it would leave only one to tokenize with.
            cut = partial(_cut, plan=plan, done=done)
            readers = ray.data.TaskPoolStrategy(min(2, len(rows)))
            dataset = dataset.map_batches(cut, batch_size=1, num_cpus=0, compute=readers)
        most = plan.settings.workers
        if not has_streams:  # of which nobody knows how many pieces they have
            most = min(most or max(MOST_UNITS_AT_ONCE, 4 * _count_cpus()), len(rows))
        pool = ray.data.TaskPoolStrategy(most or None)
        dataset = dataset.map_batches(partial(_work, plan=plan, task=task), batch_size=1, num_cpus=1, compute=pool)
        for row in dataset.iter_rows():
            yield row["outcome"]


@contextmanager
def _data_settings(settings: Mapping[str, Any]) -> Iterator[None]:
    """Have Ray Data go by these inside, without its own log."""
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in settings}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        for name, value in settings.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def start_ahead(task: Task, config: Config) -> None:
    """Start what the units of a task will run in, while another stage is running.

    A worker takes a second of a core until it has loaded what a unit needs, and so do two actors of Ray Data's, which
    it starts with its first dataset and keeps.
    """
    if not ray.is_initialized():
        return
    _start_workers(task, config.prepare.workers)
    with _data_settings(DATA_SETTINGS | UNLIMITED):
        ray.data.from_items([0]).map_batches(_pass_on, num_cpus=0).materialize()


def _start_workers(task: Task, most: int) -> None:
    """Let processes get ready before the first unit, without waiting for them: one for each CPU, or `most` if not 0.

    Ray has as many idle ones as there are CPUs, and Ray Data's own actors would take those before any unit comes.
    """
    cpus = _count_cpus()
    for _ in range(min(cpus, most or cpus)):
        _load.remote(task)


def _count_cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 0))


def _read_streams(plan: PreparePlan, found: list[Slice]) -> dict[str, int]:
    """Return into how many pieces each stream was cut, of those that were once read to their end."""
    return {
        slice_.name: int(json.loads(plan.output.read_bytes(_stream_record(slice_)))["pieces"])
        for slice_ in found
        if slice_.is_stream and plan.output.exists(_stream_record(slice_))
    }


# On the workers ---------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=1)
def _load(task: Task) -> None:
    """Load what a unit of the task needs: unpickling the task does."""


def _pass_on(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    return batch


def _cut(batch: Mapping[str, Any], plan: PreparePlan, done: frozenset[str]) -> Iterator[dict[str, np.ndarray]]:
    """Cut a stream into pieces as it passes, a unit each; other slices go on as they are."""
    (unit,) = batch["unit"]
    if not unit.slice.is_stream:
        yield _row("unit", unit)
        return
    count = 0
    try:
        for count, piece in enumerate(read_pieces(unit.slice, plan.source, plan.slice_bytes), 1):
            name = _piece_name(unit.slice, count - 1)
            is_done = name in done
            yield _row("unit", Unit(name, unit.slice, None if is_done else piece, is_done))
        plan.output.write_text(_stream_record(unit.slice), json.dumps({"pieces": count}))
    except Exception as error:
        if not _is_mendable(error):
            raise
        yield _row("unit", Unit(unit.name, unit.slice, error=_sentence(error, unit.slice)))


def _work(batch: Mapping[str, Any], plan: PreparePlan, task: Task) -> dict[str, np.ndarray]:
    """Do one unit, and write its record last."""
    (unit,) = batch["unit"]
    if unit.is_done or unit.error:
        return _row("outcome", Outcome(unit.name, error=unit.error))
    try:
        tally = task.do(plan, unit)
        plan.output.write_text(f"work/{unit.name}{task.record}", tally.to_json())
    except Exception as error:
        if not _is_mendable(error):
            raise
        return _row("outcome", Outcome(unit.name, error=_sentence(error, unit.slice)))
    return _row("outcome", Outcome(unit.name, tally))


def _row(column: str, value: Unit | Outcome) -> dict[str, np.ndarray]:
    """A batch of one row, as Ray Data wants it."""
    values = np.empty(1, dtype=object)
    values[0] = value
    return {column: values}


def _piece_name(slice_: Slice, piece: int) -> str:
    return f"{slice_.name}-{piece:05d}"


def _stream_record(slice_: Slice) -> str:
    return f"work/{slice_.name}.stream.json"


def _is_mendable(error: Exception) -> bool:
    """Whether a person can mend it: a damaged file, a full disk, storage that is away. Others are our own mistakes."""
    # By name: importing every client's exceptions would cost each worker seconds.
    clients = ("botocore", "aiobotocore", "aiohttp", "httpx", "httpcore", "huggingface_hub")
    return isinstance(error, (ValueError, OSError)) or type(error).__module__.partition(".")[0] in clients


def _sentence(error: BaseException, slice_: Slice) -> str:
    text = " ".join(str(error).split()).removesuffix(".")
    if isinstance(error, ValueError):
        return f"{text}."
    what = slice_.files[0].where if slice_.files else slice_.format
    return f"Writing the shards of {what} failed ({type(error).__name__}: {text})."
