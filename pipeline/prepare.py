"""Stage 2: text becomes token shards, through Ray Data.

    source ─cut─▶ slices ─one task each─▶ train/00042-000.parquet + work/00042.json ─merge val, count─▶ manifest

Where the input is cut depends on the input alone (pipeline/sources.py), a task writes the shards of its slice whole
and then a record with their digests, and nothing else passes between tasks. So the shards are the same bytes for any
number of workers, a run that was stopped keeps every slice that has its record, and no text reaches the driver.
"""

import hashlib
import io
import json
import logging
import posixpath
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from fsspec.implementations.local import LocalFileSystem

from model.tokenizer import Tokenizer, parse_tokenizer
from pipeline.artifacts import MANIFEST, Artifact, FileRecord, Manifest
from pipeline.config import Config, PrepareConfig, SourceConfig, result_settings
from pipeline.corpus import card, cleaning
from pipeline.corpus.sources import REPLACED, Slice, read, read_pieces, slices

FORMAT_VERSION = 1
ROW_GROUP_TOKENS = 1_000_000
DOCUMENTS_PER_BATCH = 64  # encoded together
BYTES_PER_TOKEN = 4.2  # of English with a large vocabulary: how much text fills one shard
SPLITS = ("train", "val")
EMPTY = "empty"
DATA_SETTINGS = {
    # Ray's own bars and log lines would only bury the line that we print; what fails is told by us.
    "enable_progress_bars": False,
    "print_on_execution_start": False,
    "target_max_block_size": 2**20,  # so that each piece of a stream is a block, and so a task, of its own
}
UNIT, SIGNED = ".unit.json", ".signed.json"  # the records of a finished unit, by what was done
PARTITION_BYTES = (
    5 * 10**8
)  # text whose hashes one task compares in memory, where those of near duplicates take as much


def settings(config: Config) -> dict[str, Any]:
    return result_settings(config.prepare)


@dataclass(frozen=True)
class Job:
    """What every task knows."""

    source: SourceConfig
    settings: PrepareConfig
    tokenizer: Artifact
    output: Artifact
    slice_bytes: int
    partitions: int  # of the hashes, when looking for duplicates
    # Documents whose hash is below go to val. 64 bits; a fraction of the range, or the lowest hash of a tiny corpus.
    val_below: int
    duplicates: tuple[str, ...] = ()  # the files that list them


Task = Callable[[Job, Slice, str, "list[bytes] | None"], str]  # does one unit of work, returns its record


@dataclass
class Tally:
    """What one slice became; the record beside its shards, and their sum."""

    splits: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})
    dropped: Counter[str] = field(default_factory=Counter)
    replaced: int = 0
    source_bytes: int = 0  # of text that was read, dropped or not
    lengths: list[int] = field(default_factory=lambda: [0] * 40)  # documents of 2^(i-1) to 2^i - 1 tokens
    lowest_hash: int = 2**64  # of the documents in train: the first to move if val has none
    val_below: int = 0
    files: dict[str, FileRecord] = field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        for split in SPLITS:
            self.splits[split].update(other.splits[split])
        self.dropped.update(other.dropped)
        self.replaced += other.replaced
        self.source_bytes += other.source_bytes
        self.lengths = [mine + theirs for mine, theirs in zip(self.lengths, other.lengths, strict=True)]
        self.lowest_hash = min(self.lowest_hash, other.lowest_hash)
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
    def documents(self) -> int:
        return sum(counts["documents"] for counts in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(counts["tokens"] for counts in self.splits.values())


def run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest:
    """Make the shards of the corpus; what an earlier, stopped run finished is kept."""
    slice_bytes = int(config.prepare.shard_tokens * BYTES_PER_TOKEN)
    parts = slices(config.source, slice_bytes)
    job = Job(
        source=config.source,
        settings=config.prepare,
        tokenizer=inputs["tokenizer"],
        output=output,
        slice_bytes=slice_bytes,
        partitions=1 + sum(part.text_bytes for part in parts) // PARTITION_BYTES,
        val_below=int(config.prepare.validation_fraction * 2**64),
    )
    there = output.list_files()
    if config.prepare.drop_exact_duplicates or config.prepare.drop_near_duplicates:
        job = _find_duplicates(job, parts, there)
    tallies = _prepare_all(job, parts, _read_records(job, there, UNIT))
    total = first = _sum(tallies)
    if total.documents == 0:
        output.delete()  # no other run would go on from it
        why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(total.dropped.items()))
        raise ValueError(f"The corpus is empty: no document of the source holds text{f' ({why})' if why else ''}.")
    if total.splits["val"]["documents"] == 0:
        # Too small for its share to be a document: hold out the one with the lowest hash.
        job = replace(job, val_below=total.lowest_hash + 1)
        tallies = _prepare_all(job, parts, tallies)
        total = _sum(tallies)
    if total.splits["train"]["documents"] == 0:
        output.delete()
        raise ValueError(
            "The corpus is too small: it needs two different documents, one to train on and one to hold out; add text,"
            " or for one large .txt file set source.split_text=blank-lines."
        )

    files = {name: record for name, record in total.files.items() if not name.startswith("work/")}
    files |= _merge_val(job, tallies)
    tokenizer = load_tokenizer_of(job.tokenizer)
    counts = {
        **{split: dict(total.splits[split]) for split in SPLITS},
        "dropped": dict(sorted(total.dropped.items())),
        "replaced_utf8": total.replaced,
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        "vocabulary_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "bytes_per_token": round(sum(total.splits[split]["bytes"] for split in SPLITS) / total.tokens, 4),
        "lengths": total.lengths,
    }
    pages = card.write(config, counts, files, first_shard=_first(files, "train/"))
    files |= {name: output.write_bytes(name, content) for name, content in pages.items()}
    manifest = output.commit(counts, files)
    _clear_work(job, {*there, *first.files, *total.files, *job.duplicates}, tallies, files)
    card.log_to_mlflow(config, output, manifest, pages)
    return manifest


