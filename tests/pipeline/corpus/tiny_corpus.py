"""A tiny corpus in every format, and its documents read in the order in which shards are numbered."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import zstandard

from pipeline.config import SourceConfig
from pipeline.corpus.files import slices
from pipeline.corpus.formats import read, read_pieces

TEXTS = [
    "The first document.",
    "A second one,\nof two lines.",
    "Третий документ и 漢字",
    "x" * 3000,
    "nul \0 and \r\n breaks <|endoftext|>",
    *(f"Document number {n} holds {'word ' * (n % 40)}" for n in range(60)),
]


def documents(source: SourceConfig, slice_bytes: int = 2000) -> list[str]:
    return [text for text, _ in pairs(source, slice_bytes) if text is not None]


def pairs(source: SourceConfig, slice_bytes: int = 2000) -> list[tuple[str | None, str]]:
    """Read everything, in the order in which shards are numbered."""
    found = []
    for slice_ in slices(source, slice_bytes):
        for piece in read_pieces(slice_, source, slice_bytes) if slice_.is_stream else [None]:
            found += read(slice_, source, piece)
    return found


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "id": i}).encode() + b"\n" for i, text in enumerate(texts))


def files(*paths: Path, **settings: str) -> SourceConfig:
    return SourceConfig(kind="files", paths=[str(path) for path in paths], **settings)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
