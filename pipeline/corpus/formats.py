"""Every format's documents, read from a slice of the input or from a piece of a stream.

for text, note in read(slice_, config.source): ...                  # on a worker
for piece in read_pieces(slice_, config.source, piece_bytes):       # a stream, cut as it passes
    for text, note in read(slice_, config.source, piece): ...
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import READABLE, SourceConfig
from pipeline.corpus import conversations, python_docs, python_questions
from pipeline.corpus.archives import TAR_BLOCK_BYTES, Member, is_tar, read_members, read_texts
from pipeline.corpus.compression import BLOCK_BYTES, WHEN_UNCHANGED, Damaged, decompressed, open_file, stream_of
from pipeline.corpus.endings import EXPANSION, NOT_PLAIN_TEXT, File
from pipeline.corpus.files import Slice
from pipeline.corpus.recoding import codec_of, lines_of

# What `read` says about a document: why it has no text, or what was done to it.
INVALID_UTF8, REPLACED, NOT_JSON, NO_TEXT = "invalid UTF-8", "replaced UTF-8", "not JSON", "no text"
NOT_TEXT = "not text"
SAMPLE_SLICE_BYTES = 2**25
COLUMN_ROWS = 100  # of a file, one of which must have the text column
Document = tuple[str | None, str]
Piece = list[Member]  # of a stream: whole lines, or whole members of an archive


def read(slice_: Slice, source: SourceConfig, piece: Piece | None = None) -> Iterator[Document]:
    """Yield a slice's documents in their order: (text, "") or (None, why not) or (text, what was done to it).

    `piece` is one of a stream, as `read_pieces` gave it. Raises `ValueError` naming a file that is damaged, that
    changed since it was listed, or that cannot be read.
    """
    if slice_.format == "python-docs":
        yield from ((text, "") for text in python_docs.documents())
    elif slice_.format == "python-questions":
        yield from ((text, "") for text in python_questions.conversations())
    elif piece is not None:
        (file,) = slice_.files
        with _Named(file):
            for member in piece:
                lines = io.BytesIO(member.content)
                documents = _read_member(member, source, file) if member.name else _lines(file, lines, source)
                yield from _normalised(documents, source)
    else:
        for file in slice_.files:
            with _Named(file), open_file(file) as stream:
                yield from _normalised(_read_file(file, stream, source, slice_.start, slice_.stop), source)


def read_pieces(slice_: Slice, source: SourceConfig, piece_bytes: int) -> Iterator[Piece]:
    """Cut a stream into pieces of about `piece_bytes` of text, which `read` takes."""
    (file,) = slice_.files
    with _Named(file), open_file(file) as raw:
        stream = decompressed(raw, file.compression)
        if file.format == "tar":
            yield from _cut_members(_checked_tar(file, stream), piece_bytes)
        else:
            stream = lines_of(file, stream)
            if file.format == "jsonl":
                stream = _check_columns(file, stream, source)
            yield from _cut_lines(stream, file.format, piece_bytes)


class _Named:
    """Gives what is wrong with a file's bytes the file's name."""

    def __init__(self, file: File) -> None:
        self._where = file.where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Damaged):
            raise ValueError(f"{self._where} is damaged ({error}).") from None
        if type(error).__name__ == "FileExpired":  # s3fs's, whose import costs a second
            raise ValueError(f"{self._where} changed while it was read. {WHEN_UNCHANGED}") from None
        if isinstance(error, OSError):
            text = " ".join(str(error).split()).removesuffix(".")
            raise ValueError(f"{self._where} cannot be read ({type(error).__name__}: {text}).") from None


# Streams into pieces ----------------------------------------------------------------------------------------------


def _cut_members(stream: IO[bytes], piece_bytes: int) -> Iterator[Piece]:
    piece: Piece = []
    collected = 0.0
    for member in read_members(stream):
        piece.append(member)
        is_inner_archive = member.content.startswith(_XZ)
        collected += len(member.content) * (EXPANSION[".xz"] if is_inner_archive else 1)
        if collected >= piece_bytes:
            yield piece
            piece, collected = [], 0.0
    if piece:
        yield piece


def _cut_lines(stream: IO[bytes], kind: str, piece_bytes: int) -> Iterator[Piece]:
    """Cut behind a line; text that is split on blank lines behind a blank one."""
    while content := stream.read(piece_bytes):
        rest: list[bytes] = []
        if kind == "txt" and not content.endswith(b"\n"):
            rest.append(stream.readline())  # the rest of a line is no blank line, even if nothing is left of it
        rest.append(stream.readline())
        while kind == "txt" and rest[-1].strip():
            rest.append(stream.readline())
        yield [Member("", b"".join([content, *rest]))]


def _checked_tar(file: File, stream: IO[bytes]) -> IO[bytes]:
    """Refuse what only a compression's ending made pass for an archive, as in dump.gz."""
    if file.inner_ending in (".tar", ".tgz"):
        return stream
    head = stream.read(TAR_BLOCK_BYTES)
    if not is_tar(head):
        raise ValueError(
            f"{file.where} holds no tar archive, and its name does not say what else; name it like"
            f" x.jsonl{file.compression}. Read are {READABLE}."
        )
    return stream_of(chain([head], iter(lambda: stream.read(BLOCK_BYTES), b"")))


