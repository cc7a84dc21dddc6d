"""Where documents come from: every format and layout, cut into slices that do not depend on who reads them.

    for part in slices(config.source, slice_bytes):     # on the driver: names and sizes only, no text
        for text, note in read(part, config.source):    # on a worker

A slice is small enough for one task, and the same input is always cut into the same slices: shards are made one
slice each, so their bytes depend on neither the number of workers nor on what was interrupted. Large files that can
only be read from their start (.gz, .zst, tar archives) are one slice that `read_pieces` cuts as it passes.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import platform
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.artifacts import filesystem_of
from pipeline.config import SourceConfig
from pipeline.corpus import python_docs

FORMAT_OF_ENDING = {
    **dict.fromkeys((".txt", ".text"), "txt"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".warc", ".wet"), "warc"),
    **dict.fromkeys((".tar", ".tgz"), "tar"),
}
# Compression -> how many bytes of English one byte holds; only for balancing the work and showing progress.
EXPANSION = {".gz": 2.7, ".zst": 3.0, ".xz": 3.3, ".bz2": 3.3, "": 1.0}
DAMAGED = (gzip.BadGzipFile, EOFError, lzma.LZMAError, tarfile.TarError, zstandard.ZstdError, pa.ArrowInvalid)

# What `read` says about a document: why it has no text, or what was done to it.
INVALID_UTF8, REPLACED, NOT_JSON, NO_TEXT = "invalid UTF-8", "replaced UTF-8", "not JSON", "no text"
Document = tuple[str | None, str]


@dataclass(frozen=True)
class File:
    """One input file: where it is, how large, and what tells one version of it from another."""

    url: str
    size: int
    version: str = ""

    @property
    def compression(self) -> str:
        ending = Path(self.url).suffix.lower()
        return ending if ending in EXPANSION else ""

    @property
    def format(self) -> str:
        name = Path(self.url).name.lower().removesuffix(self.compression)
        # OpenWebText's inner archives are called *_data.xz: an unknown name under a compression is a tar.
        return FORMAT_OF_ENDING.get(Path(name).suffix, "tar" if self.compression else "")

    @property
    def text_bytes(self) -> float:
        return self.size * (EXPANSION[".xz"] if self.format == "tar" else EXPANSION[self.compression])


@dataclass(frozen=True)
class Slice:
    """A part of the input for one task: some files whole, or a range of one."""

    name: str
    format: str
    files: tuple[str, ...]
    text_bytes: int  # about; for progress
    start: int = 0  # of .jsonl and .txt: bytes; of .parquet: row groups
    stop: int = -1
    is_stream: bool = False  # more than one task's work, to be cut by `read_pieces`


def fingerprint_source(source: SourceConfig) -> str:
    """Hash what the documents depend on: the settings, and the files' names, sizes and versions."""
    facts: dict[str, Any] = {"kind": source.kind, "column": source.text_column, "split": source.split_text}
    facts["invalid"] = source.invalid_text
    if source.kind == "python-docs":
        facts["content"] = [platform.python_version(), *python_docs.packages()]
    else:
        facts["content"] = [[file.url, file.size, file.version] for file in find_files(source)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


# Finding files ----------------------------------------------------------------------------------------------------


def find_files(source: SourceConfig) -> list[File]:
    """List the input's files in the order of their names; raises `ValueError` where a path leads to none."""
    paths = source.paths
    if source.kind == "openwebtext" and not paths:
        paths = [f"hf://datasets/{source.dataset}@{_pinned_revision(source.dataset, source.revision)}"]
    files: dict[str, File] = {}
    for path in paths:
        found = _list(path)
        if source.kind == "openwebtext":
            found = _one_layout(found)
        if not found:
            raise ValueError(f"There is no text file at {path!r}: looked for {', '.join(FORMAT_OF_ENDING)}.")
        files.update((file.url, file) for file in found)
    return [files[url] for url in sorted(files)]


def _list(path: str) -> list[File]:
    filesystem, root = _filesystem(path)
    prefix = f"{path.split('://')[0]}://" if "://" in path else ""
    try:
        if any(mark in root for mark in "*?["):
            entries = filesystem.glob(root, detail=True)
        elif FORMAT_OF_ENDING.get(Path(root).suffix) or Path(root).suffix in EXPANSION:
            entries = {root: filesystem.info(root)}
            if entries[root]["type"] == "directory":
                entries = filesystem.find(root, detail=True)
        else:
            entries = filesystem.find(root, detail=True)
    except FileNotFoundError:
        entries = {}
    except PermissionError as error:
        raise ValueError(f"{path!r} may not be read ({error}).") from None
    if not entries:
        raise ValueError(f"There is no file at {path!r}.")
    files = []
    for name, entry in entries.items():
        version = str(entry.get("ETag") or entry.get("blob_id") or entry.get("mtime") or "")
        file = File(prefix + (name if prefix else str(Path(name).resolve())), int(entry.get("size") or 0), version)
        below = name.removeprefix(root) if name.startswith(root) else Path(name).name  # a path given by name is meant
        hidden = any(part.startswith((".", "_")) for part in below.split("/"))
        if entry["type"] == "file" and file.format and not hidden:
            files.append(file)
    return files


def _one_layout(files: list[File]) -> list[File]:
    """Choose among the layouts that OpenWebText lies about in: one place may hold it several times over."""
    parquet = [file for file in files if file.format == "parquet"]
    archives = [file for file in files if file.format == "tar"]
    whole = [file for file in archives if Path(file.url).name == "openwebtext.tar.xz"]
    subsets = [file for file in archives if Path(file.url).suffix == ".tar"]
    inner = [file for file in archives if Path(file.url).suffix == ".xz" and file not in whole]
    plain = [file for file in files if file.format in ("txt", "jsonl") and Path(file.url).stem.lower() != "readme"]
    return next((layout for layout in (parquet, subsets, whole, inner, plain) if layout), [])


@lru_cache(maxsize=8)
def _pinned_revision(dataset: str, revision: str) -> str:
    """Turn a branch or tag into the commit that it is now, so that one run reads one version."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
    except Exception as error:
        raise ValueError(
            f"The hub has no answer for {dataset!r} at {revision!r} ({type(error).__name__});"
            f" check the name, the network and HF_TOKEN, or give a mirror in source.paths."
        ) from None
    assert commit is not None
    return commit


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if url.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return cast(fsspec.AbstractFileSystem, HfFileSystem()), url.removeprefix("hf://").rstrip("/")
    if "://" not in url:
        url = str(Path(url).expanduser())
    return filesystem_of(url)


# Cutting into slices ----------------------------------------------------------------------------------------------


def slices(source: SourceConfig, slice_bytes: int) -> list[Slice]:
    """Cut the input into slices of about `slice_bytes` of text; a pure function of its files."""
    if source.kind == "python-docs":
        return [Slice("00000", "python-docs", (), python_docs.LIMIT_BYTES)]
    files = find_files(source)
    footers = _read_footers([file for file in files if file.format == "parquet"], source.text_column)
    cut: list[Slice] = []
    group: list[File] = []

    def add(part_files: tuple[str, ...], part_format: str, text_bytes: float, **rest: Any) -> None:
        cut.append(Slice(f"{len(cut):05d}", part_format, part_files, int(text_bytes), **rest))

    def close_group() -> None:
        if group:
            add(tuple(file.url for file in group), group[0].format, sum(file.text_bytes for file in group))
            group.clear()

    for file in files:
        can_seek = file.format == "jsonl" or (file.format == "txt" and source.split_text == "blank-lines")
        if file.format == "parquet":
            close_group()
            start, collected = 0, 0
            for row_group, size in enumerate(footers[file.url]):
                collected += size
                if collected >= slice_bytes or row_group == len(footers[file.url]) - 1:
                    add((file.url,), "parquet", collected, start=start, stop=row_group + 1)
                    start, collected = row_group + 1, 0
        elif file.text_bytes <= slice_bytes or not (can_seek or file.format == "tar"):
            # Small files share a slice. A large one that is a single document, or a WARC, is a slice of its own.
            collected = int(sum(each.text_bytes for each in group))
            if group and (group[0].format != file.format or collected + file.text_bytes > slice_bytes):
                close_group()
            group.append(file)
        elif file.compression or file.format == "tar":
            close_group()
            add((file.url,), file.format, file.text_bytes, is_stream=True)
        else:
            close_group()
            count = -(-file.size // slice_bytes)
            edges = [file.size * part // count for part in range(count + 1)]
            for start, stop in pairwise(edges):
                add((file.url,), file.format, stop - start, start=start, stop=stop)
    close_group()
    return cut


def _read_footers(files: list[File], column: str) -> dict[str, list[int]]:
    """Return the size of each row group's text, by file; raises `ValueError` where the column is missing."""

    def read_footer(file: File) -> list[int]:
        filesystem, path = _filesystem(file.url)
        try:
            with filesystem.open(path, "rb") as handle:
                metadata = pq.read_metadata(handle)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file.url} is not a Parquet file ({str(error).splitlines()[0]}).") from None
        names = metadata.schema.to_arrow_schema().names
        if column not in names:
            raise ValueError(f"{file.url} has no column {column!r}; it has {', '.join(names)}. Set source.text_column.")
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        return [
            sum(
                chunk.total_uncompressed_size
                for chunk in map(group.column, range(metadata.num_columns))
                if chunk.path_in_schema.split(".")[0] == column
            )
            for group in groups
        ]

    with ThreadPoolExecutor(max_workers=16) as pool:
        return dict(zip((file.url for file in files), pool.map(read_footer, files), strict=True))