# On the driver ----------------------------------------------------------------------------------------------------


def _prepare_all(job: Job, parts: list[Slice], finished: Mapping[str, Tally]) -> dict[str, Tally]:
    """Make the shards of every unit that has no record under this job's split; return every unit's tally."""
    # A unit without a document to move, or split the same way before, stays as it is.
    still_valid = {
        name: tally
        for name, tally in finished.items()
        if tally.val_below == job.val_below or (tally.val_below < job.val_below <= tally.lowest_hash)
    }
    return _run_units(job, parts, still_valid, prepare_unit, "prepare")


def _find_duplicates(job: Job, parts: list[Slice], there: Mapping[str, int]) -> Job:
    """Sign every document, then compare partition by partition; return the job that knows the duplicates."""
    names = list(_run_units(job, parts, _read_records(job, there, SIGNED), sign_unit, "clean"))
    kinds = [cleaning.EXACT] * job.settings.drop_exact_duplicates + [cleaning.NEAR] * job.settings.drop_near_duplicates
    wanted = {
        f"work/{kind}-{partition:05d}.duplicates.parquet": (kind, partition)
        for kind in kinds
        for partition in range(job.partitions)
    }
    ray.get([_compare.remote(job, name, *wanted[name], names) for name in wanted if name not in there])
    return replace(job, duplicates=tuple(wanted))


def _run_units(job: Job, parts: list[Slice], finished: Mapping[str, Tally], task: Task, label: str) -> dict[str, Tally]:
    """Run a task on every unit that is not finished; return the tally of each unit, in the order of their names."""
    tallies = dict(finished)
    pieces = _read_streams(job, parts)
    rows, expected = [], set()
    for part in parts:
        names = (
            {_piece_name(part, piece) for piece in range(pieces.get(part.name, 0))} if part.is_stream else {part.name}
        )
        expected |= names
        if not names <= tallies.keys() or (part.is_stream and part.name not in pieces):
            rows.append({"slice": json.dumps(asdict(part))})
    streams = {part.name for part in parts if part.is_stream}
    kept = [tally for name, tally in tallies.items() if name in expected or name.rpartition("-")[0] in streams]
    progress = Progress(label, sum(part.text_bytes for part in parts), kept)
    if rows:
        for row in _stream_results(job, bool(streams), rows, frozenset(tallies), task):
            if row["error"]:
                raise ValueError(f"{row['error']} What is finished is kept: run again to go on.")
            expected.add(row["name"])
            if row["tally"]:
                tallies[row["name"]] = Tally.from_json(row["tally"])
                progress.add(tallies[row["name"]])
    progress.close()
    return {name: tallies[name] for name in sorted(expected)}


