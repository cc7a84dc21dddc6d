"""Block-wise causal attention is PyTorch's, in values and gradients, in both precisions."""

import pytest
import torch
import torch.nn.functional as F

from model.cpu import attention
from model.documents import find_documents
from model.gpt import GPT, ModelConfig, torch_causal_attention
from model.training import autocast, parallelize


def test_it_is_torch_own_attention() -> None:
    torch.manual_seed(0)
    # As the model has them: a transposed view, not contiguous.
    ours = [torch.randn(2, 384, 3, 16).transpose(1, 2).requires_grad_() for _ in range(3)]
    upstream = torch.randn(2, 3, 384, 16)
    mixed = attention.causal_attention(*ours)
    expected = F.scaled_dot_product_attention(*ours, is_causal=True)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(
        torch.autograd.grad(mixed, ours, upstream), torch.autograd.grad(expected, ours, upstream), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_matrix_units", [False, True])
@pytest.mark.parametrize("length", [40, 640, 700])
def test_in_bfloat16_it_is_off_by_the_rounding_alone(
    length: int, has_matrix_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "HAS_MATRIX_UNITS", has_matrix_units)
    torch.manual_seed(0)
    exact = [torch.randn(2, length, 3, 16).transpose(1, 2).requires_grad_() for _ in range(3)]
    upstream = torch.randn(2, 3, length, 16)
    expected = F.scaled_dot_product_attention(*exact, is_causal=True)
    rounded = [part.detach().bfloat16().requires_grad_() for part in exact]
    mixed = attention.causal_attention(*rounded)
    found = mixed, *torch.autograd.grad(mixed, rounded, upstream.bfloat16())
    wanted = expected, *torch.autograd.grad(expected, exact, upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < 0.01 * theirs.norm()  # a bfloat16 has 8 bits: 0.004 each


def test_it_is_for_compiled_training_alone() -> None:
    queries = torch.randn(1, 1, 256, 8, requires_grad=True)
    assert not attention.pays(queries, queries)
    for compile in (False, True):
        model = GPT(ModelConfig(num_layers=1, width=16, num_heads=2, context_length=8), 70)
        parallelize(model, compile=compile)
        chosen = {block.attention.causal_attention for block in model.blocks}
        assert chosen == {attention.fastest_attention if compile else torch_causal_attention}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("has_documents", [False, True])
def test_masks_and_dropout_are_left_to_torch(has_documents: bool, dropout: float) -> None:
    model = GPT(ModelConfig("classic", num_layers=2, width=16, num_heads=2, context_length=8, dropout=dropout), 70)
    calls = []

    def counted(*parts: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch_causal_attention(*parts)

    for block in model.blocks:
        block.attention.causal_attention = counted
    tokens = torch.arange(8)[None]
    model.loss(tokens, tokens, find_documents(tokens // 4) if has_documents else None)
    assert len(calls) == (0 if has_documents or dropout else 2)


def test_probabilities_are_kept_where_that_is_the_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(length: int, dtype: torch.dtype, has_matrix_units: bool) -> bool:
        monkeypatch.setattr(attention, "HAS_MATRIX_UNITS", has_matrix_units)
        return attention.is_worth_keeping(torch.empty(1, 1, length, 8, dtype=dtype))

    assert form(512, torch.float32, True)
    assert form(512, torch.bfloat16, False)
    assert not form(512, torch.bfloat16, True)  # PyTorch's own forward pass is fast there
    assert not form(500, torch.bfloat16, False)  # not in whole blocks
    assert not form(4096, torch.bfloat16, False)  # too much to keep


@pytest.mark.slow
@pytest.mark.parametrize("has_matrix_units", [False, True])
@pytest.mark.parametrize(
    ("precision", "has_units", "kv_heads", "expected_calls"),
    [
        (torch.float32, False, 0, 2),
        (torch.float32, False, 1, 0),
        (torch.bfloat16, True, 0, 2),
        (torch.bfloat16, True, 1, 0),
        (torch.bfloat16, False, 0, 0),
    ],
)
def test_a_compiled_model_uses_it_where_it_pays_and_learns_the_same(
    precision: torch.dtype,
    has_units: bool,
    kv_heads: int,
    expected_calls: int,
    has_matrix_units: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.compiler.reset()  # models of other tests leave code of their own behind, and there is a limit
    tolerance = 1e-4 if precision == torch.float32 else 0.05
    monkeypatch.setattr(attention, "HAS_BFLOAT16_UNITS", has_units)
    monkeypatch.setattr(attention, "HAS_MATRIX_UNITS", has_matrix_units)
    config = ModelConfig(num_layers=2, width=32, num_heads=2, num_kv_heads=kv_heads, context_length=256, mlp_width=64)
    torch.manual_seed(0)
    plain = GPT(config, 70)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.1)
    compiled = GPT(config, 70)
    compiled.load_state_dict(plain.state_dict())
    calls = []
    causal_attention = attention.causal_attention

    def counted(*parts: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return causal_attention(*parts)

    monkeypatch.setattr(attention, "causal_attention", torch._dynamo.disable(counted, recursive=False))
    tokens = torch.randint(0, 70, (2, 256))
    module = parallelize(compiled, compile=True)
    with autocast("cpu", precision):
        losses = [module(tokens, tokens.roll(-1)), plain.loss(tokens, tokens.roll(-1))]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=0.01 * tolerance, atol=0)
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() <= tolerance * theirs.grad.norm(), name
    assert len(calls) == expected_calls
