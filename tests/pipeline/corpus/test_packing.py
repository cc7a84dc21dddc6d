"""Conversations are packed whole, each once per epoch, and a batch is a function of its step."""

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chat import OwnTemplate, encode
from model.config import ModelConfig
from model.gpt import GPT
from model.scoring import score_batches
from model.tokenizer import Tokenizer, build_char
from model.training import LossModule
from pipeline.artifacts import Artifact
from pipeline.corpus.packing import (
    ConversationStream,
    ConversationValidation,
    open_training_stream,
    open_validation_stream,
    pack,
)
from pipeline.corpus.shards import ShardWriter, holds_conversations, open_shards
from pipeline.corpus.stream import IGNORED, Batch

CONTEXT = 160
Learnt = tuple[tuple[int, ...], tuple[bool, ...]]  # a conversation's ids, and which of them are learnt


def talk(words: random.Random, turns: int) -> Learnt:
    messages = []
    for _ in range(turns):
        messages.append({"role": "user", "content": "".join(words.choices("abc ?", k=words.randint(0, 12)))})
        messages.append({"role": "assistant", "content": "".join(words.choices("defgh .", k=words.randint(1, 20)))})
    ids, spoken = encode(TOKENIZER, OwnTemplate().render(messages))
    return tuple(ids.tolist()), tuple(spoken.tolist())


TOKENIZER: Tokenizer = build_char([], 257)


def write_shards(folder: Path, train: list[list[Learnt]], val: list[Learnt]) -> Artifact:
    artifact = Artifact(str(folder), "prepare", "0" * 20)
    files = {}
    for split, shards in (("train", train), ("val", [val])):
        for index, conversations in enumerate(shards):
            writer = ShardWriter(artifact, f"{split}/{index:05d}.parquet", TOKENIZER, conversations=True)
            for ids, learn in conversations:
                writer.add(np.array(ids, TOKENIZER.dtype), np.array(learn))
            files |= writer.close()
    artifact.commit({"train": {"learnt_tokens": 1}}, files)
    return artifact


@pytest.fixture(scope="module")
def corpus() -> list[list[Learnt]]:
    words = random.Random(3)
    return [[talk(words, words.randint(1, 2)) for _ in range(words.randint(5, 20))] for _ in range(6)]


@pytest.fixture(scope="module")
def artifact(corpus: list[list[Learnt]], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_shards(tmp_path_factory.mktemp("shards"), corpus, list(itertools.chain(*corpus))[:17])


def open_stream(artifact: Artifact, tmp_path: Path, **changes: object) -> ConversationStream:
    options = {"context_length": CONTEXT, "batch_sequences": 4, "seed": 3, "window_tokens": 2500} | changes
    stream = open_training_stream(artifact, cache_folder=tmp_path / "cache", **options)
    assert isinstance(stream, ConversationStream)
    return stream


def conversations_of(batch: Batch) -> Counter[Learnt]:
    """Take a batch apart again: each document's inputs, its last target, and what is learnt."""
    found: Counter[Learnt] = Counter()
    assert batch.document_ids is not None
    for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.document_ids, strict=True):
        assert (documents.diff() >= 0).all()
        for document in documents.unique():
            inputs, wanted = tokens[documents == document], targets[documents == document]
            learn = (wanted != IGNORED).tolist()
            if not any(learn):
                assert document == documents.max(), "only padding has nothing to learn"
                continue
            assert wanted[:-1][torch.tensor(learn[:-1])].tolist() == inputs[1:][torch.tensor(learn[:-1])].tolist()
            found[(*inputs.tolist(), int(wanted[-1])), (False, *learn)] += 1
    return found


def read_epoch(stream: ConversationStream, epoch: int) -> Counter[Learnt]:
    first, size = epoch * stream.sequences_per_epoch, stream.batch_sequences
    found: Counter[Learnt] = Counter()
    for row in range(first, first + stream.sequences_per_epoch):
        batch = stream.batch(row // size)
        found += conversations_of(batch.split(1)[row % size])
    return found


def test_every_conversation_comes_whole_and_once_per_epoch(
    artifact: Artifact, corpus: list[list[Learnt]], tmp_path: Path
) -> None:
    stream = open_stream(artifact, tmp_path)
    assert len(stream._windows) > 1
    for epoch in range(3):
        assert read_epoch(stream, epoch) == Counter(itertools.chain(*corpus))


def test_epochs_differ_and_seeds_too(artifact: Artifact, tmp_path: Path) -> None:
    stream, other = open_stream(artifact, tmp_path), open_stream(artifact, tmp_path, seed=4)
    steps = range(0, 3 * stream.steps_per_epoch, stream.steps_per_epoch)
    seen = {stream.batch(step).tokens.numpy().tobytes() for step in steps}
    assert len(seen | {other.batch(0).tokens.numpy().tobytes()}) == 4


def test_any_number_of_workers_sees_the_same_batch(artifact: Artifact, tmp_path: Path) -> None:
    whole = open_stream(artifact, tmp_path)
    for step, world_size in itertools.product((0, 3, whole.steps_per_epoch), (1, 2, 3, 4)):
        stream = open_stream(artifact, tmp_path)  # as after a restart: nothing was read before
        parts = [stream.batch(step, rank, world_size) for rank in range(world_size)]
        expected = whole.batch(step)
        for name in ("tokens", "targets", "document_ids"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))
        learnt = int((expected.targets != IGNORED).sum())
        assert {part.global_tokens for part in parts} == {learnt}