def _stream_results(
    job: Job, has_streams: bool, rows: list[dict[str, Any]], done: frozenset[str], task: Task
) -> Iterator[dict[str, Any]]:
    """The Ray Data pipeline: slices, where they are streams cut into pieces, then one task for each."""
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in DATA_SETTINGS}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        for name, value in DATA_SETTINGS.items():
            setattr(context, name, value)
        dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        if has_streams:
            # Without a CPU of its own, or two CPUs would have one to tokenize with while the other reads.
            cut = partial(_cut, job=job, done=done)
            readers = ray.data.TaskPoolStrategy(min(2, len(rows)))
            dataset = dataset.map_batches(cut, batch_size=1, num_cpus=0, compute=readers)
        pool = ray.data.TaskPoolStrategy(job.settings.workers or None)
        dataset = dataset.map_batches(partial(_work, job=job, task=task), batch_size=1, num_cpus=1, compute=pool)
        yield from dataset.iter_rows()
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _read_records(job: Job, there: Mapping[str, int], ending: str) -> dict[str, Tally]:
    """Find what an earlier run finished: the records whose files are all there, going by one listing."""
    names = [name for name in there if name.startswith("work/") and name.endswith(ending)]
    with ThreadPoolExecutor(max_workers=16) as pool:
        tallies = [Tally.from_json(content) for content in pool.map(job.output.read_bytes, names)]
    return {
        posixpath.basename(name).removesuffix(ending): tally
        for name, tally in zip(names, tallies, strict=True)
        if all(there.get(file) == record.bytes for file, record in tally.files.items())
    }


def _read_streams(job: Job, parts: list[Slice]) -> dict[str, int]:
    """Return into how many pieces each stream was cut, of those that were once read to their end."""
    counts = {}
    for part in parts:
        if part.is_stream and job.output.exists(f"work/{part.name}.stream.json"):
            counts[part.name] = int(json.loads(job.output.read_bytes(f"work/{part.name}.stream.json"))["pieces"])
    return counts


def _sum(tallies: Mapping[str, Tally]) -> Tally:
    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    return total


def _merge_val(job: Job, tallies: Mapping[str, Tally]) -> dict[str, FileRecord]:
    """Join the held-out documents of many slices into shards of the usual size, in order."""
    groups: list[list[str]] = [[]]
    collected = 0
    for name, tally in tallies.items():
        if f"work/{name}.val.parquet" not in tally.files:
            continue
        if collected >= job.settings.shard_tokens:
            groups.append([])
            collected = 0
        groups[-1].append(f"work/{name}.val.parquet")
        collected += tally.splits["val"]["tokens"]
    merged = ray.get([_merge.remote(job, f"val/{index:05d}.parquet", names) for index, names in enumerate(groups)])
    return dict(merged)


def _clear_work(job: Job, written: set[str], tallies: Mapping[str, Tally], kept: Mapping[str, FileRecord]) -> None:
    """Delete what only a stopped run would need, without another listing."""
    filesystem = job.output.filesystem
    records = {f"work/{name}{ending}" for name in tallies for ending in (UNIT, SIGNED)}
    stale = sorted((written | records) - kept.keys() - {MANIFEST})
    if not isinstance(filesystem, LocalFileSystem):
        with ThreadPoolExecutor(max_workers=16) as pool:
            list(pool.map(filesystem.rm_file, map(job.output.file, stale)))
        return
    for name in stale:
        Path(job.output.file(name)).unlink(missing_ok=True)
    for leftover in Path(job.output.path).rglob(".tmp-*"):  # of writers that were killed
        leftover.unlink(missing_ok=True)
    shutil.rmtree(posixpath.join(job.output.path, "work"), ignore_errors=True)


def _first(files: Iterable[str], prefix: str) -> str:
    return min(name for name in files if name.startswith(prefix))