# Reading a slice --------------------------------------------------------------------------------------------------


def read(part: Slice, source: SourceConfig, payload: Iterable[bytes] | None = None) -> Iterator[Document]:
    """Yield a slice's documents in their order: (text, "") or (None, why not) or (text, what was done to it).

    `payload` is a piece of a stream, as `read_pieces` gave it. Raises `ValueError` naming a file that is damaged.
    """
    if part.format == "python-docs":
        yield from ((text, "") for text in python_docs.documents())
        return
    where = part.files[0]
    try:
        if payload is not None:
            for blob in payload:
                yield from _normalised(_parse(part, io.BytesIO(blob), source, where), source)
        else:
            for where in part.files:
                if part.format == "parquet":
                    yield from _normalised(_read_parquet(part, source), source)
                    continue
                with open_file(where) as stream:
                    documents = (
                        _parse_tar(stream, source, where)
                        if part.format == "tar"
                        else _parse(part, stream, source, where)
                    )
                    yield from _normalised(documents, source)
    except DAMAGED as error:
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {error}).") from None


def read_pieces(part: Slice, source: SourceConfig, piece_bytes: int) -> Iterator[list[bytes]]:
    """Cut a stream into pieces of about `piece_bytes` of text, each a list of blobs that `read` takes as payload."""
    (url,) = part.files
    try:
        with open_file(url) as stream:
            yield from _cut_tar(stream, piece_bytes) if part.format == "tar" else _cut_lines(stream, part, piece_bytes)
    except DAMAGED as error:
        raise ValueError(f"{url} is damaged ({type(error).__name__}: {error}).") from None


