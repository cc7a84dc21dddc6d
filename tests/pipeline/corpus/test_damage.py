"""A file that is cut, altered or changed while it is read is named; its documents are never fewer in silence."""

import bz2
import gzip
import io
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from warcio.warcwriter import WARCWriter

from pipeline.corpus.files import slices
from pipeline.corpus.formats import read, read_pieces
from tests.pipeline.corpus.tiny_corpus import COMPRESS, documents, files, jsonl, pairs, tar_of

TEXTS = [f"document {n} " + "".join(random.Random(n).choices("abcdefgh", k=40)) for n in range(6)]


def warc_of(texts: list[str], is_compressed: bool = False) -> bytes:
    stream = io.BytesIO()
    writer = WARCWriter(stream, gzip=is_compressed)
    for text in texts:
        record = writer.create_warc_record(
            "http://example.org", "conversion", payload=io.BytesIO(text.encode()), warc_content_type="text/plain"
        )
        writer.write_record(record)
    return stream.getvalue()


def parquet_of(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=2, compression="zstd")
    return sink.getvalue()


def members(texts: list[str]) -> dict[str, bytes]:
    return {f"{number}.txt": text.encode() for number, text in enumerate(texts)}


FRAMED: dict[str, bytes] = {
    **{f"x.jsonl{ending}": compress(jsonl(TEXTS)) for ending, compress in COMPRESS.items() if ending},
    "x.txt.gz": gzip.compress(TEXTS[0].encode()),
    "x.tar": tar_of(members(TEXTS[:2]))[: 512 * 5],  # one block of zeros ends it
    "x.tar.gz": gzip.compress(tar_of(members(TEXTS[:2]))),
    "x_data.xz": lzma.compress(tar_of(members(TEXTS))),
    "x.warc": warc_of(TEXTS[:2]),
    "x.wet.gz": warc_of(TEXTS[:1], is_compressed=True),
    "x.parquet": parquet_of(TEXTS),
}


@pytest.mark.parametrize("name", FRAMED)
@pytest.mark.parametrize("slice_bytes", [100, 10**6])
def test_a_framed_file_is_damaged_wherever_it_is_cut(tmp_path: Path, name: str, slice_bytes: int) -> None:
    content = FRAMED[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert documents(files(path), slice_bytes)
    # What lies between two records of an uncompressed crawl cannot be told from its end.
    between = len(warc_of(TEXTS[:1])) if name == "x.warc" else -1
    for size in sorted({*range(0, len(content), 7), *range(len(content) - 20, len(content))} - {between}):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            documents(files(path), slice_bytes)


@pytest.mark.parametrize("slice_bytes", [100, 10**6])
def test_json_lines_are_damaged_where_the_last_one_is_cut(tmp_path: Path, slice_bytes: int) -> None:
    content = jsonl(TEXTS)
    path = tmp_path / "x.jsonl"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        whole_lines, rest = content[:size].count(b"\n"), content[:size].rpartition(b"\n")[2]
        if rest and not rest.endswith(b"}"):
            with pytest.raises(ValueError, match=r"x\.jsonl is damaged \(its last line is cut\)"):
                documents(files(path), slice_bytes)
        else:
            assert documents(files(path), slice_bytes) == TEXTS[: whole_lines + bool(rest)]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.bz2", "x.jsonl.xz", "x.tar", "x.tar.gz"])
def test_a_flipped_bit_is_told_with_the_name_or_changes_nothing_but_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    count = len(documents_of(path, FRAMED[name]))
    generator = random.Random(1)
    for _ in range(150):
        content = bytearray(FRAMED[name])
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        try:
            assert len(documents_of(path, bytes(content))) == count
        except ValueError as error:
            assert name in str(error), error  # noqa: PT017 (either is right)


def documents_of(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return documents(files(path))


@pytest.mark.parametrize("ending", [ending for ending in COMPRESS if ending])
def test_several_compressed_streams_in_one_file_are_all_read_or_it_is_damaged(tmp_path: Path, ending: str) -> None:
    first, second = (COMPRESS[ending](jsonl(texts)) for texts in (TEXTS[:3], TEXTS[3:]))
    path = tmp_path / f"x.jsonl{ending}"
    assert documents_of(path, first + second) == TEXTS
    assert documents_of(path, first + b"\0" * 512) == TEXTS[:3]
    for content in (first + second[:-1], first + second[:1], first + b"not the like", first + b"?" + second[1:]):
        with pytest.raises(ValueError, match=rf"x\.jsonl{ending} is damaged"):
            documents_of(path, content)


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_with_a_long_window_is_read(tmp_path: Path, window_log: int) -> None:
    # A frame that asks for the window; what it holds is small.
    plain = jsonl(TEXTS)
    block = (1 | len(plain) << 3).to_bytes(3, "little") + plain
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, (window_log - 10) << 3]) + block
    assert documents_of(tmp_path / "x.jsonl.zst", frame) == TEXTS


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(jsonl(["more"]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[::-1][::-1])
    os.utime(path, (1, 1))


@pytest.mark.parametrize("change", [append, cut, rewrite])
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.tar", "x.parquet"])
def test_a_file_that_changes_while_it_is_read_is_named(
    tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    content = {
        "x.jsonl": jsonl(TEXTS * 500),
        "x.jsonl.gz": gzip.compress(jsonl(TEXTS * 500)),
        "x.tar": tar_of(members(TEXTS * 50)),
        "x.parquet": parquet_of(TEXTS * 50),
    }[name]
    source = files(path)
    for is_begun in (False, True):
        path.write_bytes(content)
        (slice_,) = slices(source, 10**6)
        found = read(slice_, source)
        if is_begun:
            next(found)
        change(path)
        with pytest.raises(ValueError, match=rf"{name} changed while it was read"):
            list(found)


def test_a_stream_that_changes_between_its_pieces_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(TEXTS * 500)))
    source = files(path)
    (slice_,) = slices(source, 1000)
    pieces = read_pieces(slice_, source, 1000)
    next(pieces)
    append(path)
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz changed while it was read"):
        list(pieces)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(TEXTS))
    source = files(path)
    (slice_,) = slices(source, 10**6)
    path.unlink()
    with pytest.raises(ValueError, match=r"x\.jsonl cannot be read \(FileNotFoundError"):
        list(read(slice_, source))


def test_other_compressions_of_the_same_text_give_the_same(tmp_path: Path) -> None:
    for name, content in {
        "x.jsonl.bz2": bz2.compress(jsonl(TEXTS * 3000)),
        "x.jsonl.zst": zstandard.ZstdCompressor(level=1, write_checksum=True).compress(jsonl(TEXTS * 3000)),
        "x.jsonl.xz": lzma.compress(jsonl(TEXTS * 3000)),
        "x.jsonl.gz": gzip.compress(jsonl(TEXTS * 3000)),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert [text for text, _ in pairs(files(tmp_path / name), 200_000)] == TEXTS * 3000
