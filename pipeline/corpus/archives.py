"""What is in a tar archive or in a WARC crawl, one after another; a cut one is damaged wherever it is cut."""

import io
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from pipeline.corpus.compression import BLOCK_BYTES, Damaged, decompressed
from pipeline.corpus.endings import NOT_PLAIN_TEXT, File

TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Member:
    """One file of an archive; in a piece of another stream some whole lines, without a name."""

    name: str
    content: bytes


class _Header(tarfile.TarInfo):
    """A header whose faults are told: tarfile takes a wrong one after the first for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # zeros, which end an archive
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error) or "it ends early") from None


def read_members(stream: IO[bytes]) -> Iterator[Member]:
    """Yield the files of a tar archive that are not hidden; the content of those that are not read is left out."""
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it remembers every member of millions
                if not member.isfile() or posixpath.basename(member.name).startswith("."):
                    continue
                if File(member.name, 0).inner_ending in NOT_PLAIN_TEXT:
                    yield Member(member.name, b"")
                    continue
                handle = archive.extractfile(member)
                assert handle is not None
                yield Member(member.name, handle.read())
    except tarfile.TarError as error:
        raise Damaged(str(error)) from None
    while stream.read(2**20):  # to the end, where compression keeps its checksums
        pass


def is_tar(head: bytes) -> bool:
    """Whether these are the first bytes of a tar archive."""
    try:
        tarfile.TarInfo.frombuf(head[:TAR_BLOCK_BYTES], "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return True  # an empty one
    except tarfile.HeaderError:
        return False
    return True


# WARC -------------------------------------------------------------------------------------------------------------


def read_texts(stream: IO[bytes]) -> Iterator[tuple[bytes | None, str]]:
    """Yield (text, its encoding) of WET records, WARC responses and resources; None for what is no plain text."""
    for headers, content in _records(stream):
        kind = headers.get("warc-type", "").lower()
        if kind not in ("conversion", "response", "resource"):
            continue
        body: bytes | None = content
        if kind == "response" and headers.get("content-type", "").lower().startswith("application/http"):
            headers, body = _http_answer(content)
        media_type, *parameters = (part.strip() for part in headers.get("content-type", "").lower().split(";"))
        charsets = [part.partition("=")[2].strip("\"' ") for part in parameters if part.startswith("charset=")]
        yield (body if media_type == "text/plain" else None), (charsets or ["utf-8"])[0]


def _records(stream: IO[bytes]) -> Iterator[tuple[dict[str, str], bytes]]:
    is_first = True
    while True:
        line = stream.readline()
        while line and not line.strip():
            line = stream.readline()
        if not line:
            if is_first:
                raise Damaged("it is empty")
            return
        if not line.startswith(b"WARC/"):
            what = "is not a WARC file" if is_first else "has something else where a record should begin"
            raise Damaged(f"it {what}")
        is_first = False
        headers = _headers(iter(stream.readline, b""), "a record's headers")
        length = headers.get("content-length", "")
        if not length.isdecimal():
            raise Damaged(f"a record's Content-Length is {length!r}")
        content = _read_at_most(stream, int(length))
        empty_lines = stream.readline(), stream.readline()
        if len(content) < int(length) or any(line.strip() or not line.endswith(b"\n") for line in empty_lines):
            raise Damaged("it ends inside a record, or a record's Content-Length is wrong")
        yield headers, content


def _read_at_most(stream: IO[bytes], length: int) -> bytes:
    """Read in blocks: a damaged length must not reserve memory that no content will fill."""
    blocks = []
    while length and (block := stream.read(min(length, BLOCK_BYTES))):
        blocks.append(block)
        length -= len(block)
    return b"".join(blocks)


def _headers(lines: Iterator[bytes], what: str) -> dict[str, str]:
    """Read headers up to the empty line that ends them; their names in small letters, the last of equal names."""
    headers: dict[str, str] = {}
    name = ""
    for line in lines:
        text = line.decode("utf-8", "replace")
        if not line.endswith(b"\n"):
            break
        if not text.strip():
            return headers
        if text[0] in " \t" and name:
            headers[name] += f" {text.strip()}"
            continue
        name, _, value = text.partition(":")
        name = name.strip().lower()
        headers[name] = value.strip()
    raise Damaged(f"it ends inside of {what}")


def _http_answer(content: bytes) -> tuple[dict[str, str], bytes | None]:
    """Return the headers and the body of an HTTP answer, decoded; None where it is encoded in a way not read here."""
    stream = io.BytesIO(content)
    stream.readline()  # HTTP/1.1 200 OK
    try:
        headers = _headers(iter(stream.readline, b""), "an answer's headers")
    except Damaged:
        return {}, None  # the server's fault, not the file's
    body: bytes | None = stream.read()
    assert body is not None
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = _dechunked(body)
    for encoding in reversed(headers.get("content-encoding", "").lower().split(",")):
        body = _decoded(body, encoding.strip()) if body is not None else None
    return headers, body


def _dechunked(body: bytes) -> bytes:
    """Join the chunks of a body, or return it as it is: a crawler may have joined them and kept the header."""
    chunks, at = [], 0
    while size := re.compile(rb"([0-9a-fA-F]+)[^\r\n]*\r?\n").match(body, at):
        length = int(size[1], 16)
        chunks.append(body[size.end() : size.end() + length])
        at = size.end() + length + 2
        if not length:
            break
    return b"".join(chunks) if chunks else body


def _decoded(body: bytes, encoding: str) -> bytes | None:
    compressions: Mapping[str, str] = {"gzip": ".gz", "x-gzip": ".gz", "zstd": ".zst"}
    if encoding in ("", "identity"):
        return body
    try:
        if encoding == "deflate":
            return zlib.decompress(body, wbits=15 if body[:1] == b"\x78" else -15)
        if encoding in compressions:
            return decompressed(io.BytesIO(body), compressions[encoding]).read()
    except (Damaged, zlib.error):
        return None
    return None  # br and others
