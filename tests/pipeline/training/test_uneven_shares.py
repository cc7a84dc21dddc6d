"""Shares of a batch that differ by a row: every rank of FSDP must run equally many passes, or they wait for ever."""

from pathlib import Path

import pytest
import torch

from model.gpt import GPT, ModelConfig
from model.optimizer import OptimizerConfig, build_optimizer
from model.training import parallelize, train_step
from pipeline.corpus.stream import Batch
from tests.model.ranks import run_on_ranks

MODEL = ModelConfig(num_layers=1, width=16, num_heads=2, context_length=8, mlp_width=32)
VOCABULARY = 70
WORLD_SIZE = 2


def share(batch: Batch, rank: int, world_size: int) -> Batch:
    """The rows of one rank, as the token stream gives them."""
    start, end = (number * len(batch.tokens) // world_size for number in (rank, rank + 1))
    return Batch(batch.tokens[start:end], batch.targets[start:end], None, batch.step, batch.global_tokens)


def global_batch(sequences: int) -> Batch:
    rows = torch.randint(0, VOCABULARY, (sequences, 9), generator=torch.Generator().manual_seed(sequences))
    return Batch(rows[:, :-1], rows[:, 1:].clone(), global_tokens=sequences * 8)


@pytest.mark.parametrize(
    ("sequences", "workers", "micro_batch_sequences", "passes"),
    [(256, 5, 17, 4), (256, 5, 16, 4), (256, 8, 64, 1), (5, 2, 1, 3), (5, 2, 2, 2), (7, 7, 3, 1), (3, 2, 1, 2)],
)
def test_every_rank_runs_as_many_passes_as_the_one_with_most_rows(
    sequences: int, workers: int, micro_batch_sequences: int, passes: int
) -> None:
    batch = global_batch(sequences)
    largest = -(-sequences // workers)
    for rank in range(workers):
        own = share(batch, rank, workers)
        parts = own.split(micro_batch_sequences, largest)
        assert len(parts) == passes
        assert all(1 <= len(part.tokens) <= micro_batch_sequences for part in parts)
        assert len({len(part.tokens) for part in parts}) <= 2, "compiled code is for one shape"
        learnt = torch.cat([part.targets for part in parts])
        learnt = learnt[learnt[:, 0] >= 0]
        assert torch.equal(learnt, own.targets), "every row once, in order; what is added is masked"


def test_document_ids_are_cut_with_their_rows() -> None:
    batch = global_batch(5)
    batch.document_ids = torch.arange(5)[:, None].expand(5, 8)
    parts = batch.split(2, 6)
    assert [part.document_ids[:, 0].tolist() for part in parts if part.document_ids is not None] == [
        [0],
        [1, 2],
        [3, 4],
    ]
    assert all(part.global_tokens == batch.global_tokens for part in parts)


def test_two_ranks_of_fsdp_with_uneven_shares_do_not_wait_for_each_other(tmp_path: Path) -> None:
    run_on_ranks(learn, tmp_path, WORLD_SIZE)


def learn(rank: int) -> None:
    for sequences, micro_batch_sequences in ((3, 1), (5, 2)):  # 1 and 2 rows, then 2 and 3
        batch = global_batch(sequences)
        losses = []
        for strategy in ("none", "fsdp"):
            torch.manual_seed(3)
            model = GPT(MODEL, VOCABULARY)
            torch.nn.init.normal_(model.head.weight, std=0.1)
            model.clear_padding()
            module = parallelize(model, strategy=strategy)
            optimizer = build_optimizer(model, OptimizerConfig(kind="adamw"), total_steps=2)
            own = share(batch, rank, WORLD_SIZE) if strategy == "fsdp" else batch
            largest = -(-sequences // WORLD_SIZE) if strategy == "fsdp" else 0
            for step in range(2):
                parts = own.split(micro_batch_sequences, largest)
                measures = train_step(module, optimizer, parts, step=step, global_tokens=batch.global_tokens)
                losses.append(measures.read()[0])
        assert losses[2:] == pytest.approx(losses[:2], rel=1e-4), (sequences, micro_batch_sequences)
