"""Files of prompts and of answers: found, cut into parts, read and written a part at a time.

    files = find_files("s3://bucket/prompts/*.jsonl")
    parts = cut(files)                                  # a look at every line end, or at Parquet's footers
    for number, given in read_part(parts[0]): ...       # the row's number in the whole input, and the row
    join(output, [part files], format)                  # one file of answers, written whole or not at all

A part is what one actor answers and writes at a time. The same input is always cut into the same parts.
"""

import glob
import io
import os
import posixpath
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline.artifacts import Artifact, expand_home, filesystem_of

FORMAT_OF_ENDING = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
FEWEST_ROWS = 64  # of a part: what a killed actor loses is at most a few parts
MOST_PARTS = 4096
SCANNED_BYTES = 2**20
JOINED_ROWS = 16_384  # of one row group of the answers

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("text", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("more_choices", pa.list_(pa.struct([("text", pa.string()), ("finish_reason", pa.string())]))),
        pa.field("prompt_tokens", pa.int64(), nullable=False),
        pa.field("completion_tokens", pa.int64(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class InputFile:
    """A file of prompts, and what tells whether it is still the one that was cut into parts."""

    url: str
    size: int
    version: str
    format: str


@dataclass(frozen=True)
class Part:
    """Some rows in a row of one file: bytes of JSON lines, or rows of one of Parquet's row groups."""

    number: int
    file: InputFile
    first_row: int  # in the whole input
    rows: int  # blank lines count
    start: int
    stop: int
    row_group: int = 0


@dataclass(frozen=True)
class Counts:
    """What answers there are."""

    rows: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    first_error: str = ""


def format_of(path: str) -> str:
    """Name a file's format by its ending; raises `ValueError` for another one."""
    ending = posixpath.splitext(path)[1].lower()
    if ending not in FORMAT_OF_ENDING:
        raise ValueError(f"{path} ends in {ending or 'nothing'!r}; prompts and answers are .jsonl or .parquet.")
    return FORMAT_OF_ENDING[ending]


def absolute(url: str) -> str:
    """Make a local path mean the same on every worker of this machine."""
    return url if "://" in url else str(expand_home(url).absolute())


# Finding and cutting ----------------------------------------------------------------------------------------------


def find_files(url: str) -> list[InputFile]:
    """List the files at a path, below a folder or under a glob, in the order of their names."""
    url = absolute(url)
    filesystem, path = filesystem_of(url)
    if glob.has_magic(path) and not filesystem.exists(path):
        names = filesystem.glob(path)
    elif filesystem.isdir(path):
        names = filesystem.find(path)
    elif filesystem.exists(path):
        format_of(path)  # a file that is named is meant
        names = [path]
    else:
        raise ValueError(f"There is nothing at {url}.")
    prefix = f"{url.split('://')[0]}://" if "://" in url else ""
    found = []
    for name in sorted(names):
        hidden = posixpath.basename(name).startswith((".", "_"))
        if posixpath.splitext(name)[1].lower() in FORMAT_OF_ENDING and (not hidden or name == path):
            found.append(_describe(f"{prefix}{name}"))
    if not found:
        raise ValueError(f"There is no .jsonl or .parquet file at {url}.")
    return found


def _describe(url: str) -> InputFile:
    filesystem, path = filesystem_of(url)
    entry = filesystem.info(path)
    version = str(entry.get("ETag") or entry.get("mtime") or "")
    return InputFile(url, int(entry["size"]), version, format_of(url))


def cut(files: Sequence[InputFile]) -> list[Part]:
    """Cut files into parts, few enough to list and small enough to lose."""
    marks = [_mark_lines(file) if file.format == "jsonl" else _mark_rows(file) for file in files]
    total = sum(rows for found in marks for _, _, _, rows in found)
    step = max(1, -(-total // (FEWEST_ROWS * MOST_PARTS)))  # marks in one part
    parts: list[Part] = []
    first_row = 0
    for file, found in zip(files, marks, strict=True):
        for at in range(0, len(found), step):
            for group in _same_row_group(found[at : at + step]):
                rows = sum(each[3] for each in group)
                parts.append(Part(len(parts), file, first_row, rows, group[0][1], group[-1][2], group[0][0]))
                first_row += rows
    return parts


Mark = tuple[int, int, int, int]  # row group, start, stop, rows


def _same_row_group(marks: Sequence[Mark]) -> Iterator[list[Mark]]:
    ends = [0, *(at for at in range(1, len(marks)) if marks[at][0] != marks[at - 1][0]), len(marks)]
    yield from (list(marks[start:stop]) for start, stop in pairwise(ends) if stop > start)


def _mark_lines(file: InputFile) -> Sequence[Mark]:
    """Find where every `FEWEST_ROWS`th line of a file ends."""
    filesystem, path = filesystem_of(file.url)
    ends = array("Q", [0])
    lines = position = 0
    last = b"\n"
    with filesystem.open(path, "rb") as stream:
        while block := stream.read(SCANNED_BYTES):
            found = block.count(b"\n")
            wanted = FEWEST_ROWS * len(ends) - lines  # lines until the next mark
            at = -1
            while found >= wanted:
                for _ in range(wanted):
                    at = block.index(b"\n", at + 1)
                ends.append(position + at + 1)
                lines += wanted
                found -= wanted
                wanted = FEWEST_ROWS
            lines += found
            position += len(block)
            last = block[-1:]
    lines += last != b"\n"
    if position > ends[-1]:
        ends.append(position)
    rows = [FEWEST_ROWS] * (len(ends) - 2) + [lines - FEWEST_ROWS * (len(ends) - 2)]
    return [(0, start, stop, count) for (start, stop), count in zip(pairwise(ends), rows, strict=False)]


def _mark_rows(file: InputFile) -> Sequence[Mark]:
    with _parquet(file) as opened:
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
    return [
        (group, start, min(start + FEWEST_ROWS, size), min(FEWEST_ROWS, size - start))
        for group, size in enumerate(sizes)
        for start in range(0, size, FEWEST_ROWS)
    ]


# Reading ----------------------------------------------------------------------------------------------------------


def read_part(part: Part) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield each row's number with the row, or with the sentence why it is none; blank lines are left out.

    Raises `ValueError` where the file is not the one that was cut.
    """
    if _describe(part.file.url) != part.file:
        raise ValueError(f"{part.file.url} changed while it was read. Run again when it is complete.")
    if part.file.format == "parquet":
        rows = _row_group(part.file, part.row_group).slice(part.start, part.stop - part.start)
        yield from enumerate(rows.to_pylist(), part.first_row)
        return
    filesystem, path = filesystem_of(part.file.url)
    content = filesystem.cat_file(path, start=part.start, end=part.stop)
    for number, line in enumerate(content.split(b"\n"), part.first_row):
        if line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> dict[str, Any] | str:
    try:
        given = orjson.loads(line)
    except ValueError as error:
        return f"The line is not JSON ({error})."
    return given if type(given) is dict else "The line is not a JSON object with a prompt or messages."


@lru_cache(maxsize=2)  # parts follow one another, and some writers put a million rows into one group
def _row_group(file: InputFile, number: int) -> pa.Table:
    with _parquet(file) as opened:
        return opened.read_row_group(number)


@contextmanager
def _parquet(file: InputFile) -> Iterator[pq.ParquetFile]:
    filesystem, path = filesystem_of(file.url)
    with filesystem.open(path, "rb") as stream:
        try:
            opened = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file.url} is damaged, or no Parquet ({error}).") from None
        yield opened


# Writing ----------------------------------------------------------------------------------------------------------


def encode_answers(answers: Sequence[dict[str, Any]], format_: str) -> bytes:
    """The bytes of one part's answers."""
    if format_ == "jsonl":
        return b"".join(orjson.dumps(answer) + b"\n" for answer in answers)
    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(answers), SCHEMA), written, compression="zstd")
    return written.getvalue()


def join(output: str, work: Artifact, names: Sequence[str], format_: str) -> Counts:
    """Make one file of the parts' answers, and count them; no more than some thousand rows are in memory."""
    with _written_whole(output) as stream:
        count = _Counter()
        if format_ == "jsonl":
            for name in names:
                content = work.read_bytes(name)
                for line in content.splitlines():
                    count.add(orjson.loads(line))
                stream.write(content)
        else:
            _join_tables(stream, work, names, count)
    return count.found()


def _join_tables(stream: IO[bytes], work: Artifact, names: Sequence[str], count: "_Counter") -> None:
    with pq.ParquetWriter(stream, SCHEMA, compression="zstd") as writer:
        gathered: list[pa.Table] = []
        for name in names:
            table = pq.read_table(io.BytesIO(work.read_bytes(name)), schema=SCHEMA)
            for answer in table.select(["row", "prompt_tokens", "completion_tokens", "error"]).to_pylist():
                count.add(answer)
            gathered.append(table)
            if sum(map(len, gathered)) >= JOINED_ROWS:
                writer.write_table(pa.concat_tables(gathered).combine_chunks())
                gathered = []
        if gathered:
            writer.write_table(pa.concat_tables(gathered).combine_chunks())


class _Counter:
    def __init__(self) -> None:
        self._rows = self._failed = self._prompt_tokens = self._completion_tokens = 0
        self._first_error = ""

    def add(self, answer: dict[str, Any]) -> None:
        self._rows += 1
        self._prompt_tokens += answer["prompt_tokens"]
        self._completion_tokens += answer["completion_tokens"]
        if answer["error"] is not None:
            self._failed += 1
            self._first_error = self._first_error or f"row {answer['row']}: {answer['error']}"

    def found(self) -> Counts:
        return Counts(self._rows, self._failed, self._prompt_tokens, self._completion_tokens, self._first_error)


@contextmanager
def _written_whole(url: str) -> Iterator[IO[bytes]]:
    filesystem, path = filesystem_of(url)
    if not isinstance(filesystem, LocalFileSystem):
        with filesystem.open(path, "wb") as stream:  # an S3 object appears when it is closed
            yield stream
        return
    target = Path(path)
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
