"""What has to be rewritten before it can be read line by line: UTF-16 and UTF-32, byte order marks, JSON arrays."""

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import IO

from pipeline.corpus.compression import BLOCK_BYTES, Damaged, stream_of
from pipeline.corpus.endings import File

HEAD_BYTES = 64  # enough to tell
# Longest first: UTF-16's mark is the start of UTF-32's.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)


def codec_of(head: bytes) -> tuple[str, int]:
    """Return a text's encoding, and the length of the byte order mark that names it: UTF-8 and 0 for most texts.

    Latin text in UTF-16 or UTF-32 is known without a mark, by NUL bytes in the same place of every character: read as
    UTF-8 it would be a text of NULs.
    """
    for mark, codec in MARKS:
        if head.startswith(mark):
            return codec, len(mark)
    head = head[:HEAD_BYTES]
    if len(head) >= 8 and b"\0" in head:
        for codec, width, place in (("utf-32-le", 4, 0), ("utf-32-be", 4, 3), ("utf-16-le", 2, 0), ("utf-16-be", 2, 1)):
            letters = head[place::width]
            if 0 not in letters and head.count(0) > 0.9 * (len(head) - len(letters)):
                return codec, 0
    return "utf-8", 0


def needs_recoding(file: File, head: bytes) -> bool:
    """Whether lines of the file cannot be found by their bytes: it is not UTF-8, or one JSON value over many lines."""
    codec, mark = codec_of(head)
    return codec != "utf-8" or _is_one_value(file, head[mark:])


def _is_one_value(file: File, head: bytes) -> bool:
    if file.inner_ending != ".json":
        return False
    begun = head.lstrip()
    # An array, or an object that is written over several lines. Most .json corpora are JSON lines.
    return begun.startswith(b"[") or re.match(rb"\{[ \t\r]*\n", begun) is not None


def lines_of(file: File, stream: IO[bytes]) -> IO[bytes]:
    """Return a stream from its start as UTF-8 without a mark, and as JSON lines where it is JSON of another shape."""
    head = stream.read(HEAD_BYTES)
    codec, mark = codec_of(head)
    if codec != "utf-8":
        stream = stream_of(_recode(_joined(head[mark:], stream), codec))
        head, mark = stream.read(HEAD_BYTES), 0
    if _is_one_value(file, head[mark:]):
        return stream_of(b" ".join(row.splitlines()) + b"\n" for row in _json_rows(_joined(head[mark:], stream)))
    if stream.seekable():
        stream.seek(mark)
        return stream
    return stream_of(_joined(head[mark:], stream))


def _joined(head: bytes, stream: IO[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    while block := stream.read(BLOCK_BYTES):
        yield block


def _recode(blocks: Iterable[bytes], codec: str) -> Iterator[bytes]:
    """Turn text of another encoding into UTF-8; half a character stays invalid, so that source.invalid_text decides."""
    decoder = codecs.getincrementaldecoder(codec)("surrogatepass")
    try:
        for block in blocks:
            yield decoder.decode(block).encode("utf-8", "surrogatepass")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise Damaged(f"its {codec[:-3].upper()} is cut or wrong: {error.reason}") from None


_BRACKET = re.compile(rb'["\[\]{},]')
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def _json_rows(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield each element of arrays at the top, and other values at the top as they are; memory holds one of them."""
    data = b""
    row, at = 0, 0  # where the current row begins, and how far it was looked at
    depth, floor = 0, 0  # brackets that are open; of these 1 is the array whose elements are rows
    for block in blocks:
        data, at, row = data[row:] + block, at - row, 0
        while found := _BRACKET.search(data, at):
            mark = found[0]
            if mark == b'"':
                string = _STRING.match(data, found.start())
                if string is None:
                    at = found.start()
                    break  # its end is in a later block
                at = string.end()
                continue
            at = found.end()
            if mark in b"[{":
                if depth == 0:
                    floor = int(mark == b"[")
                    row = at if floor else found.start()
                depth += 1
                continue
            if mark in b"]}":
                depth -= 1
            ends_row = depth == floor if mark == b"," else depth < floor
            if (ends_row and floor) or (mark == b"}" and depth == 0):
                content = data[row : found.start() if floor else at].strip()
                if content:
                    yield content
                row = at
            if depth < 0:
                raise Damaged("its JSON has a closing bracket too many")
        else:
            at = len(data)
    if depth or data[row:].strip():
        raise Damaged("its JSON ends early")
