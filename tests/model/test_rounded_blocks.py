"""Matrices that are rounded once for all threads learn what each thread's own copies do: eager, to the last bit."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from model.config import LoraSettings
from model.gpt import GPT
from model.lora import adapt
from model.optimizer import OptimizerConfig, build_optimizer
from model.training import SharedLoss, parallelize, train_step
from tests.model.test_training import GLOBAL_TOKENS, TINY, VOCABULARY, global_batch, split, tiny_model

CLASSIC = replace(TINY, family="classic", tie_embeddings=True)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Two threads, on however many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def learn(model: GPT, *, rounds_once: bool, compile: bool = False, steps: int = 3) -> list[float]:
    module = parallelize(model, compile=compile, precision=torch.bfloat16 if rounds_once else torch.float32)
    assert isinstance(module, SharedLoss)
    assert (module.rounded is not None) == rounds_once
    optimizer = build_optimizer(model, OptimizerConfig(kind="adamw"), total_steps=steps)
    losses = []
    for step in range(steps):
        batches = split(global_batch(step), 2, 2)
        measures = train_step(
            module, optimizer, batches, step=step, global_tokens=GLOBAL_TOKENS, precision=torch.bfloat16
        )
        losses.append(measures.read()[0])
    return losses


@pytest.mark.parametrize("config", [TINY, CLASSIC])
@pytest.mark.parametrize("adapts", [False, True])
def test_what_is_learnt_is_the_same_to_the_last_bit(config: object, adapts: bool) -> None:
    models = [tiny_model(config), tiny_model(config)]
    if adapts:
        for model in models:
            torch.manual_seed(4)
            adapt(model, LoraSettings(rank=2, alpha=4))
    once, each = (learn(model, rounds_once=rounds) for model, rounds in zip(models, (True, False), strict=True))
    assert once == each
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_model_keeps_its_blocks_and_its_names_of_weights() -> None:
    model = tiny_model()
    blocks, names = model.blocks, list(model.state_dict())
    module = parallelize(model, precision=torch.bfloat16)
    optimizer = build_optimizer(model, OptimizerConfig(), total_steps=3)
    batch = global_batch(0)
    train_step(module, optimizer, [batch], step=0, global_tokens=GLOBAL_TOKENS, precision=torch.bfloat16)
    assert model.blocks is blocks
    batch.tokens[3, 2] = VOCABULARY + 1000
    with pytest.raises(IndexError):
        train_step(module, optimizer, [batch], step=1, global_tokens=GLOBAL_TOKENS, precision=torch.bfloat16)
    assert model.blocks is blocks
    assert list(model.state_dict()) == names
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_a_step_in_float32_rounds_nothing() -> None:
    models = [tiny_model(), tiny_model()]
    for model, precision in zip(models, (torch.bfloat16, torch.float32), strict=True):
        module = parallelize(model, precision=precision)
        optimizer = build_optimizer(model, OptimizerConfig(), total_steps=3)
        train_step(module, optimizer, [global_batch(0)], step=0, global_tokens=GLOBAL_TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.slow
def test_compiled_blocks_learn_the_same() -> None:
    models = [tiny_model(), tiny_model()]
    once, each = (
        learn(model, rounds_once=rounds, compile=True) for model, rounds in zip(models, (True, False), strict=True)
    )
    assert once == pytest.approx(each, rel=1e-4)
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