class Progress:
    """One line that a person can read: rewritten on a terminal, else printed every ten seconds."""

    def __init__(self, label: str, total_bytes: float, finished: Iterable[Tally]) -> None:
        self._label = label
        self._total_bytes = total_bytes
        self._sum = Tally()
        for tally in finished:
            self._sum.add(tally)
        self._bytes_before = self._sum.source_bytes
        self._began = self._printed = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        if self._bytes_before:
            print(f"{self._label:<9} {self._bytes_before / 1e6:,.0f} MB are done already", file=sys.stderr, flush=True)

    def add(self, tally: Tally) -> None:
        self._sum.add(tally)
        if time.monotonic() - self._printed >= (0.2 if self._is_terminal else 10):
            self._print("\r" if self._is_terminal else "\n")

    def close(self) -> None:
        self._total_bytes = self._sum.source_bytes  # it was an estimate
        self._print("\n")

    def _print(self, end: str) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._began
        speed = (self._sum.source_bytes - self._bytes_before) / max(seconds, 1e-9)
        left = max(self._total_bytes - self._sum.source_bytes, 0) / speed if speed else 0
        print(
            f"{self._label:<9} {self._sum.documents:,} documents, {self._sum.source_bytes / 1e6:,.0f} MB"
            f" of {max(self._total_bytes, self._sum.source_bytes) / 1e6:,.0f}, {speed / 1e6:.1f} MB/s,"
            f" {self._sum.tokens:,} tokens, {left:,.0f} s left   ",
            end=end,
            file=sys.stderr,
            flush=True,
        )


# On the workers ---------------------------------------------------------------------------------------------------