def _cut_tar(stream: IO[bytes], piece_bytes: int) -> Iterator[list[bytes]]:
    piece: list[bytes] = []
    collected = 0.0
    for blob in _members(stream):
        piece.append(blob)
        collected += len(blob) * (EXPANSION[".xz"] if blob.startswith(_XZ) else 1)
        if collected >= piece_bytes:
            yield piece
            piece, collected = [], 0.0
    if piece:
        yield piece


def _cut_lines(stream: IO[bytes], part: Slice, piece_bytes: int) -> Iterator[list[bytes]]:
    rest: list[bytes] = []
    while True:
        content = b"".join([*rest, stream.read(piece_bytes)])
        line = stream.readline()
        rest = []
        while part.format == "txt" and line.strip():  # up to the end of the document
            rest.append(line)
            line = stream.readline()
        if not content and not line and not rest:
            return
        yield [b"".join([content, *rest, line])]
        rest = []


def open_file(url: str) -> IO[bytes]:
    """Open a file for reading from its start, decompressed."""
    filesystem, path = _filesystem(url)
    raw = filesystem.open(path, "rb", block_size=2**22)
    compression = File(url, 0).compression
    if compression == ".gz" or path.endswith(".tgz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if compression == ".xz":
        return cast(IO[bytes], lzma.LZMAFile(raw))
    if compression == ".bz2":
        return cast(IO[bytes], bz2.BZ2File(raw))
    if compression == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return cast(IO[bytes], io.BufferedReader(reader, 2**20))
    return cast(IO[bytes], raw)


def _parse(part: Slice, stream: IO[bytes], source: SourceConfig, where: str) -> Iterator[Document]:
    if part.format == "tar":  # one member of it
        yield from _parse_member(stream.read(), source, where)
    elif part.format == "jsonl":
        yield from _parse_jsonl(stream, source, where, part.start, part.stop)
    elif part.format == "warc":
        yield from _parse_warc(stream, source, where)
    elif source.split_text == "files":
        yield _decode(stream.read(), source, where)
    else:
        yield from _parse_blocks(stream, source, where, part.start, part.stop)


def _parse_jsonl(stream: IO[bytes], source: SourceConfig, where: str, start: int, stop: int) -> Iterator[Document]:
    """A line belongs to the range in which it starts."""
    if start:
        stream.seek(start - 1)
        start += len(stream.readline()) - 1
    columns: set[str] = set()
    for line in stream:
        if 0 <= stop <= start:
            break
        start += len(line)
        if not line.strip():
            continue
        note, is_odd = "", False
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            is_odd = True
            # A byte order mark, bytes that are not UTF-8, half a character, or no JSON: the lenient reader tells.
            written, note = _decode(line, source, where)
            if written is None:
                yield None, note
                continue
            try:
                row = json.loads(written.removeprefix("\ufeff"))
            except (ValueError, RecursionError):
                yield None, NOT_JSON
                continue
        columns.update(row if isinstance(row, dict) else ())
        text = row.get(source.text_column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            yield None, NO_TEXT
            continue
        if is_odd and b"\\u" in line:
            mended, why = _without_surrogates(text, source, where)
            yield mended, why or note
        else:
            yield text, note
    if columns and source.text_column not in columns:
        found = ", ".join(sorted(columns))
        raise ValueError(f"{where} has no column {source.text_column!r}; it has {found}. Set source.text_column.")


def _parse_blocks(stream: IO[bytes], source: SourceConfig, where: str, start: int, stop: int) -> Iterator[Document]:
    """Split on blank lines; a block belongs to the range in which the blank line before it starts."""
    position = start
    if start:
        stream.seek(start - 1)
        position += len(stream.readline()) - 1
    is_ours = start == 0
    block: list[bytes] = []
    for line in stream:
        if line.strip():
            if is_ours:
                block.append(line)
        else:
            if block:
                yield _decode(b"".join(block).rstrip(b"\r\n"), source, where)
                block = []
            if 0 <= stop <= position:
                return
            is_ours = True
        position += len(line)
    if block:
        yield _decode(b"".join(block).rstrip(b"\r\n"), source, where)


def _parse_warc(stream: IO[bytes], source: SourceConfig, where: str) -> Iterator[Document]:
    """Take the text of WET records, and of WARC responses and resources that are plain text."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    try:
        for record in ArchiveIterator(stream):
            headers = record.http_headers or record.rec_headers
            is_text = (headers.get_header("Content-Type") or "").lower().startswith("text/plain")
            if record.rec_type in ("conversion", "response", "resource"):
                yield _decode(record.content_stream().read(), source, where) if is_text else (None, NO_TEXT)
    except ArchiveLoadFailed as error:
        raise ValueError(f"{where} is not a WARC file ({error}).") from None


_XZ = b"\xfd7zXZ\x00"


def _members(stream: IO[bytes]) -> Iterator[bytes]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else it remembers every member of millions
            hidden = Path(member.name).name.startswith(".")
            if member.isfile() and not hidden:
                handle = archive.extractfile(member)
                assert handle is not None
                yield handle.read()
    while stream.read(2**20):  # to the end, where compression keeps its checksums
        pass


def _parse_tar(stream: IO[bytes], source: SourceConfig, where: str) -> Iterator[Document]:
    for blob in _members(stream):
        yield from _parse_member(blob, source, where)


def _parse_member(blob: bytes, source: SourceConfig, where: str) -> Iterator[Document]:
    """A member is a text, or an .xz that holds a tar of texts (or one text)."""
    if not blob.startswith(_XZ):
        yield _decode(blob, source, where)
        return
    content = lzma.decompress(blob)
    if content[257:262] == b"ustar":
        yield from _parse_tar(io.BytesIO(content), source, where)
    else:
        yield _decode(content, source, where)


_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
)


def _read_parquet(part: Slice, source: SourceConfig) -> Iterator[Document]:
    (url,) = part.files
    filesystem, path = _filesystem(url)
    with filesystem.open(path, "rb", block_size=2**22) as handle:
        file = pq.ParquetFile(handle, pre_buffer=False)
        for group in range(part.start, part.stop):
            column = file.read_row_group(group, columns=[source.text_column]).column(0)
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if not any(is_text(column.type) for is_text in _TEXT_TYPES):
                raise ValueError(f"The column {source.text_column!r} of {url} holds {column.type}, not text.")
            for chunk in column.chunks:
                # As bytes: a file may claim UTF-8 and not hold it.
                for raw in chunk.cast(pa.large_binary()):
                    yield (None, NO_TEXT) if not raw.is_valid else _decode(raw.as_py(), source, url)


def _decode(raw: bytes, source: SourceConfig, where: str) -> Document:
    try:
        return raw.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        if source.invalid_text == "fail":
            raise ValueError(
                f"A document of {where} is not valid UTF-8 at its byte {error.start}; source.invalid_text can be"
                f" replace or skip."
            ) from None
        if source.invalid_text == "skip":
            return None, INVALID_UTF8
        return raw.decode("utf-8", errors="replace"), REPLACED


def _without_surrogates(text: str, source: SourceConfig, where: str) -> Document:
    """JSON can spell half of a character (\\ud800), which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _decode(text.encode("utf-8", "surrogatepass"), source, where)
    return text, ""


_MANY_NEWLINES = re.compile(r"\n\n\n+")


def _normalised(documents: Iterator[Document], source: SourceConfig) -> Iterator[Document]:
    """For OpenWebText what the reference loader does: at most one empty line, and none around the text."""
    if source.kind != "openwebtext":
        yield from documents
        return
    for text, note in documents:
        if text is not None:
            text = (_MANY_NEWLINES.sub("\n\n", text) if "\n\n\n" in text else text).strip()
        yield text, note


# A sample ---------------------------------------------------------------------------------------------------------


def iterate_text(source: SourceConfig, sample_bytes: int, slice_bytes: int = 2**25) -> Iterator[str]:
    """Yield about `sample_bytes` of the corpus, the same each time, from slices spread over all of it.

    Of each slice at most an eighth of the sample is taken, so that one large file cannot fill it alone where there
    are others.
    """
    parts = slices(source, slice_bytes)
    parts.sort(key=lambda part: hashlib.sha256(part.name.encode()).digest())
    share = sample_bytes if len(parts) == 1 else max(sample_bytes // min(len(parts), 8), 2**20)
    left = sample_bytes
    for part in parts:
        if left <= 0:
            return
        left_here = share
        pieces = read_pieces(part, source, slice_bytes) if part.is_stream else iter([None])
        for payload in pieces:
            for text, _ in read(part, source, payload):
                if text is None:
                    continue
                yield text[:left]
                size = len(text.encode("utf-8", "replace"))
                left, left_here = left - size, left_here - size
                if min(left, left_here) <= 0:
                    break
            if min(left, left_here) <= 0:
                break