# Files ------------------------------------------------------------------------------------------------------------


def _read_file(file: File, raw: IO[bytes], source: SourceConfig, start: int = 0, stop: int = -1) -> Iterator[Document]:
    """Read a file whose ending says what it holds, or a range of it."""
    if file.format == "parquet":
        yield from _read_parquet(file, raw if not file.compression else _whole(file, raw), source, start, stop)
        return
    stream = decompressed(raw, file.compression)
    if file.format == "tar":
        for member in read_members(_checked_tar(file, stream)):
            yield from _read_member(member, source, file)
    elif file.format == "warc":
        for content, charset in read_texts(stream):
            yield (None, NO_TEXT) if content is None else _decode(content, source, file.where, charset)
    elif file.format == "txt" and source.split_text == "files":
        yield _decode(stream.read(), source, file.where)
    elif start:
        yield from _lines(file, stream, source, start, stop)
    else:
        stream = lines_of(file, stream)
        position = stream.tell() if stream.seekable() else 0
        if file.format == "jsonl":
            stream = _check_columns(file, stream, source)
        yield from _lines(file, stream, source, position, stop, is_begun=True)


def _whole(file: File, raw: IO[bytes]) -> IO[bytes]:
    return io.BytesIO(decompressed(raw, file.compression).read())


def _lines(
    file: File, stream: IO[bytes], source: SourceConfig, start: int = 0, stop: int = -1, is_begun: bool = False
) -> Iterator[Document]:
    if start and not is_begun:  # behind the line that begins before the range
        stream.seek(start - 1)
        start += len(stream.readline()) - 1
    is_first = is_begun or not start
    if file.format == "jsonl":
        return _parse_jsonl(stream, source, file.where, start, stop)
    return _parse_blocks(stream, source, file.where, start, stop, is_first)


def _read_member(member: Member, source: SourceConfig, archive: File) -> Iterator[Document]:
    """Read a file of an archive by its own ending; one with an unknown ending is a text unless it holds zeros."""
    file = File(f"{archive.where}/{member.name}", len(member.content))
    is_text = source.kind == "conversations" and file.format not in conversations.FORMATS
    if file.inner_ending in NOT_PLAIN_TEXT or is_text:
        yield None, f"{file.ending} is not read"
    elif file.format == "tar" and not file.inner_ending:
        stream = decompressed(io.BytesIO(member.content), file.compression)
        content = stream.read()
        if is_tar(content):
            for inner in read_members(io.BytesIO(content)):
                yield from _read_member(inner, source, file)
        else:
            yield _text_or_none(content, source, file.where)
    elif file.format == "txt":
        yield _decode(decompressed(io.BytesIO(member.content), file.compression).read(), source, file.where)
    elif file.format:
        yield from _read_file(file, io.BytesIO(member.content), source)
    else:
        yield _text_or_none(member.content, source, file.where)


def _text_or_none(content: bytes, source: SourceConfig, where: str) -> Document:
    try:
        return (content.decode(), "") if codec_of(content) == ("utf-8", 0) else _decode(content, source, where)
    except UnicodeDecodeError:
        return (None, NOT_TEXT) if b"\0" in content else _decode(content, source, where)


# Lines and blocks -------------------------------------------------------------------------------------------------


def _check_columns(file: File, stream: IO[bytes], source: SourceConfig) -> IO[bytes]:
    """Raise `ValueError` if none of a file's first rows has the text column; return the stream from its start."""
    head = list(islice(stream, COLUMN_ROWS))
    columns: set[str] = set()
    for line in head:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        columns.update(row if isinstance(row, dict) else ())
    is_about_others = file.inner_ending == ".json" and len(head) == 1  # such as dataset_info.json: counted, not refused
    if columns and source.kind == "conversations" and not is_about_others:
        conversations.check_columns(file.where, columns)
    elif columns and source.text_column not in columns and not is_about_others:
        found = ", ".join(sorted(columns))
        raise ValueError(f"{file.where} has no column {source.text_column!r}; it has {found}. Set source.text_column.")
    return stream_of(chain(head, iter(lambda: stream.read(BLOCK_BYTES), b"")))


def _parse_jsonl(
    stream: Iterable[bytes], source: SourceConfig, where: str, start: int, stop: int
) -> Iterator[Document]:
    """A line belongs to the range in which it starts; `start` is where the stream is."""
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
            if not line.endswith(b"\n") and not line.rstrip().endswith(b"}"):
                raise Damaged("its last line is cut") from None
            # Bytes that are not UTF-8, half a character, or no JSON: the lenient reader tells.
            written, note = _decode(line, source, where)
            if written is None:
                yield None, note
                continue
            try:
                row = json.loads(written)
            except (ValueError, RecursionError):
                if not line.endswith(b"\n"):
                    raise Damaged("its last line is cut") from None
                yield None, NOT_JSON
                continue
        if source.kind == "conversations":
            document, reason = conversations.read_row(row)
            yield document, reason or note
            continue
        text = row.get(source.text_column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            yield None, NO_TEXT
        elif is_odd and b"\\u" in line:
            mended, why = _without_surrogates(text, source, where)
            yield mended, why or note
        else:
            yield text, note


def _parse_blocks(
    stream: Iterable[bytes], source: SourceConfig, where: str, position: int, stop: int, is_ours: bool
) -> Iterator[Document]:
    """Split on blank lines; a block belongs to the range in which the blank line before it starts."""
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


_XZ = b"\xfd7zXZ\x00"


# Parquet ----------------------------------------------------------------------------------------------------------

_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)