def _cut(batch: Any, job: Job, done: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Cut a stream into pieces as it passes; other slices go on as they are."""
    part = Slice(**_slice_of(batch["slice"][0]))
    if not part.is_stream:
        yield _unit(part, part.name)
        return
    count = 0
    try:
        for count, payload in enumerate(read_pieces(part, job.source, job.slice_bytes), 1):
            name = _piece_name(part, count - 1)
            yield _unit(part, name, b"" if name in done else _pack(payload), is_done=name in done)
        job.output.write_text(f"work/{part.name}.stream.json", json.dumps({"pieces": count}))
    except Exception as error:
        if not _is_mendable(error):
            raise
        yield _unit(part, part.name, error=_sentence(error, part))


def _unit(part: Slice, name: str, payload: bytes = b"", *, is_done: bool = False, error: str = "") -> dict[str, Any]:
    return {
        "slice": np.array([json.dumps(asdict(part))]),
        "name": np.array([name]),
        "payload": np.array([payload], dtype=object),
        "is_done": np.array([is_done]),
        "error": np.array([error]),
    }


def _work(batch: Any, job: Job, task: Task) -> dict[str, Any]:
    """Do one slice, or one piece of a stream."""
    part = Slice(**_slice_of(batch["slice"][0]))
    name = str(batch["name"][0]) if "name" in batch else part.name
    error = str(batch["error"][0]) if "error" in batch else ""
    tally = ""
    if not error and not ("is_done" in batch and batch["is_done"][0]):
        try:
            tally = task(job, part, name, _unpack(batch["payload"][0]) if part.is_stream else None)
        except Exception as failure:
            if not _is_mendable(failure):
                raise
            error = _sentence(failure, part)
    return {"name": np.array([name]), "tally": np.array([tally]), "error": np.array([error])}


def prepare_unit(job: Job, part: Slice, name: str, payload: list[bytes] | None = None) -> str:
    """Read, clean, tokenize and write one unit of work; return its record, which is written last."""
    tokenizer = load_tokenizer_of(job.tokenizer)
    tally = Tally(val_below=job.val_below)
    train = ShardWriter(job.output, f"train/{name}-{{:03d}}.parquet", tokenizer, job.settings.shard_tokens * 3 // 2)
    val = ShardWriter(job.output, f"work/{name}.val.parquet", tokenizer)
    doomed = _read_duplicates(job, name)
    documents = _clean_documents(job, part, payload, tally)
    while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
        kept = []
        for position, text, note in batch:
            if position in doomed:
                tally.dropped[doomed[position]] += 1
            else:
                tally.replaced += note == REPLACED
                kept.append(text)
        for text, ids in zip(kept, tokenizer.encode_all(kept), strict=True):
            content = text.encode()
            score = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
            is_val = score < job.val_below
            if not is_val:
                tally.lowest_hash = min(tally.lowest_hash, score)
            (val if is_val else train).add(ids)
            counts = tally.splits[SPLITS[is_val]]
            counts["documents"] += 1
            counts["tokens"] += len(ids) + 1
            counts["bytes"] += len(content)
            tally.lengths[len(ids).bit_length()] += 1
    tally.files = train.close() | val.close()
    record = tally.to_json()
    job.output.write_text(f"work/{name}{UNIT}", record)
    return record


def sign_unit(job: Job, part: Slice, name: str, payload: list[bytes] | None = None) -> str:
    """Write the hashes that duplicates are found by, for one unit of work; return its record."""
    tally = Tally()
    counts = tally.splits["train"]

    def documents() -> Iterator[tuple[int, str]]:
        for position, text, _ in _clean_documents(job, part, payload, tally):
            counts["documents"] += 1
            yield position, text

    for kind, content in cleaning.sign_documents(documents(), job.settings, job.partitions):
        tally.files[_hashes(name, kind)] = job.output.write_bytes(_hashes(name, kind), content)
    record = tally.to_json()
    job.output.write_text(f"work/{name}{SIGNED}", record)
    return record


def _clean_documents(
    job: Job, part: Slice, payload: list[bytes] | None, tally: Tally
) -> Iterator[tuple[int, str, str]]:
    """Yield (position, text, note) of the documents that no rule drops by themselves; count the others."""
    for position, (text, note) in enumerate(read(part, job.source, payload)):
        if text is None:
            tally.dropped[note] += 1
            continue
        tally.source_bytes += len(text) if text.isascii() else len(text.encode())
        reason = EMPTY if not text.strip() else cleaning.reason_to_drop(text, job.settings)
        if reason:
            tally.dropped[reason] += 1
        else:
            yield position, text, note


@ray.remote(num_cpus=1)
def _compare(job: Job, name: str, kind: str, partition: int, units: list[str]) -> None:
    """Find the duplicates of one partition of the hashes, and write them down by unit."""

    def open_units() -> Iterator[IO[bytes]]:
        for unit in units:
            with job.output.filesystem.open(job.output.file(_hashes(unit, kind)), "rb") as handle:
                yield handle

    found = cleaning.find_duplicates(kind, partition, open_units(), job.settings.near_duplicate_similarity)
    rows = [(units[unit], position) for unit in sorted(found) for position in sorted(found[unit])]
    columns = {
        "unit": pa.array([unit for unit, _ in rows], pa.string()),
        "position": [position for _, position in rows],
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=10_000)  # so that a unit's reader skips most of them
    job.output.write_bytes(name, sink.getvalue())


def _read_duplicates(job: Job, unit: str) -> dict[int, str]:
    """Return which documents of a unit to drop as duplicates, and as which kind: position -> reason."""
    reasons: dict[int, str] = {}
    for name in job.duplicates:
        with job.output.filesystem.open(job.output.file(name), "rb") as handle:
            table = pq.read_table(handle, columns=["position"], filters=[("unit", "==", unit)])
        kind = posixpath.basename(name).rpartition("-")[0]
        for position in table.column("position").to_pylist():
            reasons.setdefault(position, kind)
    return reasons


def _hashes(unit: str, kind: str) -> str:
    return f"work/{unit}.{kind}.hashes.parquet"


class ShardWriter:
    """Collects documents into row groups, row groups into files, and writes each file whole."""

    def __init__(self, output: Artifact, name: str, tokenizer: Tokenizer, most_tokens: int = 0) -> None:
        """`name` may hold a place for a number: then a new file begins after `most_tokens`."""
        self._output = output
        self._name = name
        self._most_tokens = most_tokens
        self._schema = pa.schema(
            [pa.field("tokens", pa.list_(pa.field("element", pa.from_numpy_dtype(tokenizer.dtype), nullable=False)))],
            metadata={
                "tokenizer": tokenizer.name,
                "tokenizer_digest": tokenizer.digest,
                "vocabulary_size": str(tokenizer.vocab_size),
                "end_of_text": str(tokenizer.end_of_text),
            },
        )
        self._end = np.array([tokenizer.end_of_text], dtype=tokenizer.dtype)
        self._files: dict[str, FileRecord] = {}
        self._sink: pa.BufferOutputStream | None = None
        self._clear_group()
        self._file_tokens = 0

    def add(self, ids: np.ndarray) -> None:
        """Add one document; its end is marked here."""
        self._documents += [ids, self._end]
        self._ends.append(self._ends[-1] + len(ids) + 1)
        if self._ends[-1] >= ROW_GROUP_TOKENS:
            self._write_group()
            if 0 < self._most_tokens <= self._file_tokens:
                self._close_file()

    def close(self) -> dict[str, FileRecord]:
        """Write what is left, and return the record of every file."""
        self._write_group()
        self._close_file()
        return self._files

    def _clear_group(self) -> None:
        self._documents: list[np.ndarray] = []
        self._ends = [0]

    def _write_group(self) -> None:
        if not self._documents:
            return
        if self._sink is None:
            self._sink = pa.BufferOutputStream()
            # Splitting the bytes halves the time of writing, reads faster and is a tenth smaller than a dictionary.
            self._writer = pq.ParquetWriter(
                self._sink,
                self._schema,
                compression="zstd",
                use_dictionary=False,
                column_encoding={"tokens.list.element": "BYTE_STREAM_SPLIT"},
                write_statistics=False,
            )
        tokens = pa.array(np.concatenate(self._documents))
        lists = pa.ListArray.from_arrays(
            pa.array(np.array(self._ends, dtype=np.int32)), tokens, type=self._schema.field("tokens").type
        )
        self._writer.write_table(pa.table([lists], schema=self._schema), row_group_size=len(lists))
        self._file_tokens += self._ends[-1]
        self._clear_group()

    def _close_file(self) -> None:
        if self._sink is None:
            return
        self._writer.close()
        name = self._name.format(len(self._files))
        self._files[name] = self._output.write_bytes(name, self._sink.getvalue().to_pybytes())
        self._sink = None
        self._file_tokens = 0


@ray.remote(num_cpus=1)
def _merge(job: Job, name: str, parts: list[str]) -> tuple[str, FileRecord]:
    """Join small Parquet files into one with row groups of the usual size."""
    writer = ShardWriter(job.output, name, load_tokenizer_of(job.tokenizer))
    for part in parts:
        for batch in pq.ParquetFile(pa.BufferReader(job.output.read_bytes(part))).iter_batches():
            for document in batch.column("tokens"):
                writer.add(document.values.to_numpy()[:-1])
    return next(iter(writer.close().items()))


def load_tokenizer_of(artifact: Artifact) -> Tokenizer:
    """Load an artifact's tokenizer, once per process."""
    return _load_tokenizer(artifact.url, artifact)


@lru_cache(maxsize=2)
def _load_tokenizer(url: str, artifact: Artifact) -> Tokenizer:
    return parse_tokenizer(artifact.read_text("tokenizer.json"), where=url)


def _is_mendable(error: Exception) -> bool:
    """What a person can mend (a damaged file, a full disk, storage that is away); anything else is our mistake."""
    # By name: importing every client's exceptions would cost each worker seconds.
    clients = ("botocore", "aiobotocore", "aiohttp", "httpx", "httpcore", "huggingface_hub")
    return isinstance(error, (ValueError, OSError)) or type(error).__module__.partition(".")[0] in clients


def _sentence(error: BaseException, part: Slice) -> str:
    text = " ".join(str(error).split()).removesuffix(".")
    if isinstance(error, ValueError):
        return f"{text}."
    what = part.files[0] if part.files else part.format
    return f"Reading {what} or writing its shards failed ({type(error).__name__}: {text})."


def _piece_name(part: Slice, piece: int) -> str:
    return f"{part.name}-{piece:05d}"


def _slice_of(text: Any) -> dict[str, Any]:
    facts = json.loads(str(text))
    return facts | {"files": tuple(facts["files"])}


def _pack(blobs: list[bytes]) -> bytes:
    sizes = np.array([len(blobs), *map(len, blobs)], dtype="<u8")
    return b"".join([sizes.tobytes(), *blobs])


def _unpack(packed: bytes) -> list[bytes]:
    count = int.from_bytes(packed[:8], "little")
    ends = np.cumsum(np.frombuffer(packed, "<u8", count, 8)) + 8 * (count + 1)
    return [packed[start:end] for start, end in zip([8 * (count + 1), *ends[:-1].tolist()], ends.tolist(), strict=True)]
