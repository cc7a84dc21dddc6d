"""The input's files: found, named by a fingerprint, and cut into slices that do not depend on who reads them.

    listing = find_files(config.source)                               # names and sizes only, no text
    for slice_ in slices(config.source, slice_bytes, listing): ...    # on the driver

A slice of the input is small enough for one task, and the same input is always cut into the same slices: shards are
made one slice each, so their bytes depend on neither the number of workers nor on what was interrupted. A large file
that can only be read from its start (.gz, .zst, tar archives) is one slice, a stream, which `formats.read_pieces` cuts
into pieces as it passes.
"""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import READABLE, SourceConfig
from pipeline.corpus import conversations, python_docs, python_questions
from pipeline.corpus.endings import NO_ENDING, File
from pipeline.corpus.listing import Found, filesystem_at, list_path, pinned_revision
from pipeline.corpus.progress import Progress
from pipeline.corpus.recoding import HEAD_BYTES, needs_recoding

Result = TypeVar("Result")
CACHED_FILES = 1_000_000  # whose heads and footers the stages of one run read once
GENERATED = {
    "python-docs": python_docs.LIMIT_BYTES,
    "python-questions": python_questions.LIMIT_BYTES,
}  # kinds without files
SILENT_SECONDS = 2.0  # a listing that takes no longer needs no progress line


