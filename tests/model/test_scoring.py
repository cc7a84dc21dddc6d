"""A loss becomes a score in one place: nats, tokens and bytes add up however the text is cut into batches."""

import math

import numpy as np
import pytest
import torch

from model.gpt import GPT, ModelConfig
from model.scoring import bits_per_byte, score_batches
from model.training import LossModule
from tests.model.rows import Rows

TINY = ModelConfig(num_layers=2, width=16, num_heads=2, context_length=8, mlp_width=32)
BYTE_LENGTHS = np.arange(70)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(TINY, 70)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


def rows(count: int) -> Rows:
    tokens = torch.randint(0, 70, (count, 9), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[-1, 5:] = -100
    return Rows(tokens[:, :-1], targets)


def test_bits_per_byte_by_hand() -> None:
    # Two tokens of probability 1/4 and 1/2 are 2 + 1 bits; "naïve" is six bytes in UTF-8.
    nats = math.log(4) + math.log(2)
    assert bits_per_byte(nats, len("naïve".encode())) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(1.0, 0)


def test_a_score_is_the_sum_by_hand_over_the_targets_that_are_not_masked(model: GPT) -> None:
    batch = rows(4)
    score = score_batches(LossModule(model), [batch], BYTE_LENGTHS)
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(
            model(batch.tokens).double().flatten(0, 1), batch.targets.flatten(), reduction="sum"
        )
    kept = batch.targets[batch.targets >= 0]
    assert score.nats == pytest.approx(nats.item(), rel=1e-5)
    assert (score.tokens, score.num_bytes) == (4 * 8 - 3, int(kept.sum()))
    assert score.nats_per_token == pytest.approx(nats.item() / 29, rel=1e-5)


def test_batches_add_up(model: GPT) -> None:
    whole, module = rows(4), LossModule(model)
    parts = [Rows(whole.tokens[i : i + 1], whole.targets[i : i + 1]) for i in range(4)]
    together, apart = (score_batches(module, batches, BYTE_LENGTHS) for batches in ([whole], parts))
    assert apart.nats == pytest.approx(together.nats, rel=1e-6)
    assert (apart.tokens, apart.num_bytes) == (together.tokens, together.num_bytes)


def test_the_borders_of_documents_change_the_score(model: GPT) -> None:
    # Blocks start as the identity, through which no attention is seen.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = rows(2)
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]).expand(2, 8)
    blind = score_batches(LossModule(model), [batch], BYTE_LENGTHS)
    bounded = score_batches(LossModule(model), [Rows(batch.tokens, batch.targets, documents)], BYTE_LENGTHS)
    assert abs(bounded.nats - blind.nats) > 1e-3


def test_precision_is_that_of_the_products(model: GPT) -> None:
    exact, half = (
        score_batches(LossModule(model), [rows(4)], BYTE_LENGTHS, precision=precision)
        for precision in (torch.float32, torch.bfloat16)
    )
    assert half.nats != exact.nats
    assert half.nats == pytest.approx(exact.nats, rel=0.02)


def test_the_code_of_a_training_step_finds_the_same_and_leaves_no_gradients(model: GPT) -> None:
    usual, as_trained = (
        score_batches(LossModule(model), [rows(4)], BYTE_LENGTHS, as_trained=is_so) for is_so in (False, True)
    )
    assert as_trained.nats == pytest.approx(usual.nats, rel=1e-6)
    assert as_trained.tokens == usual.tokens
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_module_is_left_in_its_mode(model: GPT) -> None:
    for training in (True, False):
        model.train(training)
        score_batches(LossModule(model).train(training), [rows(1)], BYTE_LENGTHS)
        assert model.training is training