def test_a_batch_larger_than_the_corpus_takes_several_epochs(artifact: Artifact, tmp_path: Path) -> None:
    stream = open_stream(artifact, tmp_path)
    large = open_stream(artifact, tmp_path, batch_sequences=2 * stream.sequences_per_epoch)
    assert set(conversations_of(large.batch(0)).values()) == {2}


def test_a_batch_is_named_by_its_first_conversations(artifact: Artifact, tmp_path: Path) -> None:
    stream = open_stream(artifact, tmp_path)
    rows = stream.identity(5)["rows"]
    firsts = []
    for name, start in rows:
        tokens = pq.read_table(Path(artifact.url) / name)["tokens"].combine_chunks().flatten().to_numpy()
        firsts.append(tokens[start : start + 5].tolist())
    assert firsts == stream.batch(5).tokens[:, :5].tolist()


def test_held_out_conversations_are_scored_once_on_any_number_of_ranks(
    artifact: Artifact, corpus: list[list[Learnt]], tmp_path: Path
) -> None:
    expected = Counter(list(itertools.chain(*corpus))[:17])
    for world_size in (1, 2, 3):
        stream = open_validation_stream(
            artifact, context_length=CONTEXT, batch_sequences=2, cache_folder=tmp_path / "cache"
        )
        shares = [list(stream.batches(rank, world_size)) for rank in range(world_size)]
        assert len({tuple(batch.tokens.shape for batch in share) for share in shares}) == 1
        assert sum((conversations_of(batch) for batch in itertools.chain(*shares)), Counter()) == expected
    few = ConversationValidation(
        artifact, context_length=CONTEXT, batch_sequences=2, max_tokens=30, cache_folder=tmp_path / "cache"
    )
    learnt = sum(int((batch.targets != IGNORED).sum()) for batch in few.batches())
    assert 30 <= learnt == few.num_tokens < 30 + CONTEXT


@pytest.mark.parametrize("family", ["classic", "modern"])
def test_a_packed_batch_costs_what_its_conversations_cost_alone(
    artifact: Artifact, tmp_path: Path, family: str
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(family=family, num_layers=2, width=32, num_heads=2, context_length=CONTEXT)
    model = GPT(config, TOKENIZER.vocab_size).eval()
    model.restarts_positions = True
    if model.position_embedding is not None:
        torch.nn.init.normal_(model.position_embedding.weight)
    torch.nn.init.normal_(model.head.weight)
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.output.weight, std=0.2)  # type: ignore[union-attr]
    batch = open_stream(artifact, tmp_path).batch(1)
    alone = 0.0
    for (ids, learn), count in conversations_of(batch).items():
        tokens, targets = torch.tensor(ids[:-1])[None], torch.tensor(ids[1:])[None]
        alone += count * model.loss(tokens, targets.where(torch.tensor(learn[1:])[None], IGNORED)).item()
    score = score_batches(LossModule(model), [batch], TOKENIZER.byte_lengths)
    assert score.nats == pytest.approx(alone, rel=1e-5)
    assert score.tokens == batch.global_tokens


def test_shards_say_what_is_learnt(artifact: Artifact, corpus: list[list[Learnt]]) -> None:
    assert holds_conversations(artifact)
    for shard, conversations in zip(open_shards(artifact, "train"), corpus, strict=True):
        table = pq.read_table(Path(artifact.url) / shard.name)
        assert table["learn"].to_pylist() == [list(learn) for _, learn in conversations]
        assert shard.lengths == Counter(len(ids) for ids, _ in conversations)


def test_a_shorter_context_than_the_shards_were_made_for_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run the prepare stage again with this context"):
        open_stream(artifact, tmp_path, context_length=40)
    with pytest.raises(ValueError, match="holds no conversation"):
        open_stream(artifact, tmp_path, split="test")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60))
def test_packing_is_a_best_fit(lengths: list[int]) -> None:
    rows = pack(Counter(lengths), 50)
    assert sum(rows, Counter()) == Counter(lengths)
    assert all(row.total() and sum(row.elements()) <= 50 for row in rows)
    # As slow and as plain as can be: the fullest row with room.
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        room = [number for number, used in enumerate(filled) if used + length <= 50]
        if room:
            filled[max(room, key=lambda number: filled[number])] += length
        else:
            filled.append(length)
    assert sorted(sum(row.elements()) for row in rows) == sorted(filled)


def test_what_no_row_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 51 places"):
        pack({51: 1}, 50)


def test_lengths_such_as_people_write_leave_little_padding() -> None:
    lengths = Counter(np.random.default_rng(0).lognormal(5.6, 0.7, 500).astype(int).clip(20, 1024).tolist())
    used = sum(length * count for length, count in lengths.items())
    assert used / (len(pack(lengths, 1024)) * 1024) > 0.98
