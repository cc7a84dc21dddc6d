"""What `torch.compile` makes of a training: one graph for all blocks, whatever the strategy, no second compiling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from model.gpt import GPT, ModelConfig
from model.optimizer import OptimizerConfig, build_optimizer
from model.scoring import score_batches
from model.training import GraphedLoss, LossModule, compile_ahead, parallelize, train_step
from tests.model.ranks import run_on_ranks
from tests.model.rows import Rows

# A block of 2 MB: DDP's first bucket, of 1 MB, would end within it.
MODEL = ModelConfig(num_layers=3, width=256, num_heads=2, context_length=8, mlp_width=512)
VOCABULARY = 70


class CountingBackend:
    """Runs what Dynamo traced as it is, and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward


def compute_again(compute: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], Any], Tensor]:
    """In place of a CUDA graph, as far as compiling goes."""
    return compute, compute()


def count_graphs(
    strategy: str, recompute: bool = False, as_trained: bool = False, ahead: bool = False, graphed: bool = False
) -> dict[str, int]:
    """Train and score by turns; returns the graphs that there were after each turn."""
    backend, real_compile = CountingBackend(), torch.compile
    torch._dynamo.reset()
    counters.clear()

    def compile_with_counting(function: Any, **asked: Any) -> Any:
        return real_compile(function, dynamic=asked["dynamic"], backend=backend)

    torch.compile = compile_with_counting  # type: ignore[assignment]
    try:
        model = GPT(MODEL, VOCABULARY)
        module = parallelize(model, strategy=strategy, compile=True, recompute=recompute)
    finally:
        torch.compile = real_compile
    if graphed:
        module = GraphedLoss(model)
        module.graphed.record = compute_again
    optimizer = build_optimizer(model, OptimizerConfig(kind="adamw"), total_steps=4)
    scored = module if strategy == "fsdp" else LossModule(model)
    batch = Rows(torch.randint(0, VOCABULARY, (2, 8)), torch.randint(0, VOCABULARY, (2, 8)))
    precision = torch.bfloat16  # float32 has no casts, which are code too
    after = {}
    if ahead:
        state = torch.get_rng_state()
        compile_ahead(module, 2, 8, precision, documents=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(each.grad is None for each in model.parameters())
        after["ahead"] = len(backend.graphs)
    for step in range(2):
        train_step(module, optimizer, [batch, batch], step=step, global_tokens=64, precision=precision)
        after[f"training {step}"] = len(backend.graphs)
        score_batches(
            scored, [batch, batch], np.ones(VOCABULARY, dtype=np.int64), precision=precision, as_trained=as_trained
        )
        after[f"scoring {step}"] = len(backend.graphs)
    assert not counters["graph_break"], dict(counters["graph_break"])
    return after


# The block and the loss's chunk; and the block once more for scoring, which keeps nothing for a backward pass.
EXPECTED = {"training 0": 2, "scoring 0": 3, "training 1": 3, "scoring 1": 3}


@pytest.mark.parametrize("recompute", [False, True])
def test_one_graph_serves_all_blocks_and_scoring_compiles_once(recompute: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that share a batch out would each trace it
    try:
        assert count_graphs("none", recompute) == EXPECTED
    finally:
        torch.set_num_threads(before)


def test_scoring_by_a_training_steps_code_compiles_nothing() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert set(count_graphs("none", as_trained=True).values()) == {2}
    finally:
        torch.set_num_threads(before)


def test_graphs_record_the_code_that_was_compiled_ahead() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert count_graphs("none", ahead=True, graphed=True) == EXPECTED | {"ahead": 2}
    finally:
        torch.set_num_threads(before)


def test_neither_ddp_nor_fsdp_cuts_the_blocks(tmp_path: Path) -> None:
    run_on_ranks(count_on_one_rank, tmp_path)


def count_on_one_rank(rank: int) -> None:
    for strategy in ("ddp", "fsdp"):
        assert count_graphs(strategy) == EXPECTED, strategy
    assert set(count_graphs("ddp", as_trained=True).values()) == {2}
    assert set(count_graphs("ddp", as_trained=True, ahead=rank == 0).values()) == {2}, "rank 0 asks nobody for anything"
