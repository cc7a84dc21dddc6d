"""Files of prompts: every row is in one part, and the answers come back as one file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import Artifact
from pipeline.serving import batch_files
from pipeline.serving.batch_files import Counts, cut, encode_answers, find_files, join, read_part
from tests.s3_server import s3_server


def lines(count: int) -> bytes:
    return b"".join(json.dumps({"prompt": f"number {number} é"}).encode() + b"\n" for number in range(count))


def read_all(url: str) -> Iterator[tuple[int, Any]]:
    for part in cut(find_files(url)):
        yield from read_part(part)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("ends", [True, False])
def test_every_line_is_in_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, ends: bool) -> None:
    monkeypatch.setattr(batch_files, "SCANNED_BYTES", 97)  # a block then holds a few line ends, or none
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(lines(count) if ends else lines(count).removesuffix(b"\n"))
    parts = cut(find_files(str(file)))
    assert sum(part.rows for part in parts) == count
    assert all(part.rows <= batch_files.FEWEST_ROWS for part in parts)
    found = list(read_all(str(file)))
    assert [number for number, _ in found] == list(range(count))
    assert [row["prompt"] for _, row in found] == [f"number {number} é" for number in range(count)]


def test_many_rows_make_larger_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_files, "MOST_PARTS", 3)
    (tmp_path / "prompts.jsonl").write_bytes(lines(1000))
    parts = cut(find_files(str(tmp_path)))
    assert len(parts) == 3
    assert [number for number, _ in read_all(str(tmp_path))] == list(range(1000))


def test_blank_lines_count_and_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(b'\n{"prompt": "a"}\n  \n\r\n{"prompt": "b"}')
    assert list(read_all(str(tmp_path))) == [(1, {"prompt": "a"}), (4, {"prompt": "b"})]


def test_a_line_that_is_no_row_says_why(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(b'{"prompt": \n[1]\n"text"\n{"prompt": "\xff"}\n{"prompt": NaN}\n')
    found = [row for _, row in read_all(str(tmp_path))]
    assert all(isinstance(row, str) for row in found)
    assert "not JSON" in found[0]
    assert "prompt or messages" in found[1]


@pytest.mark.parametrize("row_group_size", [1, 50, 1000])
def test_parquet_is_cut_within_its_row_groups(tmp_path: Path, row_group_size: int) -> None:
    messages = [[{"role": "user", "content": f"number {number}"}] for number in range(150)]
    table = pa.table({"messages": messages, "seed": pa.array([None, 7] * 75, pa.int64())})
    pq.write_table(table, tmp_path / "prompts.parquet", row_group_size=row_group_size)
    found = list(read_all(str(tmp_path / "prompts.parquet")))
    assert [number for number, _ in found] == list(range(150))
    assert [row["messages"][0]["content"] for _, row in found] == [f"number {number}" for number in range(150)]
    assert [row["seed"] for _, row in found] == [None, 7] * 75


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", ".hidden.jsonl", "deep/d.ndjson"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    assert [row["prompt"] for _, row in read_all(str(tmp_path))] == ["a.jsonl", "b.jsonl", "deep/d.ndjson"]
    assert [row["prompt"] for _, row in read_all(f"{tmp_path}/[b-z].jsonl")] == ["b.jsonl"]


@pytest.mark.parametrize(
    ("name", "says"), [("none.jsonl", "nothing at"), ("prompts.csv", "prompts and answers are"), ("", "no .jsonl")]
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\n")
    with pytest.raises(ValueError, match=says):
        find_files(str(tmp_path / name))


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(lines(70))
    first, second = cut(find_files(str(file)))
    assert len(list(read_part(first))) == 64
    file.write_bytes(lines(71))
    with pytest.raises(ValueError, match="changed while it was read"):
        list(read_part(second))


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(ValueError, match=r"prompts\.parquet is damaged"):
        cut(find_files(str(tmp_path)))


def answers(numbers: Sequence[int]) -> list[dict[str, Any]]:
    same = {"finish_reason": "stop", "more_choices": [], "model": "tiny", "version": "1", "prompt_tokens": 2}
    return [
        {
            "row": number,
            "id": None,
            "text": f"line\n\x85\u2028 {number}",
            **same,
            "completion_tokens": number,
            "error": "no" if number == 3 else None,
        }
        for number in numbers
    ]


def store(work: Artifact, format_: str) -> list[str]:
    names = [f"parts/{number}.{format_}" for number in range(3)]
    for number, name in enumerate(names):
        work.write_bytes(name, encode_answers(answers(range(2 * number, 2 * number + 2)), format_))
    return names


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_parts_are_joined_in_order_and_counted(tmp_path: Path, format_: str) -> None:
    work = Artifact(str(tmp_path / "out.run"), "generate", "f")
    output = tmp_path / f"out.{format_}"
    assert join(str(output), work, store(work, format_), format_) == Counts(6, 1, 12, 15, "row 3: no")
    if format_ == "parquet":
        rows = pq.read_table(output).to_pylist()
    else:
        rows = [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    assert rows == answers(range(6))
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_s3_is_read_and_written(format_: str) -> None:
    with s3_server():
        bucket = Artifact("s3://prompts", "generate", "f")
        bucket.filesystem.mkdir("prompts")
        bucket.write_bytes("in/a.jsonl", lines(70))
        assert [number for number, _ in read_all("s3://prompts/in")] == list(range(70))
        assert len(list(read_all("s3://prompts/in/*.jsonl"))) == 70
        work = Artifact("s3://prompts/out.run", "generate", "f")
        assert join(f"s3://prompts/out.{format_}", work, store(work, format_), format_).rows == 6
        assert bucket.exists(f"out.{format_}")
