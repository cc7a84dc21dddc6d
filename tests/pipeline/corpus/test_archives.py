"""Archives and crawls give their members and records, each by what it says it is."""

import gzip
import io
import lzma
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warcio.warcwriter import WARCWriter

from tests.pipeline.corpus.tiny_corpus import COMPRESS, TEXTS, documents, files, jsonl, pairs, tar_of


def test_warc_gives_its_plain_text(tmp_path: Path) -> None:
    with open(tmp_path / "crawl.warc.wet.gz", "wb") as stream:
        writer = WARCWriter(stream, gzip=True)
        writer.write_record(writer.create_warcinfo_record("crawl", {"software": "test"}))
        for index, text in enumerate(TEXTS):
            writer.write_record(
                writer.create_warc_record(
                    f"http://example.org/{index}",
                    "conversion",
                    payload=io.BytesIO(text.encode()),
                    warc_content_type="text/plain",
                )
            )
    assert documents(files(tmp_path)) == TEXTS


def test_members_of_an_archive_are_read_by_their_own_endings(tmp_path: Path) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["from parquet"]}), table)
    content = tar_of(
        {
            "a.txt": b"plain",
            "news/49960": b"without an ending",
            "b.jsonl": jsonl(["line one", "line two"]),
            "c.json": b'[{"text": "in an array"}]',
            "d.parquet": table.getvalue(),
            "e.txt.gz": gzip.compress(b"compressed"),
            "f.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(100),
            "g.csv": b"a,b\n1,2\n",
            "h.html": b"<p>markup</p>",
            "i.tar": tar_of({"j.txt": b"an archive in an archive", ".hidden": b"x"}),
            "k.md": b"# Title",
            "l": b"\xff\xfeu\0t\0f\0",
        }
    )
    expected = [
        ("plain", ""),
        ("without an ending", ""),
        ("line one", ""),
        ("line two", ""),
        ("in an array", ""),
        ("from parquet", ""),
        ("compressed", ""),
        (None, "not text"),
        (None, ".csv is not read"),
        (None, ".html is not read"),
        ("an archive in an archive", ""),
        ("# Title", ""),
        ("utf", ""),
    ]
    for name, compress in (("x.tar", bytes), ("x.tgz", gzip.compress), ("x.tar.zst", COMPRESS[".zst"])):
        (tmp_path / name).write_bytes(compress(content))
        for slice_bytes in (50, 10**6):
            assert pairs(files(tmp_path / name), slice_bytes) == expected, name


def test_a_compression_alone_is_an_archive_only_if_it_holds_one(tmp_path: Path) -> None:
    (tmp_path / "dump.gz").write_bytes(gzip.compress(tar_of({"a.txt": b"a"})))
    (tmp_path / "part.1_data.xz").write_bytes(lzma.compress(tar_of({"a.txt": b"b"})))
    assert documents(files(tmp_path)) == ["a", "b"]
    (tmp_path / "dump.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    with pytest.raises(ValueError, match=r"dump\.gz holds no tar archive, .* name it like x\.jsonl\.gz"):
        documents(files(tmp_path))


def answer(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *headers, "", ""]).encode() + body


def record(content: bytes, kind: str = "response", media_type: str = "application/http; msgtype=response") -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Type: {media_type}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content + b"\r\n\r\n"


@pytest.mark.parametrize("length", ["x", "", "-1", "9" * 18, "4"])
def test_a_record_with_a_wrong_length_is_damaged(tmp_path: Path, length: str) -> None:
    content = record(b"of a WET", "conversion", "text/plain").replace(b"Length: 8", f"Length: {length}".encode())
    (tmp_path / "x.wet").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.wet is damaged \(.*Content-Length"):
        pairs(files(tmp_path))


def test_answers_in_a_warc_are_decoded_as_they_say(tmp_path: Path) -> None:
    plain = "Content-Type: text/plain"
    chunked = "Transfer-Encoding: chunked"
    records = [
        b"\r\n\n",  # some writers begin with an empty line
        record(b"{}", "warcinfo", "application/json"),
        record(b"of a WET", "conversion", "text/plain"),
        record(answer("naïve".encode("latin-1"), f"{plain}; charset=ISO-8859-1")),
        record(answer("привет".encode("cp1251"), f'{plain}; charset="windows-1251"')),
        record(answer(b"unknown charset", f"{plain}; charset=klingon")),
        record(answer(b"no charset for text", f"{plain}; charset=hex")),
        record(answer(b"xn--no-host-", f"{plain}; charset=idna")),
        record(answer(b"half +2AA- a character", f"{plain}; charset=utf-7")),
        record(answer(gzip.compress(b"gzipped"), plain, "Content-Encoding: gzip")),
        record(answer(zlib.compress(b"deflated"), plain, "Content-Encoding: deflate")),
        record(answer(b"\x0b\x02\x80brotli\x03", plain, "Content-Encoding: br")),
        record(answer(b"4\r\nchun\r\n3;x=1\r\nked\r\n0\r\n\r\n", plain, chunked)),
        record(answer(b"chunks joined by the crawler", plain, chunked)),
        record(answer(b"<p>markup</p>", "Content-Type: text/html")),
        record(b"HTTP/1.1 200 OK\r\nContent-Type: text/pl"),
    ]
    expected = [
        ("of a WET", ""),
        ("naïve", ""),
        ("привет", ""),
        ("unknown charset", ""),
        ("no charset for text", ""),
        ("xn--no-host-", ""),
        ("half \ufffd\ufffd\ufffd a character", "replaced UTF-8"),
        ("gzipped", ""),
        ("deflated", ""),
        (None, "no text"),
        ("chunked", ""),
        ("chunks joined by the crawler", ""),
        (None, "no text"),
        (None, "no text"),
    ]
    (tmp_path / "x.warc").write_bytes(b"".join(records))
    assert pairs(files(tmp_path)) == expected
