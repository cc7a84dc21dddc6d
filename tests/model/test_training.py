"""A training step gives the same result however its batch is divided: into micro-batches, over ranks, or sharded."""

import math
import threading
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model import training
from model.checkpoint import export_weights, import_weights
from model.documents import Documents
from model.gpt import GPT, ModelConfig
from model.optimizer import Optimizer, OptimizerConfig, build_optimizer
from model.training import StepMeasures, autocast, choose_precision, parallelize, train_step
from tests.model.ranks import run_on_ranks
from tests.model.rows import Rows

TINY = ModelConfig(num_layers=2, width=16, num_heads=2, context_length=8, mlp_width=32)
VOCABULARY = 70
GLOBAL_TOKENS = 4 * 8 - 3


def tiny_model(config: ModelConfig = TINY) -> GPT:
    torch.manual_seed(3)
    model = GPT(config, VOCABULARY)
    with torch.no_grad():
        model.head.weight[:VOCABULARY].normal_(std=0.1)
        for block in model.blocks:
            block.mlp.output.weight.normal_(std=0.1)
            block.attention.output.weight.normal_(std=0.1)
    return model


def global_batch(step: int) -> Rows:
    rows = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step))
    targets = rows[:, 1:].clone()
    targets[0, :3] = -100
    return Rows(rows[:, :-1], targets)


def split(batch: Rows, *sizes: int) -> list[Rows]:
    return [
        Rows(tokens, targets)
        for tokens, targets in zip(batch.tokens.split(sizes), batch.targets.split(sizes), strict=True)
    ]


def train(
    kind: str = "muon",
    sizes: tuple[int, ...] = (4,),
    compile: bool = False,
    config: ModelConfig = TINY,
    recompute: bool = False,
) -> tuple[GPT, list[float]]:
    model = tiny_model(config)
    module = parallelize(model, compile=compile, recompute=recompute)
    torch.manual_seed(5)  # for dropout
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, clip_norm=0.5), total_steps=3)
    losses = []
    for step in range(3):
        measures = train_step(
            module, optimizer, split(global_batch(step), *sizes), step=step, global_tokens=GLOBAL_TOKENS
        )
        losses.append(measures.read()[0])
    return model, losses


def assert_same_weights(model: GPT, other: GPT) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_uneven_micro_batches_add_up_to_the_whole_batch() -> None:
    whole, losses = train(sizes=(4,))
    parts, part_losses = train(sizes=(1, 3))
    assert part_losses == pytest.approx(losses, rel=1e-5)
    assert_same_weights(whole, parts)


