"""Rows become conversations by looking at them, what is none is told, and long ones end with a whole turn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.chat import OwnTemplate, encode
from model.tokenizer import Tokenizer, build_char
from pipeline.config import SourceConfig
from pipeline.corpus.conversations import (
    LATE_SYSTEM_TURN,
    NO_CONVERSATION,
    NOT_A_TEXT,
    NOTHING_TO_LEARN,
    REFUSED,
    TOO_LONG,
    TWO_SYSTEM_TURNS,
    UNKNOWN_ROLE,
    encode_conversation,
    parse_document,
    plain_text,
    read_row,
)
from pipeline.corpus.files import find_files, fingerprint_source, slices
from pipeline.corpus.formats import NOT_JSON, sample_documents
from tests.pipeline.corpus.tiny_corpus import COMPRESS, pairs, tar_of

USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be kind."}
PAIR = [USER, ASSISTANT]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_char([], 257)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PAIR},
        {"messages": PAIR, "prompt": "something else", "id": 7},
        {"prompt": "Hi?", "completion": "Hello."},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [USER | {"name": "Ada"}, ASSISTANT | {"content": [{"type": "text", "text": "Hello."}]}]},
    ],
)
def test_a_conversation_is_found_in_whatever_column_it_is(row: dict[str, Any]) -> None:
    document, note = read_row(row)
    assert note == ""
    assert document is not None
    assert parse_document(document) == PAIR
    assert plain_text(document) == "Hi?\nHello."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER]}, NOTHING_TO_LEARN),
        ({"messages": [USER, ASSISTANT | {"content": " \n"}]}, NOTHING_TO_LEARN),
        ({"prompt": "Hi?", "completion": ""}, NOTHING_TO_LEARN),
        ({"messages": [{"role": "tool", "content": "7"}, ASSISTANT]}, UNKNOWN_ROLE),
        ({"messages": [{"content": "7"}, ASSISTANT]}, UNKNOWN_ROLE),
        ({"messages": [SYSTEM, SYSTEM, *PAIR]}, TWO_SYSTEM_TURNS),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, LATE_SYSTEM_TURN),
        ({"messages": [USER, ASSISTANT | {"content": None}]}, NOT_A_TEXT),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]}, NOT_A_TEXT),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, NOT_A_TEXT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}, ASSISTANT]}, NOT_A_TEXT),
        ({"messages": []}, NO_CONVERSATION),
        ({"messages": ["Hi?"]}, NO_CONVERSATION),
        ({"messages": None}, NO_CONVERSATION),
        ({"prompt": "Hi?"}, NO_CONVERSATION),
        ({"prompt": "Hi?", "completion": None}, NO_CONVERSATION),
        (["Hi?"], NO_CONVERSATION),
        (None, NO_CONVERSATION),
    ],
)
def test_a_row_that_is_none_says_why(row: Any, reason: str) -> None:
    assert read_row(row) == (None, reason)


def test_half_a_character_is_replaced() -> None:
    document, _ = read_row({"messages": [USER, ASSISTANT | {"content": "a\ud800"}]})
    assert document is not None
    assert (
        parse_document(document)[1]["content"]
        == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    )


def document_of(*turns: dict[str, str]) -> str:
    document, note = read_row({"messages": list(turns)})
    assert document is not None, note
    return document


def test_a_conversation_ends_with_its_last_answer(tokenizer: Tokenizer) -> None:
    whole, learn = encode(tokenizer, OwnTemplate().render(PAIR))
    found = encode_conversation(document_of(*PAIR, USER), tokenizer, OwnTemplate(), 1000)
    assert not isinstance(found, str)
    ids, learnt, is_cut = found
    assert ids.tolist() == whole.tolist()
    assert learnt.tolist() == learn.tolist()
    assert not is_cut


def test_one_that_is_too_long_is_cut_after_a_whole_turn(tokenizer: Tokenizer) -> None:
    document = document_of(SYSTEM, *PAIR, *PAIR, *PAIR)
    lengths = [len(encode(tokenizer, OwnTemplate().render([SYSTEM, *PAIR * count]))[0]) for count in (1, 2, 3)]
    for most in range(lengths[0], lengths[2] + 5):
        found = encode_conversation(document, tokenizer, OwnTemplate(), most)
        assert not isinstance(found, str)
        ids, learn, is_cut = found
        assert len(ids) == len(learn) == max(length for length in lengths if length <= most)
        assert ids[-1] == tokenizer.end_of_text
        assert learn[-1]
        assert is_cut == (most < lengths[2])
    assert encode_conversation(document, tokenizer, OwnTemplate(), lengths[0] - 1) == TOO_LONG


def test_what_a_template_refuses_is_left_out(tokenizer: Tokenizer) -> None:
    class Refusing(OwnTemplate):
        def render(self, messages: Any, ask: bool = False) -> Any:
            raise ValueError("Not like this.")

    assert encode_conversation(document_of(*PAIR), tokenizer, Refusing(), 1000) == REFUSED
    assert np.all(encode_conversation(document_of(*PAIR), tokenizer, OwnTemplate(), 1000)[1].sum() == 7)  # type: ignore[union-attr]


# Files.


def talks(*paths: Path) -> SourceConfig:
    return SourceConfig(kind="conversations", paths=[str(path) for path in paths])


ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"A number: {n}."}]}
    for n in range(50)
]
PROMPTS = [{"prompt": f"{n}?", "completion": f"{n}!", "id": n} for n in range(50)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("slice_bytes", [97, 10**6])
@pytest.mark.parametrize("rows", [ROWS, PROMPTS], ids=["messages", "prompt"])
def test_jsonl_gives_each_conversation_once_however_it_is_cut(
    tmp_path: Path, compression: str, slice_bytes: int, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path / f"talks.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](jsonl(rows)))
    assert pairs(talks(path), slice_bytes) == [read_row(row) for row in rows]


@pytest.mark.parametrize("rows", [ROWS, PROMPTS], ids=["messages", "prompt"])
def test_parquet_is_cut_between_row_groups(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "talks.parquet", row_group_size=7)
    assert pairs(talks(tmp_path), 100) == [read_row(row) for row in rows]
    assert len(slices(talks(tmp_path), 100)) > 5


def test_a_folder_is_read_without_what_lies_beside_the_rows(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Talks")
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:3]))
    (tmp_path / "b.tar").write_bytes(tar_of({"LICENSE.txt": b"Apache", "c.jsonl": jsonl(ROWS[3:])}))
    listing = find_files(talks(tmp_path))
    assert listing.ignored == {".md": 1}
    assert pairs(talks(tmp_path)) == [
        *(read_row(row) for row in ROWS[:3]),
        (None, ".txt is not read"),
        *(read_row(row) for row in ROWS[3:]),
    ]
    with pytest.raises(ValueError, match=r"\.md is not among \.jsonl, \.ndjson, \.json, \.parquet, \.tar, \.tgz"):
        find_files(talks(tmp_path / "README.md"))


def test_rows_that_are_none_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [*jsonl(ROWS[:2]).splitlines(), b"{no json", b'{"messages": [], "id": 7}', b"[]", b"7"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    notes = [note for _, note in pairs(talks(tmp_path))]
    assert notes == ["", "", NOT_JSON, NO_CONVERSATION, NO_CONVERSATION, NO_CONVERSATION]


def test_a_file_of_something_else_is_refused_by_its_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "x", "prompt": "y"}]))
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"a\.jsonl holds no conversations: it has prompt, text, and needs messages"):
        pairs(talks(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"b\.parquet holds no conversations: it has text"):
        pairs(talks(tmp_path / "b.parquet"))


def test_text_and_conversations_are_different_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    as_text = SourceConfig(kind="files", paths=[str(tmp_path)], text_column="messages")
    assert fingerprint_source(talks(tmp_path)) != fingerprint_source(as_text)
    with pytest.raises(ValueError, match=r"source.kind=conversations needs source.paths"):
        talks()


def test_a_tokenizer_learns_from_what_is_said_and_from_the_markers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:2]))
    source = talks(tmp_path)
    texts = [text for text, _ in sample_documents(source, 10**6, slices(source, 10**6))]
    assert texts[0] == "<|chat|>user\nWhat is 0?\n<|chat|>assistant\nA number: 0.\n"
