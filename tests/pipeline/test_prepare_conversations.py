"""Conversations become shards that say what is learnt; what is lost or cut is counted and said."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from model.chat import CHAT_TEMPLATE, TEMPLATE_FILE, OwnTemplate, encode
from pipeline import prepare
from pipeline.config import Config
from pipeline.corpus.conversations import TOO_LONG, TWO_SYSTEM_TURNS, UNKNOWN_ROLE
from pipeline.corpus.packing import open_training_stream
from pipeline.corpus.stream import IGNORED
from tests.pipeline.test_prepare import configure, digests, run, tokenizer_in

CONTEXT = 200


def talk(number: int, turns: int = 1) -> list[dict[str, str]]:
    pair = [
        {"role": "user", "content": f"What is the map of value number {number}?"},
        {"role": "assistant", "content": f"The result of function {number * 7}."},
    ]
    return pair * turns


LONG = talk(10_000, turns=9)
ROWS = [
    *({"messages": talk(number, turns=1 + number % 2)} for number in range(120)),
    {"messages": LONG},
    {"messages": [{"role": "user", "content": "argument " * 300}, talk(0)[1]]},
    {"messages": [{"role": "critic", "content": "No."}, *talk(0)]},
    {"messages": [{"role": "system", "content": "Go."}, {"role": "system", "content": "Stop."}, *talk(0)]},
    {"messages": talk(0)},  # twice
]


def configure_talks(storage: str, path: Path, **settings: Any) -> Config:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    defaults = {"source.kind": "conversations", "model.context_length": CONTEXT, "train.batch_tokens": 8 * CONTEXT}
    return configure(storage, path, **(defaults | settings))


def test_shards_say_what_is_learnt_and_losses_are_said(
    ray_session: None, tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure_talks(storage, tmp_path / "x.jsonl", **{"prepare.drop_exact_duplicates": "true"})
    output, manifest = run(config, storage)
    tokenizer = tokenizer_in(storage)[1]
    found: dict[str, list[tuple[list[int], list[bool]]]] = {"train": [], "val": []}
    for split, rows in found.items():
        for path in sorted(Path(output.path, split).glob("*.parquet")):
            table = pq.read_table(path)
            rows += zip(table["tokens"].to_pylist(), table["learn"].to_pylist(), strict=True)
    expected = [encode(tokenizer, OwnTemplate().render(row["messages"])) for row in ROWS[:120]]
    written = sorted((ids, learn) for rows in found.values() for ids, learn in rows)
    whole = sorted((ids.tolist(), learn.tolist()) for ids, learn in expected)
    (cut,) = [row for row in written if row not in whole]
    assert [row for row in written if row != cut] == whole
    # The long one ends with the last whole turn that fits.
    lengths = [len(encode(tokenizer, OwnTemplate().render(LONG[: 2 * turns]))[0]) for turns in range(1, 10)]
    assert len(cut[0]) == max(length for length in lengths if length <= CONTEXT + 1)
    assert cut[0] == encode(tokenizer, OwnTemplate().render(LONG))[0].tolist()[: len(cut[0])]

    counts = manifest.counts
    assert counts["cut"] == 1
    assert counts["dropped"] == {"exact duplicate": 1, TOO_LONG: 1, TWO_SYSTEM_TURNS: 1, UNKNOWN_ROLE: 1}
    for split, rows in found.items():
        learnt = [token for ids, learn in rows for token, is_learnt in zip(ids, learn, strict=True) if is_learnt]
        assert counts[split]["documents"] == len(rows)
        assert counts[split]["tokens"] == sum(len(ids) for ids, _ in rows)
        assert counts[split]["learnt_tokens"] == len(learnt)
        assert counts[split]["learnt_bytes"] == len(tokenizer.decode_bytes(learnt))
    assert output.read_text(TEMPLATE_FILE) == CHAT_TEMPLATE
    assert "1 conversations were cut after a whole turn" in output.read_text("README.md")
    said = capsys.readouterr().out
    assert "kept 121 of 125 documents, 1 of them cut after a whole turn; dropped 4" in said
    assert "1 unknown role" in said

    stream = open_training_stream(
        output, context_length=CONTEXT, batch_sequences=2, seed=1, cache_folder=tmp_path / "cache"
    )
    steps = range(stream.sequences_per_epoch // 2)
    assert sum(int((stream.batch(step).targets != IGNORED).sum()) for step in steps) <= counts["train"]["learnt_tokens"]


def test_shards_of_conversations_are_the_same_bytes_for_any_number_of_workers(
    ray_session: None, tmp_path: Path, storage: str
) -> None:
    path = tmp_path / "x.jsonl"
    made = [
        digests(run(configure_talks(storage, path, **{"prepare.workers": workers}), storage, f"w{workers}")[1])
        for workers in (1, 3)
    ]
    assert made[0] == made[1]
    assert len(made[0]) > 4


def test_the_context_decides_over_shards_of_conversations_alone(storage: str, tmp_path: Path) -> None:
    settings = [
        [
            prepare.settings(
                make(storage, tmp_path / "x.jsonl", **{"model.context_length": context, "train.batch_tokens": 1024})
            )
            for context in (128, 256)
        ]
        for make in (configure_talks, configure)
    ]
    assert settings[0][0] != settings[0][1]
    assert settings[1][0] == settings[1][1]
