"""Every format and layout gives its documents once, in order, however it is cut."""

import gzip
import http.server
import json
import lzma
import os
import subprocess
import sys
import textwrap
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import SourceConfig
from pipeline.corpus import python_docs
from pipeline.corpus.files import find_files, fingerprint_source, slices
from pipeline.corpus.formats import sample_documents
from tests.pipeline.corpus.tiny_corpus import COMPRESS, TEXTS, documents, files, jsonl, pairs, tar_of


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("slice_bytes", [97, 1000, 10**6])
def test_jsonl_gives_each_document_once_however_it_is_cut(tmp_path: Path, compression: str, slice_bytes: int) -> None:
    path = tmp_path / f"corpus.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](jsonl(TEXTS)))
    assert documents(files(path), slice_bytes) == TEXTS


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("slice_bytes", [13, 150, 10**6])
def test_text_splits_on_blank_lines_however_it_is_cut(tmp_path: Path, compression: str, slice_bytes: int) -> None:
    blocks = [text.replace("\r\n", "\n").strip() for text in TEXTS]
    path = tmp_path / f"corpus.txt{compression}"
    path.write_bytes(COMPRESS[compression]("\n \n\n".join(["", *blocks, ""]).encode()))
    assert documents(files(path, split_text="blank-lines"), slice_bytes) == blocks


def test_a_text_file_is_one_document_exactly_as_it_is(tmp_path: Path) -> None:
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index:03d}.txt").write_bytes(text.encode())
    assert documents(files(tmp_path)) == TEXTS


@pytest.mark.parametrize("slice_bytes", [100, 10**6])
def test_parquet_is_cut_between_row_groups(tmp_path: Path, slice_bytes: int) -> None:
    table = pa.table({"id": range(len(TEXTS)), "body": TEXTS})
    pq.write_table(table, tmp_path / "part-0.parquet", row_group_size=7)
    source = files(tmp_path, text_column="body")
    assert documents(source, slice_bytes) == TEXTS
    assert len(slices(source, 100)) > 5


RAW = [f"\n\n Title {n}\n\n\n\n\nBody of {n}.\n\n\nEnd. \n" for n in range(24)]
NORMALISED = [f"Title {n}\n\nBody of {n}.\n\nEnd." for n in range(24)]


def inner_archive(texts: list[str]) -> bytes:
    return lzma.compress(tar_of({f"{n:07d}-abc.txt": text.encode() for n, text in enumerate(texts)}))


def inner_archives() -> dict[str, bytes]:
    return {f"openwebtext/urlsf_subset{n:02d}_data.xz": inner_archive(RAW[n * 6 : n * 6 + 6]) for n in range(4)}


def layout_parquet(folder: Path) -> None:
    (folder / "data").mkdir()
    for n in range(2):
        table = pa.table({"text": RAW[n * 12 : n * 12 + 12]})
        pq.write_table(table, folder / "data" / f"train-{n:05d}-of-00002.parquet", row_group_size=5)


def layout_subsets(folder: Path) -> None:
    (folder / "subsets").mkdir()
    archives = list(inner_archives().items())
    for n in range(2):
        (folder / "subsets" / f"urlsf_subset{n:02d}.tar").write_bytes(tar_of(dict(archives[n * 2 : n * 2 + 2])))


def layout_original(folder: Path) -> None:
    (folder / "openwebtext.tar.xz").write_bytes(lzma.compress(tar_of(inner_archives())))


def layout_unpacked(folder: Path) -> None:
    (folder / "openwebtext").mkdir()
    for name, content in inner_archives().items():
        (folder / name).write_bytes(content)


LAYOUTS = [layout_parquet, layout_subsets, layout_original, layout_unpacked]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slice_bytes", [300, 10**6])
def test_openwebtext_is_found_in_every_layout(tmp_path: Path, layout: Callable[[Path], None], slice_bytes: int) -> None:
    (tmp_path / "README.md").write_text("A mirror.")
    layout(tmp_path)
    source = SourceConfig(kind="openwebtext", paths=[str(tmp_path)])
    assert documents(source, slice_bytes) == NORMALISED


