"""Every format's documents, read from a slice of the input or from a piece of a stream.

for text, note in read(slice_, config.source):                      # on a worker
for piece in read_pieces(slice_, config.source, piece_bytes):       # a stream, cut as it passes
    for text, note in read(slice_, config.source, piece): ...
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.config import SourceConfig
from pipeline.corpus import python_docs
from pipeline.corpus.files import EXPANSION, File, Slice, filesystem_at, slices

DAMAGED = (gzip.BadGzipFile, EOFError, lzma.LZMAError, tarfile.TarError, zstandard.ZstdError, pa.ArrowInvalid)

# What `read` says about a document: why it has no text, or what was done to it.
INVALID_UTF8, REPLACED, NOT_JSON, NO_TEXT = "invalid UTF-8", "replaced UTF-8", "not JSON", "no text"
Document = tuple[str | None, str]
Piece = list[bytes]  # of a stream: whole lines, or whole members of an archive


def read(slice_: Slice, source: SourceConfig, piece: Piece | None = None) -> Iterator[Document]:
    """Yield a slice's documents in their order: (text, "") or (None, why not) or (text, what was done to it).

    `piece` is one of a stream, as `read_pieces` gave it. Raises `ValueError` naming a file that is damaged.
    """
    if slice_.format == "python-docs":
        yield from ((text, "") for text in python_docs.documents())
        return
    where = slice_.files[0]
    try:
        if piece is not None:
            for blob in piece:
                yield from _normalised(_parse(slice_, io.BytesIO(blob), source, where), source)
        else:
            for where in slice_.files:
                if slice_.format == "parquet":
                    yield from _normalised(_read_parquet(slice_, source), source)
                    continue
                with open_file(where) as stream:
                    documents = (
                        _parse_tar(stream, source, where)
                        if slice_.format == "tar"
                        else _parse(slice_, stream, source, where)
                    )
                    yield from _normalised(documents, source)
    except DAMAGED as error:
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {error}).") from None


def read_pieces(slice_: Slice, source: SourceConfig, piece_bytes: int) -> Iterator[Piece]:
    """Cut a stream into pieces of about `piece_bytes` of text, which `read` takes."""
    (url,) = slice_.files
    try:
        with open_file(url) as stream:
            yield from (
                _cut_tar(stream, piece_bytes) if slice_.format == "tar" else _cut_lines(stream, slice_, piece_bytes)
            )
    except DAMAGED as error:
        raise ValueError(f"{url} is damaged ({type(error).__name__}: {error}).") from None


def _cut_tar(stream: IO[bytes], piece_bytes: int) -> Iterator[Piece]:
    piece: Piece = []
    collected = 0.0
    for blob in _members(stream):
        piece.append(blob)
        collected += len(blob) * (EXPANSION[".xz"] if blob.startswith(_XZ) else 1)
        if collected >= piece_bytes:
            yield piece
            piece, collected = [], 0.0
    if piece:
        yield piece


def _cut_lines(stream: IO[bytes], slice_: Slice, piece_bytes: int) -> Iterator[Piece]:
    rest: list[bytes] = []
    while True:
        content = b"".join([*rest, stream.read(piece_bytes)])
        line = stream.readline()
        rest = []
        while slice_.format == "txt" and line.strip():  # up to the end of the document
            rest.append(line)
            line = stream.readline()
        if not content and not line and not rest:
            return
        yield [b"".join([content, *rest, line])]
        rest = []


def open_file(url: str) -> IO[bytes]:
    """Open a file for reading from its start, decompressed."""
    filesystem, path = filesystem_at(url)
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


def _parse(slice_: Slice, stream: IO[bytes], source: SourceConfig, where: str) -> Iterator[Document]:
    if slice_.format == "tar":  # one member of it
        yield from _parse_member(stream.read(), source, where)
    elif slice_.format == "jsonl":
        yield from _parse_jsonl(stream, source, where, slice_.start, slice_.stop)
    elif slice_.format == "warc":
        yield from _parse_warc(stream, source, where)
    elif source.split_text == "files":
        yield _decode(stream.read(), source, where)
    else:
        yield from _parse_blocks(stream, source, where, slice_.start, slice_.stop)


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


def _read_parquet(slice_: Slice, source: SourceConfig) -> Iterator[Document]:
    (url,) = slice_.files
    filesystem, path = filesystem_at(url)
    with filesystem.open(path, "rb", block_size=2**22) as handle:
        file = pq.ParquetFile(handle, pre_buffer=False)
        for group in range(slice_.start, slice_.stop):
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
    found = slices(source, slice_bytes)
    found.sort(key=lambda slice_: hashlib.sha256(slice_.name.encode()).digest())
    share = sample_bytes if len(found) == 1 else max(sample_bytes // min(len(found), 8), 2**20)
    left = sample_bytes
    for slice_ in found:
        if left <= 0:
            return
        left_here = share
        pieces = read_pieces(slice_, source, slice_bytes) if slice_.is_stream else iter([None])
        for piece in pieces:
            for text, _ in read(slice_, source, piece):
                if text is None:
                    continue
                yield text[:left]
                size = len(text.encode("utf-8", "replace"))
                left, left_here = left - size, left_here - size
                if min(left, left_here) <= 0:
                    break
            if min(left, left_here) <= 0:
                break
