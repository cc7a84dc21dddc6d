"""Block-wise causal attention is PyTorch's, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from model import attention
from model.gpt import GPT, ModelConfig
from model.training import parallelize


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


def test_it_is_for_compiled_training_alone() -> None:
    queries = torch.randn(1, 1, 256, 8, requires_grad=True)
    assert not attention.pays(queries, queries)


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "expected_calls"), [(0, 2), (1, 0)])
def test_a_compiled_model_uses_it_and_learns_the_same(
    kv_heads: int, expected_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    losses = [module(tokens, tokens.roll(-1)), plain.loss(tokens, tokens.roll(-1))]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-3)
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
    assert len(calls) == expected_calls
