"""The token stream is a function of the step, and every token comes once."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.artifacts import Artifact, record_file
from pipeline.corpus.stream import IGNORED, Batch, TokenStream, ValidationStream, random_order

END = 0
Corpus = Sequence[Sequence[Sequence[int]]]  # shards of documents of tokens


def write_shards(folder: Path, train: Corpus, val: Corpus = (), *, wide: bool = False) -> Artifact:
    """Write shards as prepare does: one row per document, several row groups, a manifest last."""
    files = {}
    for split, shards in (("train", train), ("val", val)):
        for index, documents in enumerate(shards):
            path = folder / split / f"{index:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            tokens = pa.array(documents, pa.list_(pa.uint32() if wide else pa.uint16()))
            pq.write_table(pa.table({"tokens": tokens}), path, row_group_size=3)
            files[f"{split}/{path.name}"] = record_file(path)
    artifact = Artifact(str(folder), "prepare", "0" * 20)
    artifact.commit({}, files)
    return artifact


def count_up(lengths: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Documents of these lengths in which no token comes twice, but for the end of text."""
    following = iter(range(1, 65_536))
    return [[[next(following) for _ in range(length - 1)] + [END] for length in shard] for shard in lengths]


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    lengths = random.Random(5)
    shards = [[lengths.randint(1, 60) for _ in range(lengths.randint(1, 12))] for _ in range(7)]
    return write_shards(tmp_path / "shards", count_up(shards), count_up([[5, 9, 1], [7]]))


def open_stream(artifact: Artifact, tmp_path: Path, **changes: object) -> TokenStream:
    options = {"context_length": 8, "batch_sequences": 8, "seed": 3, "window_tokens": 400} | changes
    return TokenStream(artifact, cache_folder=tmp_path / "cache", **options)  # type: ignore[arg-type]