def _read_parquet(file: File, stream: IO[bytes], source: SourceConfig, start: int, stop: int) -> Iterator[Document]:
    try:
        parquet = pq.ParquetFile(stream, pre_buffer=False)
        if source.kind == "conversations":
            yield from _read_rows(file, parquet, start, stop)
            return
        if source.text_column not in parquet.schema_arrow.names:
            found = ", ".join(parquet.schema_arrow.names)
            raise ValueError(f"{file.where} has no column {source.text_column!r}; it has {found}.")
        for group in range(start, parquet.num_row_groups if stop < 0 else stop):
            column = parquet.read_row_group(group, columns=[source.text_column]).column(0)
            yield from _read_column(file, column, source)
    except pa.ArrowException as error:
        raise Damaged(str(error).splitlines()[0].removesuffix(".")) from None
    except OSError as error:
        if error.errno is not None:  # the file system's; Arrow's own have no number
            raise
        raise Damaged(str(error).splitlines()[0].removesuffix(".")) from None


def _read_rows(file: File, parquet: pq.ParquetFile, start: int, stop: int) -> Iterator[Document]:
    names = parquet.schema_arrow.names
    conversations.check_columns(file.where, names)
    columns = [name for name in conversations.COLUMNS if name in names]
    for group in range(start, parquet.num_row_groups if stop < 0 else stop):
        for batch in parquet.read_row_group(group, columns=columns).to_batches(max_chunksize=1000):
            for row in batch.to_struct_array():
                try:
                    yield conversations.read_row(row.as_py())
                except UnicodeDecodeError:
                    yield None, INVALID_UTF8


def _read_column(file: File, column: pa.ChunkedArray, source: SourceConfig) -> Iterator[Document]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        yield from [(None, NO_TEXT)] * len(column)
        return
    if not any(is_text(column.type) for is_text in _TEXT_TYPES):
        raise ValueError(f"The column {source.text_column!r} of {file.where} holds {column.type}, not text.")
    for chunk in column.chunks:
        # As bytes: a file may claim UTF-8 and not hold it.
        for raw in chunk.cast(pa.large_binary()):
            yield (None, NO_TEXT) if not raw.is_valid else _decode(raw.as_py(), source, file.where)


# Characters -------------------------------------------------------------------------------------------------------


def _decode(raw: bytes, source: SourceConfig, where: str, charset: str = "utf-8") -> Document:
    """Decode a document by its byte order mark or its NUL bytes, or else by its charset."""
    codec, mark = codec_of(raw)
    if (codec, mark) == ("utf-8", 0):
        codec = charset
    try:
        text = raw[mark:].decode(codec)
        return (text, "") if codec == "utf-8" else _without_surrogates(text, source, where)
    except UnicodeDecodeError as error:
        name = codec.removesuffix("-le").removesuffix("-be").upper()
        if source.invalid_text == "fail":
            raise ValueError(
                f"A document of {where} is not valid {name} at its byte {error.start + mark};"
                f" source.invalid_text can be replace or skip."
            ) from None
        if source.invalid_text == "skip":
            return None, INVALID_UTF8
        return raw[mark:].decode(codec, errors="replace"), REPLACED
    except (LookupError, UnicodeError):
        return _decode(raw, source, where)  # a charset that nobody knows, or that is not for text


def _without_surrogates(text: str, source: SourceConfig, where: str) -> Document:
    """Treat half a character as invalid: JSON (\\ud800) and some charsets can spell one."""
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


def sample_documents(source: SourceConfig, sample_bytes: int, found: list[Slice]) -> Iterator[Document]:
    """Yield about `sample_bytes` of the corpus, the same each time, from slices spread over all of it.

    Of each slice at most an eighth of the sample is taken, so that one large file cannot fill it alone where there
    are others.
    """
    found = sorted(found, key=lambda slice_: hashlib.sha256(slice_.name.encode()).digest())
    share = sample_bytes if len(found) <= 1 else max(sample_bytes // min(len(found), 8), 2**20)
    left = sample_bytes
    for slice_ in found:
        if left <= 0:
            return
        left_here = share
        pieces = read_pieces(slice_, source, SAMPLE_SLICE_BYTES) if slice_.is_stream else [None]
        for text, note in chain.from_iterable(read(slice_, source, piece) for piece in pieces):
            if text is None:
                yield None, note
                continue
            if source.kind == "conversations":
                text = conversations.text_to_learn_from(text)
            yield text[:left], note
            size = len(text.encode("utf-8", "replace"))
            left, left_here = left - size, left_here - size
            if min(left, left_here) <= 0:
                break