def test_openwebtext_in_several_layouts_is_read_once(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        layout(tmp_path)
    assert documents(SourceConfig(kind="openwebtext", paths=[str(tmp_path)])) == NORMALISED


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub's file API answers for one dataset in a folder."""

    folder: Path
    commit = "a" * 40
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.asked.append(path)
        api = "/api/datasets/owner/corpus"
        if path.startswith((f"{api}/revision/", f"{api}/refs")) or path == api:
            self.answer_json({"id": "owner/corpus", "sha": self.commit, "siblings": [], "branches": [], "tags": []})
        elif path.startswith(f"{api}/tree/"):
            below = path.removeprefix(f"{api}/tree/").partition("/")[2]
            recursive = "recursive=true" in self.path.lower()
            found = (self.folder / below).rglob("*") if recursive else (self.folder / below).iterdir()
            self.answer_json([self.describe(each) for each in sorted(found)])
        elif path.startswith(f"/datasets/owner/corpus/resolve/{self.commit}/"):
            self.answer_file(self.folder / path.split("/", 6)[6])
        else:
            self.send_error(404)

    def describe(self, path: Path) -> dict[str, object]:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": name, "oid": "1" * 40, "size": path.stat().st_size}

    def answer_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer_file(self, path: Path) -> None:
        content = path.read_bytes()
        start, stop = 0, len(content)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else stop, stop)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:stop])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    folder = tmp_path / "hub"
    folder.mkdir()
    asked: list[str] = []
    handler = type("HubOfTest", (Hub,), {"folder": folder, "asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder, asked
        server.shutdown()


@pytest.mark.parametrize("layout", [layout_parquet, layout_subsets])
def test_openwebtext_is_read_from_the_hub_at_one_commit(
    hub: tuple[str, Path, list[str]], layout: Callable[[Path], None], tmp_path: Path
) -> None:
    address, folder, asked = hub
    layout(folder)
    # In a process of its own: huggingface_hub reads its environment when it is imported.
    program = textwrap.dedent("""
        import json
        from pipeline.config import SourceConfig
        from pipeline.corpus.files import fingerprint_source, slices
        from pipeline.corpus.formats import read, read_pieces
        source = SourceConfig(kind="openwebtext", dataset="owner/corpus", revision="main")
        texts = []
        for slice_ in slices(source, 300):
            for piece in read_pieces(slice_, source, 300) if slice_.is_stream else [None]:
                texts += [text for text, _ in read(slice_, source, piece)]
        print(json.dumps([fingerprint_source(source), texts]))
    """)
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)[1] == NORMALISED
    assert any(f"/resolve/{Hub.commit}/" in path for path in asked)
    assert not any("/resolve/main/" in path for path in asked)


def test_invalid_utf8_follows_the_policy(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"bro\xffken")
    assert pairs(files(tmp_path)) == [("fine", ""), ("bro\ufffdken", "replaced UTF-8")]
    assert pairs(files(tmp_path, invalid_text="skip")) == [("fine", ""), (None, "invalid UTF-8")]
    with pytest.raises(ValueError, match=r"b\.txt is not valid UTF-8 at its byte 3"):
        pairs(files(tmp_path, invalid_text="fail"))


def test_a_parquet_column_that_only_claims_utf8_follows_the_policy(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert pairs(files(tmp_path)) == [("\ufffd", "replaced UTF-8")]


def test_lines_without_text_are_told_apart(tmp_path: Path) -> None:
    lines = [b'{"text": "a"}', b"{broken", b'{"text": null}', b'{"other": 1}', b"", b'{"text": "\\ud800 half"}', b"[1]"]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "\xff"}']))
    assert pairs(files(tmp_path)) == [
        ("a", ""),
        (None, "not JSON"),
        (None, "no text"),
        (None, "no text"),
        ("\ufffd\ufffd\ufffd half", "replaced UTF-8"),
        (None, "no text"),
        ("\ufffd", "replaced UTF-8"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.jsonl", b'{"body": "a"}\n', "has no column 'text'; it has body"),
        ("x.parquet", b"PAR1 no", "is damaged or not a Parquet file"),
        ("x.jsonl.gz", b"not gzip at all", "is damaged"),
        ("x.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-20], "is damaged"),
        ("x.jsonl.zst", b"not zstd at all!", "is damaged"),
        ("x.tar", b"not a tar" * 200, "is damaged"),
        ("x_data.xz", lzma.compress(tar_of({"a.txt": b"a" * 9999}))[:-30], "is damaged"),
        ("x.warc", b"not a warc\n\n", "is not a WARC"),
        ("x.pdf", b"%PDF", "no text file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as raised:
        pairs(files(tmp_path))
    assert name in str(raised.value) or "no text file" in complaint


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "url": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column 'text'; it has body, url"):
        slices(files(tmp_path), 1000)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.jsonl", tmp_path / "no" / "*.txt", tmp_path / "nothing"):
        with pytest.raises(ValueError, match="There is no file at"):
            find_files(files(path))


def test_globs_and_folders_and_files_come_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden.txt", "_SUCCESS"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_files(files(tmp_path / "b.txt", tmp_path / "*.txt", tmp_path))
    assert [Path(file.url).name for file in found.files] == ["a.txt", "b.txt", "c.txt"]


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = fingerprint_source(files(tmp_path))
    assert fingerprint_source(files(tmp_path)) == before
    (tmp_path / "a.txt").write_text("three")
    assert fingerprint_source(files(tmp_path)) != before != fingerprint_source(files(tmp_path, text_column="x"))


def test_a_sample_is_bounded_and_spread_over_the_corpus(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([name * 1000] * 4000))
    source = files(tmp_path)
    sample = [text or "" for text, _ in sample_documents(source, 8_000_000, slices(source, 10**6))]
    assert sample == [text for text, _ in sample_documents(source, 8_000_000, slices(source, 10**6))]
    assert 7_990_000 <= sum(map(len, sample)) <= 8_000_000
    assert len({text[0] for text in sample}) >= 5


def test_pythons_documentation_is_prose_and_always_the_same() -> None:
    first = list(python_docs.documents(300_000))
    assert first == list(python_docs.documents(300_000))
    assert 250_000 < sum(len(text.encode()) for text in first) <= 300_000
    assert len(set(first)) == len(first) > 50
    assert not any(">>>" in text for text in first)


# However it is cut, and whatever is in it.


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_no_place_to_cut_splits_a_document_of_blank_lines(tmp_path: Path, ending: str) -> None:
    blocks = ["a", "bc\nd", "  \t e\nf", "g h\n.", "\ufeffi", "jklm\n\tn", "o"]
    content = "\n\n".join(blocks).encode().replace(b"bc\n", b"bc\r\n").replace(b"\n\no", b" \n \r\n\no")
    path = tmp_path / f"x.txt{ending}"
    path.write_bytes(COMPRESS[ending](content))
    expected = [block.replace("bc\n", "bc\r\n") for block in blocks]
    expected[-2] += " "
    expected[4] = "i"  # of two files that were joined the second's mark is no text either
    source = files(path, split_text="blank-lines")
    for slice_bytes in range(1, len(content) + 2):
        assert documents(source, slice_bytes) == expected, slice_bytes


def test_rows_without_the_column_are_the_same_however_they_are_cut(tmp_path: Path) -> None:
    rows = [{"text": f"document {n}"} if n % 11 == 7 else {"other": n} for n in range(40)]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    expected = [(row["text"], "") if "text" in row else (None, "no text") for row in rows]
    for name, ending in (("x.jsonl", ""), ("y.jsonl.gz", ".gz")):
        (tmp_path / name).write_bytes(COMPRESS[ending](content))
        for slice_bytes in (10, 50, 10**6):
            assert pairs(files(tmp_path / name), slice_bytes) == expected
        without = content.replace(b'"text"', b'"body"')
        (tmp_path / name).write_bytes(COMPRESS[ending](without))
        for slice_bytes in (10, 50, 10**6):
            with pytest.raises(ValueError, match="has no column 'text'; it has body, other"):
                pairs(files(tmp_path / name), slice_bytes)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.nulls(2), [(None, "no text")] * 2),
        (pa.array([b"a", None], pa.binary_view()), [("a", ""), (None, "no text")]),
        (pa.array(["a", None], pa.string_view()), [("a", ""), (None, "no text")]),
        (pa.array(["a", "a"]).dictionary_encode(), [("a", ""), ("a", "")]),
        (pa.array([], pa.string()), []),
    ],
)
def test_parquet_columns_of_every_kind_that_can_hold_text(
    tmp_path: Path, column: pa.Array, expected: list[tuple[str | None, str]]
) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert pairs(files(tmp_path)) == expected
    source = files(tmp_path)
    assert list(sample_documents(source, 1000, slices(source, 10**6))) == expected
