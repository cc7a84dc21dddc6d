"""Opening a file of the input: decompressed, with what is damaged or has changed told from what is whole.

A cut file is damaged wherever it is cut: Python's and zstandard's own readers take some cuts, and what follows a
damaged start of a later stream, for the end of the file.
"""

import bz2
import contextlib
import io
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, Protocol, cast

import zstandard
from fsspec.implementations.local import LocalFileSystem

from pipeline.corpus.endings import File
from pipeline.corpus.listing import filesystem_at, version_of

BLOCK_BYTES = 2**20
READ_BYTES = 2**16
ZSTD_BYTES = 2**14  # that zstandard gets at a time, for it has no limit on what comes out
WHEN_UNCHANGED = "Start again when nobody writes to it."
MOST_WINDOW_BYTES = 2**31  # zstd's longest; Reddit's dumps need it


class Damaged(ValueError):
    """Bytes are not what their format says; the reader of the file adds its name."""


class Decompressor(Protocol):
    """One compressed stream: what `bz2` and `lzma` offer."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        block = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = not self._inner.unconsumed_tail and len(block) < max_length
        return block

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


class _Zstd:
    def __init__(self) -> None:
        self._inner = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW_BYTES).decompressobj()
        self._waiting = b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        self._waiting += data
        block, self._waiting = self._waiting[:ZSTD_BYTES], self._waiting[ZSTD_BYTES:]
        return self._inner.decompress(block)

    @property
    def needs_input(self) -> bool:
        return not self._waiting

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data + self._waiting


DECOMPRESSORS: dict[str, type[Any]] = {
    ".gz": _Gzip,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _Zstd,
}


def decompressed(raw: IO[bytes], compression: str) -> IO[bytes]:
    """Return the stream that is compressed in `raw`, or in several streams of it one after another.

    Reading raises `Damaged` where one of them is cut or wrong.
    """
    if not compression:
        return raw
    return stream_of(_decompress(raw, DECOMPRESSORS[compression]))


def _decompress(raw: IO[bytes], kind: type[Decompressor]) -> Iterator[bytes]:
    waiting = raw.read(READ_BYTES)
    if not waiting:
        raise Damaged("it is empty")
    while waiting:
        decompressor = kind()
        while not decompressor.eof:
            if not waiting and decompressor.needs_input:
                waiting = raw.read(READ_BYTES)
                if not waiting:
                    raise Damaged("it ends early")
            try:
                block = decompressor.decompress(waiting, BLOCK_BYTES)
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError) as error:
                raise Damaged(str(error)) from None
            waiting = b""
            if block:
                yield block
        waiting = decompressor.unused_data
        while not waiting.strip(b"\0") and (block := raw.read(READ_BYTES)):  # zeros pad what was written to blocks
            waiting = block
        waiting = waiting.lstrip(b"\0")


class _Blocks(io.RawIOBase):
    """A stream over an iterator of blocks."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def stream_of(blocks: Iterable[bytes]) -> IO[bytes]:
    """Make one readable stream of blocks that come one by one."""
    return cast(IO[bytes], io.BufferedReader(_Blocks(blocks), BLOCK_BYTES))


@contextlib.contextmanager
def open_file(file: File) -> Iterator[IO[bytes]]:
    """Open a file as it lies there. Raises `ValueError` if it is not the one that was listed, now or at the end."""
    filesystem, path = filesystem_at(file.url)
    with filesystem.open(path, "rb", block_size=2**22) as raw:
        details = getattr(raw, "details", None)
        if details:  # S3 and the hub answer every later request for this version only
            _check_same(file, int(details.get("size") or 0), version_of(details))
        else:
            _check_local(file, filesystem, path)
        try:
            yield cast(IO[bytes], raw)
        except Damaged:
            _check_local(file, filesystem, path)  # it may have been cut while it was read
            raise
        _check_local(file, filesystem, path)


def _check_local(file: File, filesystem: Any, path: str) -> None:
    if isinstance(filesystem, LocalFileSystem):
        status = os.stat(path)
        _check_same(file, status.st_size, str(status.st_mtime))


def _check_same(file: File, size: int, version: str) -> None:
    is_other_version = version and file.version and version != file.version
    if size != file.size or is_other_version:
        how = f"it had {file.size:,} bytes when it was listed and has {size:,} now"
        if size == file.size:
            how = f"it was written again after it was listed, with as many bytes ({size:,})"
        raise ValueError(f"{file.where} changed while it was read: {how}. {WHEN_UNCHANGED}")
