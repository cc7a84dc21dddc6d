"""The sources of a mix keep their shares anywhere in the stream, and a batch is a function of its step."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artifacts import Artifact
from pipeline.corpus.members import Member, bytes_per_target, members_of, note_members
from pipeline.corpus.mixing import CYCLE, MixedStream, arrange_cycle, open_stream
from pipeline.corpus.shards import ShardWriter
from pipeline.corpus.stream import IGNORED, Batch
from pipeline.training.validation import open_validation
from tests.pipeline.corpus.test_packing import CONTEXT, TOKENIZER, talk, write_shards
from tests.pipeline.tiny_training import tiny_config

BASE, NOTES = ord("x"), ord("n")  # the one letter that each text source holds


def write_text(folder: Path, letter: int, documents: int) -> Artifact:
    artifact = Artifact(str(folder), "prepare", folder.name.removeprefix("prepare-"))
    files = {}
    for split, count in (("train", documents), ("val", 3)):
        writer = ShardWriter(artifact, f"{split}/00000.parquet", TOKENIZER)
        for _ in range(count):
            writer.add(np.full(99, letter, TOKENIZER.dtype))
        files |= writer.close()
    counts = {"documents": documents, "tokens": 100 * documents, "bytes": 99 * documents}
    artifact.commit({"train": counts, "val": counts, "tokenizer_digest": TOKENIZER.digest}, files)
    return artifact


def make_members(folder: Path) -> list[Member]:
    words = random.Random(5)
    talks = [[talk(words, words.randint(1, 2)) for _ in range(12)] for _ in range(3)]
    chat = write_shards(folder / f"prepare-{'c' * 20}", talks, talks[0])
    return [
        Member("chat", 0.5, Artifact(chat.url, "prepare", "0" * 20)),
        Member("base", 0.3, write_text(folder / f"prepare-{'b' * 20}", BASE, 40)),
        Member("notes", 0.2, write_text(folder / f"prepare-{'d' * 20}", NOTES, 3)),
    ]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    return make_members(tmp_path_factory.mktemp("mix"))


def open_mix(members: list[Member], tmp_path: Path, **options: object) -> MixedStream:
    chosen = {"context_length": CONTEXT, "batch_sequences": 8, "seed": 3} | options
    return MixedStream(members, cache_folder=tmp_path / "cache", **chosen)


def source_of(row: torch.Tensor) -> str:
    held = set(row.tolist()) - {TOKENIZER.end_of_text}
    return "base" if held == {BASE} else "notes" if held == {NOTES} else "chat"


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_any_stretch_of_the_stream_has_the_shares_that_were_asked_for(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    if shares.min() < 0.001:
        return
    order, before = arrange_cycle(weights)
    assert np.bincount(order, minlength=len(weights)).tolist() == before[-1].tolist()
    assert np.abs(before[-1] / CYCLE - shares).max() <= 1 / CYCLE
    # Over the end of the cycle too. A stretch is off by what its two ends are off, at most.
    joined = np.concatenate([before, before[1:] + before[-1]])
    expected = np.arange(len(joined))[:, None] * before[-1] / CYCLE
    off = joined - expected
    assert (off.max(axis=0) - off.min(axis=0)).max() <= 1 + len(weights) / 2


@pytest.mark.parametrize("rows", [200, 800])
def test_shares_are_kept_to_one_percent_of_the_tokens_in_any_window(
    members: list[Member], tmp_path: Path, rows: int
) -> None:
    stream = open_mix(members, tmp_path)
    sources = [source_of(row) for step in range(150) for row in stream.batch(step).tokens]
    for member in members:
        is_its = np.cumsum([0] + [source == member.name for source in sources])
        shares = (is_its[rows:] - is_its[:-rows]) / rows
        assert np.abs(shares - member.share).max() <= 0.01


def same(first: Batch, second: Batch) -> bool:
    assert first.document_ids is not None
    assert second.document_ids is not None
    return all(
        torch.equal(*pair)
        for pair in (
            (first.tokens, second.tokens),
            (first.targets, second.targets),
            (first.document_ids, second.document_ids),
        )
    )


def test_a_batch_is_the_same_on_any_number_of_workers_and_after_any_restart(
    members: list[Member], tmp_path: Path
) -> None:
    stream = open_mix(members, tmp_path)
    read_through = [batch for batch, _ in zip(stream.batches(), range(40), strict=False)]
    for step in (39, 0, 17):
        again = open_mix(members, tmp_path)
        assert same(again.batch(step), read_through[step])
        for world_size in (1, 2, 3, 8):
            parts = [again.batch(step, rank, world_size) for rank in range(world_size)]
            assert {part.global_tokens for part in parts} == {read_through[step].global_tokens}
            assert torch.equal(torch.cat([part.targets for part in parts]), read_through[step].targets)
        assert int((read_through[step].targets != IGNORED).sum()) == read_through[step].global_tokens
    assert open_mix(members, tmp_path, seed=4).batch(0).tokens.tolist() != read_through[0].tokens.tolist()
    assert stream.identity(5) == open_mix(members, tmp_path).identity(5)
    assert len(stream.identity(5)["rows"]) == 8


def test_a_mixs_rows_are_those_of_its_sources_alone_and_an_exhausted_one_begins_anew(
    members: list[Member], tmp_path: Path
) -> None:
    stream = open_mix(members, tmp_path)
    mixed: dict[str, list[list[int]]] = {member.name: [] for member in members}
    for step in range(30):
        for row in stream.batch(step).tokens:
            mixed[source_of(row)].append(row.tolist())
    for member in members:
        alone = open_stream(
            member.shards, context_length=CONTEXT, batch_sequences=1, seed=3, cache_folder=tmp_path / "cache"
        )
        assert mixed[member.name] == [alone.batch(n).tokens[0].tolist() for n in range(len(mixed[member.name]))]
    epochs = stream.count_epochs(30)
    assert epochs["notes"] == len(mixed["notes"]) / 2  # 300 tokens are two rows
    assert epochs["notes"] > 20 > 3 > epochs["base"] > 2


def test_attention_in_rows_of_text_is_as_it_is_without_a_mix(members: list[Member], tmp_path: Path) -> None:
    whole, cut = open_mix(members, tmp_path), open_mix(members, tmp_path, document_boundaries=True)
    for row, source in enumerate(source_of(row) for row in whole.batch(1).tokens):
        ids = whole.batch(1).document_ids, cut.batch(1).document_ids
        assert ids[0] is not None and ids[1] is not None  # noqa: PT018
        assert (len(ids[0][row].unique()) == 1) == (source != "chat")
        assert len(ids[1][row].unique()) > 1
    texts = open_mix(members[1:], tmp_path)
    assert texts.batch(0).document_ids is None


def test_a_manifest_says_which_sources_a_mix_has(members: list[Member], tmp_path: Path) -> None:
    folder = Path(members[0].shards.url).parent
    mix = Artifact(str(folder / "prepare-mix"), "prepare", "9" * 20)
    named = [
        Member(member.name, member.share, Artifact(member.shards.url, "prepare", Path(member.shards.url).name[8:]))
        for member in members
    ]
    mix.commit({"mix": note_members(named)}, {})
    assert members_of(mix) == named
    assert members_of(members[1].shards) == [Member("", 1.0, members[1].shards)]
    assert bytes_per_target(named[1:]) == pytest.approx(0.99)
    config = tiny_config(str(tmp_path), f"stream.cache_folder={tmp_path}/cache")
    held_out = open_validation(
        members[1].shards, config.model, config.train, config.stream, batch_sequences=2, max_tokens=100
    )
    assert [(each.name, each.holds_answers, each.stream.num_tokens) for each in held_out] == [("", False, 100)]


def test_a_cache_too_small_for_all_sources_is_refused(members: list[Member], tmp_path: Path) -> None:
    each = [stream.cached_bytes for stream in open_mix(members, tmp_path).streams]
    with pytest.raises(ValueError, match=r"stream\.cache_gigabytes"):
        open_mix(members, tmp_path, cache_gigabytes=(sum(each) - 1) / 1e9)