def read_epoch(stream: TokenStream, epoch: int) -> Batch:
    """Join the rows of one epoch."""
    first, end = epoch * stream.sequences_per_epoch, (epoch + 1) * stream.sequences_per_epoch
    rows = range(first, end)
    batches = {row // stream.batch_sequences: stream.batch(row // stream.batch_sequences) for row in rows}
    places = [(row // stream.batch_sequences, row % stream.batch_sequences) for row in rows]
    return Batch(
        torch.stack([batches[step].tokens[row] for step, row in places]),
        torch.stack([batches[step].targets[row] for step, row in places]),
    )


def all_tokens(stream: TokenStream | Artifact, split: str = "train") -> Counter[int]:
    folder = Path(stream.url if isinstance(stream, Artifact) else stream.shards[0].artifact.url) / split
    return Counter(
        token
        for path in sorted(folder.glob("*.parquet"))
        for document in pq.read_table(path).column("tokens").to_pylist()
        for token in document
    )


def test_every_token_is_a_target_once_per_epoch(artifact: Artifact, tmp_path: Path) -> None:
    stream = open_stream(artifact, tmp_path)
    assert len(stream._windows) > 1
    for epoch in range(3):
        targets = read_epoch(stream, epoch).targets
        assert Counter(targets[targets != IGNORED].tolist()) == all_tokens(stream)


def test_the_ragged_end_is_less_than_one_sequence_per_window(artifact: Artifact, tmp_path: Path) -> None:
    stream = open_stream(artifact, tmp_path)
    masked = int((read_epoch(stream, 0).targets == IGNORED).sum())
    assert masked == stream.sequences_per_epoch * 8 - stream.num_tokens
    assert masked <= (8 - 1) * len(stream._windows)


def test_targets_are_the_next_tokens(artifact: Artifact, tmp_path: Path) -> None:
    epoch = read_epoch(open_stream(artifact, tmp_path), 1)
    for tokens, targets in zip(epoch.tokens, epoch.targets, strict=True):
        known = targets[:-1] != IGNORED
        assert torch.equal(targets[:-1][known], tokens[1:][known])


def test_each_epoch_and_each_seed_has_an_order_of_its_own(artifact: Artifact, tmp_path: Path) -> None:
    stream = open_stream(artifact, tmp_path)
    first, second = read_epoch(stream, 0).tokens, read_epoch(stream, 1).tokens
    other = read_epoch(open_stream(artifact, tmp_path, seed=4), 0).tokens
    corpus_order = torch.tensor(sorted(first[:, 0].tolist()))
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], corpus_order)


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    # Digests of Parquet files name their writer's version, so the permutation alone is pinned here.
    assert random_order(12, "a digest", 1337, "epoch", 2).tolist() == [11, 6, 9, 5, 8, 4, 10, 3, 2, 7, 1, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_batches_are_equal_for_any_number_of_workers(artifact: Artifact, tmp_path: Path, world_size: int) -> None:
    stream = open_stream(artifact, tmp_path, document_boundaries=True)
    for step in (0, 5, stream.steps_per_epoch - 1, 1000):
        whole = stream.batch(step)
        shares = [stream.batch(step, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([share.tokens for share in shares]), whole.tokens)
        assert torch.equal(torch.cat([share.targets for share in shares]), whole.targets)
        assert torch.equal(torch.cat([share.document_ids for share in shares]), whole.document_ids)
        assert {share.global_tokens for share in shares} == {int((whole.targets != IGNORED).sum())}
        assert max(len(share.tokens) for share in shares) - min(len(share.tokens) for share in shares) <= 1


def test_resuming_at_any_step_goes_on_as_if_never_stopped(artifact: Artifact, tmp_path: Path) -> None:
    unbroken = open_stream(artifact, tmp_path).batches()
    expected = [next(unbroken) for _ in range(200)]
    for step in random.Random(0).sample(range(199), 20):
        resumed = open_stream(artifact, tmp_path).batches(step)
        for batch in expected[step : step + 2]:
            found = next(resumed)
            assert found.step == batch.step
            assert torch.equal(found.tokens, batch.tokens)
            assert torch.equal(found.targets, batch.targets)


def test_a_batch_depends_on_content_not_on_where_it_lies(artifact: Artifact, tmp_path: Path) -> None:
    copy = write_shards(
        tmp_path / "copy",
        [pq.read_table(path)["tokens"].to_pylist() for path in sorted(Path(artifact.url).glob("train/*"))],
    )
    stream, elsewhere = open_stream(artifact, tmp_path), open_stream(copy, tmp_path)
    assert stream.data_digest == elsewhere.data_digest
    assert torch.equal(stream.batch(7).tokens, elsewhere.batch(7).tokens)


def test_micro_batches_are_the_batch_in_parts(artifact: Artifact, tmp_path: Path) -> None:
    stream = open_stream(artifact, tmp_path)
    batch = next(stream.batches(4, rank=1, world_size=2))
    parts = batch.split(3)
    assert [(len(part.tokens), part.step) for part in parts] == [(3, 4), (1, 4)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), stream.batch(4, 1, 2).tokens)
    assert {part.global_tokens for part in parts} == {batch.global_tokens}


def test_document_ids_tell_where_documents_begin(artifact: Artifact, tmp_path: Path) -> None:
    batch = open_stream(artifact, tmp_path, document_boundaries=True).batch(2)
    assert batch.document_ids is not None
    for tokens, ids in zip(batch.tokens.tolist(), batch.document_ids.tolist(), strict=True):
        assert ids == [tokens[:place].count(END) for place in range(len(tokens))]
    assert open_stream(artifact, tmp_path).batch(2).document_ids is None


def test_a_batch_can_be_named(artifact: Artifact, tmp_path: Path) -> None:
    stream = open_stream(artifact, tmp_path)
    identity = stream.identity(3)
    assert identity["data_digest"] == stream.data_digest
    for (name, place), tokens in zip(identity["rows"], stream.batch(3).tokens, strict=True):
        documents = pq.read_table(Path(artifact.url) / name)["tokens"].to_pylist()
        shard = [token for document in documents for token in document]
        assert shard[place] == tokens[0]


def test_large_vocabularies_come_through_32_bits(tmp_path: Path) -> None:
    artifact = write_shards(tmp_path / "shards", [[[200_018] * 63 + [200_019]]], wide=True)
    assert open_stream(artifact, tmp_path).batch(0).tokens.max() == 200_019


def test_a_split_smaller_than_one_batch_is_refused(tmp_path: Path) -> None:
    artifact = write_shards(tmp_path / "shards", count_up([[63]]))
    with pytest.raises(ValueError, match="63 tokens, and one batch takes 8 sequences of 8; add text"):
        open_stream(artifact, tmp_path)
    with pytest.raises(ValueError, match="0 tokens"):
        open_stream(artifact, tmp_path, split="val")


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=6),
    context_length=st.integers(1, 50),
    batch_sequences=st.integers(1, 5),
    window_tokens=st.integers(1, 300),
    seed=st.integers(0, 2**40),
    world_size=st.integers(1, 6),
)
def test_any_corpus_is_covered_once_and_shared_out_whole(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[list[int]],
    context_length: int,
    batch_sequences: int,
    window_tokens: int,
    seed: int,
    world_size: int,
) -> None:
    tmp_path = tmp_path_factory.mktemp("corpus")
    artifact = write_shards(tmp_path / "shards", count_up(lengths), count_up(lengths))
    validation = ValidationStream(
        artifact, context_length=context_length, batch_sequences=batch_sequences, cache_folder=tmp_path / "cache"
    )
    scored = [batch.targets for rank in range(world_size) for batch in validation.batches(rank, world_size)]
    flat = torch.cat([targets.flatten() for targets in scored])
    assert Counter(flat[flat != IGNORED].tolist()) == all_tokens(artifact, "val")

    options = {"context_length": context_length, "window_tokens": window_tokens, "seed": seed}
    if sum(map(sum, lengths)) < batch_sequences * context_length:
        with pytest.raises(ValueError, match="one batch takes"):
            open_stream(artifact, tmp_path, batch_sequences=batch_sequences, **options)
        return
    stream = open_stream(artifact, tmp_path, batch_sequences=batch_sequences, **options)
    for epoch in (0, 1):
        targets = read_epoch(stream, epoch).targets
        assert Counter(targets[targets != IGNORED].tolist()) == all_tokens(stream)
    step = stream.steps_per_epoch - 1
    shares = [stream.batch(step, rank, world_size).tokens for rank in range(world_size)]
    assert torch.equal(torch.cat(shares), stream.batch(step).tokens)
    stream.close()