@dataclass(frozen=True)
class Listing:
    """The files of a source that are read, by URL, and how many are not: by ending."""

    files: tuple[File, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """A part of the input for one task: some files whole, or a range of one."""

    name: str
    format: str
    files: tuple[File, ...]
    text_bytes: int  # about; for progress
    start: int = 0  # of .jsonl and .txt: bytes; of .parquet: row groups
    stop: int = -1
    is_stream: bool = False  # more than one task's work: `formats.read_pieces` cuts it


_fingerprinted: dict[str, Listing] = {}  # the listing that this process's last fingerprint was made of, by its source


def fingerprint_source(source: SourceConfig) -> str:
    """Hash what the documents depend on: the settings, and the files' names, sizes and versions.

    Of a mix that is its sources; how they are weighed changes none of their shards.
    """
    _fingerprinted.clear()
    return fingerprint_part(source)


def fingerprint_part(source: SourceConfig) -> str:
    """What `fingerprint_source` says of one source of a mix, without listing again what was listed for the mix."""
    if source.kind == "mix":
        return _hash(
            {"kind": "mix", "sources": [[part.name, fingerprint_part(part.source)] for part in source.parts()]}
        )
    facts: dict[str, Any] = {"kind": source.kind, "column": source.text_column, "split": source.split_text}
    facts["invalid"] = source.invalid_text
    if source.kind in GENERATED:
        facts["content"] = [platform.python_version(), *python_docs.packages()]
    else:
        _fingerprinted[repr(source)] = listing = listing_of(source)
        facts["content"] = [[file.url, file.size, file.version] for file in listing.files]
    return _hash(facts)


def _hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def listing_of(source: SourceConfig) -> Listing:
    """Return the listing that the source's fingerprint was made of, or list it now if none was made here."""
    if source.kind == "mix":
        listings = [listing_of(part.source) for part in source.parts()]
        ignored: Counter[str] = Counter()
        for listing in listings:
            ignored.update(listing.ignored)
        return Listing(tuple(file for listing in listings for file in listing.files), ignored)
    return _fingerprinted.get(repr(source)) or find_files(source)


# Finding files ----------------------------------------------------------------------------------------------------


def find_files(source: SourceConfig) -> Listing:
    """List the input's files in the order of their URLs; raises `ValueError` where a path leads to none."""
    if source.kind in GENERATED:
        return Listing()
    paths = source.paths
    if source.kind == "openwebtext" and not paths:
        paths = [f"hf://datasets/{source.dataset}@{pinned_revision(source.dataset, source.revision)}"]
    files: dict[str, File] = {}
    ignored: dict[str, str] = {}  # URL -> ending
    with Progress("listing", None, " files", silent_seconds=SILENT_SECONDS) as progress:
        for path in paths:
            found = list_path(path, progress)
            readable = [file for file in found.files if _is_read(file, source)]
            if source.kind == "openwebtext":
                readable = _one_layout(readable)
            else:
                ignored |= {file.url: file.ending for file in found.files if not _is_read(file, source)}
            if not readable:
                raise ValueError(_nothing_at(path, found, source))
            for file in readable:
                if file.url not in files or not file.given:  # a file's own name before that of a link to it
                    files[file.url] = file
    unread = Counter(ending for url, ending in ignored.items() if url not in files)
    return Listing(tuple(files[url] for url in sorted(files)), unread)


def _is_read(file: File, source: SourceConfig) -> bool:
    """Whether a file's ending is one that this source reads; a text holds no conversation."""
    return bool(file.format) and (source.kind != "conversations" or file.format in conversations.FORMATS)


def _nothing_at(path: str, found: Found, source: SourceConfig) -> str:
    unread = Counter(file.ending for file in found.files if not _is_read(file, source))
    kind, readable = "text file", READABLE
    if source.kind == "conversations":
        kind, readable = "file of conversations", conversations.READABLE
    if found.is_one_file:
        ending = next(iter(unread))
        if ending == NO_ENDING:
            return f"{path} cannot be read: its name has no ending; give it one of {readable}."
        return f"{path} cannot be read: {ending} is not among {readable}. Turn it into one of them."
    there = f"; it holds {count_endings(unread)}" if unread else ""
    return f"There is no {kind} at {path!r}: looked for {readable}{there}."


def count_endings(counts: Mapping[str, int]) -> str:
    """Write endings with their numbers of files, the most frequent first: '7 .pdf, 2 .docx'."""
    return ", ".join(f"{count:,} {ending}" for ending, count in sorted(counts.items(), key=lambda row: (-row[1], row)))


def _one_layout(files: list[File]) -> list[File]:
    """Choose among the layouts that OpenWebText lies about in: one place may hold it several times over."""
    parquet = [file for file in files if file.format == "parquet"]
    archives = [file for file in files if file.format == "tar"]
    whole = [file for file in archives if file.name == "openwebtext.tar.xz"]
    subsets = [file for file in archives if file.name.endswith(".tar")]
    inner = [file for file in archives if file.name.endswith(".xz") and file not in whole]
    plain = [
        file
        for file in files
        if file.format in ("txt", "jsonl") and file.name.rpartition(".")[0].lower() != "readme" and file.ending != ".md"
    ]
    return next((layout for layout in (parquet, subsets, whole, inner, plain) if layout), [])


# Cutting into slices ----------------------------------------------------------------------------------------------


def slices(source: SourceConfig, slice_bytes: int, listing: Listing | None = None) -> list[Slice]:
    """Cut the input into slices of about `slice_bytes` of text; a pure function of its files."""
    if source.kind in GENERATED:
        return [Slice("00000", source.kind, (), GENERATED[source.kind])]
    files = (listing or listing_of(source)).files
    read_footer = partial(_read_footer, column="" if source.kind == "conversations" else source.text_column)
    footers = dict(_in_threads(read_footer, [file for file in files if file.format == "parquet"], "footers"))
    large = [file for file in files if _can_seek(file, source) and file.size > slice_bytes]
    recoded = {file for file, head in _in_threads(_read_head, large, "heads") if needs_recoding(file, head)}
    cut: list[Slice] = []
    group: list[File] = []
    group_bytes = 0.0

    def add(names: tuple[File, ...], kind: str, text_bytes: float, **rest: Any) -> None:
        cut.append(Slice(f"{len(cut):05d}", kind, names, int(text_bytes), **rest))

    def close_group() -> None:
        nonlocal group_bytes
        if group:
            add(tuple(group), group[0].format, group_bytes)
            group.clear()
            group_bytes = 0.0

    for file in files:
        if file.format == "parquet":
            close_group()
            start, collected = 0, 0
            for row_group, size in enumerate(footers[file]):
                collected += size
                if collected >= slice_bytes or row_group == len(footers[file]) - 1:
                    add((file,), "parquet", collected, start=start, stop=row_group + 1)
                    start, collected = row_group + 1, 0
        elif file.text_bytes <= slice_bytes or not (_is_cut(file, source) or file.format == "tar"):
            # Small files share a slice. A large one that is a single document, or a WARC, is a slice of its own.
            if group and (group[0].format != file.format or int(group_bytes) + file.text_bytes > slice_bytes):
                close_group()
            group.append(file)
            group_bytes += file.text_bytes
        elif file.compression or file.format == "tar" or file in recoded:
            close_group()
            add((file,), file.format, file.text_bytes, is_stream=True)
        else:
            close_group()
            count = -(-file.size // slice_bytes)
            edges = [file.size * index // count for index in range(count + 1)]
            for start, stop in pairwise(edges):
                add((file,), file.format, stop - start, start=start, stop=stop)
    close_group()
    return cut


def _is_cut(file: File, source: SourceConfig) -> bool:
    """Whether documents of one file can go to several slices."""
    return file.format == "jsonl" or (file.format == "txt" and source.split_text == "blank-lines")


def _can_seek(file: File, source: SourceConfig) -> bool:
    return _is_cut(file, source) and not file.compression


@lru_cache(maxsize=CACHED_FILES)
def _read_head(file: File) -> bytes:
    filesystem, path = filesystem_at(file.url)
    return filesystem.cat_file(path, start=0, end=HEAD_BYTES)


@lru_cache(maxsize=CACHED_FILES)
def _read_footer(file: File, column: str) -> list[int]:
    """Return the size of each row group's text; raises `ValueError` where the column is missing.

    Without a column that of conversations: all columns in which one may be.
    """
    filesystem, path = filesystem_at(file.url)
    try:
        with filesystem.open(path, "rb") as handle:
            metadata = pq.read_metadata(handle)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        raise ValueError(f"{file.where} is damaged or not a Parquet file ({reason}).") from None
    names = metadata.schema.to_arrow_schema().names
    if not column:
        conversations.check_columns(file.where, names)
    elif column not in names:
        raise ValueError(f"{file.where} has no column {column!r}; it has {', '.join(names)}. Set source.text_column.")
    columns = (column,) if column else conversations.COLUMNS
    return [
        sum(
            chunk.total_uncompressed_size
            for chunk in map(group.column, range(metadata.num_columns))
            if chunk.path_in_schema.split(".")[0] in columns
        )
        for group in map(metadata.row_group, range(metadata.num_row_groups))
    ]


def _in_threads(do: Callable[[File], Result], files: list[File], label: str) -> Iterator[tuple[File, Result]]:
    """Do one small request for each file, many at a time, with a progress line if it takes long."""
    with (
        Progress(label, len(files), " files", silent_seconds=SILENT_SECONDS) as progress,
        ThreadPoolExecutor(max_workers=16) as pool,
    ):
        for file, result in zip(files, pool.map(do, files), strict=True):
            progress.add(1)
            yield file, result