@pytest.mark.parametrize(("family", "dropout"), [("classic", 0.0), ("classic", 0.3), ("modern", 0.0)])
def test_recomputed_activations_are_the_same_to_the_last_bit(family: str, dropout: float) -> None:
    config = replace(TINY, family=family, dropout=dropout)
    kept, losses = train(config=config)
    recomputed, same_losses = train(config=config, recompute=True)
    assert losses == same_losses
    for ours, theirs in zip(kept.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def threads() -> Iterator[int]:
    """Two threads, on however many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", [(4,), (1, 3)])
def test_cores_that_share_out_the_sequences_learn_the_same(
    threads: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, losses = train(sizes=sizes)
    again, same_losses = train(sizes=sizes)
    monkeypatch.setattr(training, "MAX_SHARES", 1)
    alone, other_losses = train(sizes=sizes)
    assert losses == same_losses
    assert all(torch.equal(a, b) for a, b in zip(shared.parameters(), again.parameters(), strict=True))
    assert losses == pytest.approx(other_losses, rel=1e-5)
    assert_same_weights(shared, alone)
    assert torch.get_num_threads() == threads


def test_cores_compile_one_after_another_and_compute_together(threads: int) -> None:
    model = tiny_model()
    module = parallelize(model)
    optimizer = build_optimizer(model, OptimizerConfig(), total_steps=3)
    meeting = threading.Barrier(threads)
    seen: list[int] = []
    whole_loss = model.loss

    def loss(tokens: Tensor, targets: Tensor, documents: Documents | None) -> Tensor:
        seen.append(threading.get_ident())
        if len(seen) > threads:
            meeting.wait(timeout=60)  # passes when both are here
        return whole_loss(tokens, targets, documents)

    model.loss = loss  # type: ignore[method-assign]
    for step in range(2):
        train_step(module, optimizer, [global_batch(step)], step=step, global_tokens=GLOBAL_TOKENS)
    assert len(set(seen[:threads])) == 1
    assert len(set(seen[threads:])) == threads


def test_what_fails_on_one_core_fails_the_step(threads: int) -> None:
    model = tiny_model()
    module = parallelize(model)
    assert isinstance(module, training.SharedLoss)
    batch = global_batch(0)
    batch.tokens[3, 2] = VOCABULARY + 1000
    optimizer = build_optimizer(model, OptimizerConfig(), total_steps=3)
    with pytest.raises(IndexError):
        train_step(module, optimizer, [batch], step=0, global_tokens=GLOBAL_TOKENS)
    assert torch.get_num_threads() == threads


def test_dropout_keeps_one_order(threads: int) -> None:
    config = ModelConfig(family="classic", num_layers=1, width=16, num_heads=2, context_length=8, dropout=0.1)
    assert not isinstance(parallelize(tiny_model(config)), training.SharedLoss)


def test_the_same_run_gives_the_same_bits() -> None:
    first, losses = train(sizes=(2, 2))
    second, again = train(sizes=(2, 2))
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["classic", "modern"])
def test_the_compiled_step_computes_the_same(family: str, recompute: bool) -> None:
    config = ModelConfig(family=family, num_layers=3, width=16, num_heads=2, context_length=8, mlp_width=32)
    plain, losses = train(kind="adamw", config=config)
    compiled, compiled_losses = train(kind="adamw", compile=True, config=config, recompute=recompute)
    assert compiled_losses == pytest.approx(losses, rel=1e-4)
    assert_same_weights(plain, compiled)


def test_a_bad_loss_can_be_skipped_with_the_weights_left_alone() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, OptimizerConfig(), total_steps=3)
    measures = train_step(
        parallelize(model), optimizer, [global_batch(0)], step=0, global_tokens=GLOBAL_TOKENS, skip_bad_loss=True
    )
    assert measures.skipped
    assert not math.isfinite(measures.read()[0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_reading_a_step_does_not_wait_for_the_next_one() -> None:
    measures = StepMeasures(torch.tensor(1.5).cuda(), torch.tensor(0.5).cuda())
    torch.cuda._sleep(2**34)  # clock cycles: seconds of work queued behind it
    busy_until = torch.cuda.Event()
    busy_until.record()
    assert measures.read() == (1.5, 0.5)
    assert not busy_until.query()


def moments(optimizer: Optimizer) -> dict[str, Any]:
    return {name: value for name, value in optimizer.state_dict().items() if not isinstance(value, str)}


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_from_a_batch_without_targets_nothing_is_learnt(kind: str) -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind), total_steps=3)
    module = parallelize(model)
    train_step(module, optimizer, [global_batch(0)], step=0, global_tokens=GLOBAL_TOKENS)  # momentum and all
    weights, state = deepcopy(dict(model.named_parameters())), deepcopy(moments(optimizer))
    empty = replace(global_batch(1), targets=torch.full((4, 8), -100))
    assert train_step(module, optimizer, split(empty, 1, 3), step=1, global_tokens=0).read() == (0.0, 0.0)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    torch.testing.assert_close(moments(optimizer), state, rtol=0, atol=0)


def test_a_micro_batch_without_targets_changes_nothing() -> None:
    """A rank or a part of it may hold nothing but questions: the mean is over what is learnt in the whole batch."""
    empty = replace(
        global_batch(1), targets=torch.full((4, 8), -100), document_ids=torch.zeros(4, 8, dtype=torch.int32)
    )
    weights = []
    for parts in ([global_batch(0)], [empty, global_batch(0), empty]):
        model = tiny_model()
        optimizer = build_optimizer(model, OptimizerConfig(), total_steps=3)
        measures = train_step(parallelize(model), optimizer, parts, step=0, global_tokens=GLOBAL_TOKENS)
        assert all(map(math.isfinite, measures.read()))
        weights.append(model)
    assert_same_weights(*weights)


def test_a_step_without_data_is_refused() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerConfig(), total_steps=3)
    with pytest.raises(ValueError, match="at least one micro-batch"):
        train_step(parallelize(model), optimizer, [], step=0, global_tokens=1)


def test_precision_is_what_was_asked_for() -> None:
    assert choose_precision("float32", "cpu") == torch.float32
    assert choose_precision("bfloat16", "cpu") == torch.bfloat16
    assert choose_precision("auto", "cpu") in (torch.float32, torch.bfloat16)
    with autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "name", "expected"),
    [((8, 0), "auto", torch.bfloat16), ((9, 0), "bfloat16", torch.bfloat16), ((7, 5), "auto", torch.float32)],
)
def test_bfloat16_is_for_ampere_and_later(
    capability: tuple[int, int], name: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision(name, "cuda") == expected
    assert choose_precision("float32", "cuda") == torch.float32


def test_bfloat16_before_ampere_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"Ampere.* a Tesla T4 with 7\.5.*Set train\.precision=float32"):
        choose_precision("bfloat16", "cuda")


def test_two_ranks_learn_the_same_with_ddp_and_fsdp2_as_one_alone(tmp_path: Path) -> None:
    run_on_ranks(learn_on_one_rank, tmp_path)


def learn_on_one_rank(rank: int) -> None:
    """Compare both strategies with the whole batch on this rank alone; the ranks' shares are uneven."""
    for kind in ("adamw", "muon"):
        alone, losses = train(kind, sizes=(4,))
        for strategy, recompute in product(("ddp", "fsdp"), (False, True)):
            model = tiny_model()
            module = parallelize(model, strategy=strategy, recompute=recompute)
            optimizer = build_optimizer(model, OptimizerConfig(kind=kind, clip_norm=0.5), total_steps=3)
            for step in range(3):
                if strategy == "fsdp" and step == 1:
                    restart(model, optimizer)
                share = split(global_batch(step), 3, 1)[rank]
                micro_batches = split(share, 2, 1) if rank == 0 else [share]
                if rank == 1:  # FSDP2's ranks must run equally many passes
                    micro_batches = [*micro_batches, Rows(share.tokens, torch.full_like(share.targets, -100))]
                measures = train_step(module, optimizer, micro_batches, step=step, global_tokens=GLOBAL_TOKENS)
                assert measures.read()[0] == pytest.approx(losses[step], rel=1e-4), (kind, strategy, step)
            for (name, ours), theirs in zip(export_weights(model).items(), export_weights(alone).values(), strict=True):
                torch.testing.assert_close(
                    ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, n=(kind, strategy, name): f"{n}: {m}"
                )
    for strategy in ("ddp", "fsdp"):
        learn_with_light_gradients(strategy, rank)


def learn_with_light_gradients(strategy: str, rank: int) -> None:
    """What travelled in bfloat16 has bfloat16's digits, in float32; and it is nearly the same."""
    gradients = []
    for precision in (torch.float32, torch.bfloat16):
        model = tiny_model()
        module = parallelize(model, strategy=strategy, gradient_precision=precision)
        optimizer = build_optimizer(model, OptimizerConfig(kind="adamw", clip_norm=0), total_steps=3)
        share = split(global_batch(0), 2, 2)[rank]
        train_step(module, optimizer, [share], step=0, global_tokens=GLOBAL_TOKENS)
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        gradients.append([each.to_local() if isinstance(each, DTensor) else each for each in found])
    for exact, light in zip(*gradients, strict=True):
        assert light.dtype == torch.float32
        assert torch.equal(light, light.bfloat16().float()), strategy
        torch.testing.assert_close(light, exact, rtol=0.02, atol=5e-4)
    assert not all(torch.equal(exact, light) for exact, light in zip(*gradients, strict=True))


def restart(model: GPT, optimizer: Optimizer) -> None:
    """Write what a checkpoint holds, spoil everything, and read it again."""
    weights, state = export_weights(model), optimizer.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    import_weights(model, weights, "memory")
    optimizer.load_state_dict(state)