# Validation.


def test_validation_scores_each_token_once_in_the_order_of_the_text(artifact: Artifact, tmp_path: Path) -> None:
    batches = ValidationStream(artifact, context_length=4, batch_sequences=2, cache_folder=tmp_path / "cache").batches()
    found = list(batches)
    targets = torch.cat([batch.targets.flatten() for batch in found])
    expected = [t for d in count_up([[5, 9, 1], [7]]) for document in d for t in document]
    assert targets[targets != IGNORED].tolist() == expected
    assert found[0].tokens[0, 0] == END  # the first token too is predicted, from an end of text


@pytest.mark.parametrize(("max_tokens", "world_size"), [(0, 1), (0, 3), (10, 2), (21, 4), (1000, 2), (1, 5)])
def test_validation_is_shared_evenly_and_stops_at_its_limit(
    artifact: Artifact, tmp_path: Path, max_tokens: int, world_size: int
) -> None:
    stream = ValidationStream(
        artifact, context_length=4, batch_sequences=2, max_tokens=max_tokens, cache_folder=tmp_path / "cache"
    )
    ranks = [list(stream.batches(rank, world_size)) for rank in range(world_size)]
    assert len({tuple(batch.tokens.shape for batch in batches) for batches in ranks}) == 1  # collectives meet
    rows = [sum(int((batch.targets != IGNORED).any(1).sum()) for batch in batches) for batches in ranks]
    assert max(rows) - min(rows) <= 1
    scored = sum(int((batch.targets != IGNORED).sum()) for batches in ranks for batch in batches)
    assert scored == min(22, max_tokens or 22)


def test_an_empty_validation_split_gives_no_batches(tmp_path: Path) -> None:
    artifact = write_shards(tmp_path / "shards", count_up([[10]]))
    assert (
        list(ValidationStream(artifact, context_length=4, batch_sequences=2, cache_folder=tmp_path / "c").batches())
        == []
    )


def test_tokens_are_ready_for_embedding_and_cross_entropy(artifact: Artifact, tmp_path: Path) -> None:
    batch = open_stream(artifact, tmp_path).batch(0)
    logits = torch.nn.Embedding(2000, 2000)(batch.tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
    assert torch.isfinite(loss.detach())
    assert np.shares_memory(batch.tokens.numpy(), batch.split(2)[0].tokens.numpy())
