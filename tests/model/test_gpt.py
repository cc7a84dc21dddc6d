"""The model's parts agree with plain PyTorch and with themselves; test_checkpoint holds it against transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from model import gpt
from model.documents import find_documents
from model.gpt import (
    GPT,
    ModelConfig,
    block_parameters,
    chunked_cross_entropy,
    count_parameters,
    flops_per_token,
)

CONTEXT, VOCABULARY = 24, 101
SMALL = {"num_layers": 2, "width": 32, "num_heads": 4, "context_length": CONTEXT}
CONFIGS = {
    "classic": ModelConfig(family="classic", **SMALL),
    "modern": ModelConfig(num_kv_heads=2, head_dim=12, tie_embeddings=True, **SMALL),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> GPT:
    torch.manual_seed(2)
    model = GPT(CONFIGS[request.param], VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.clear_padding()
    return model.eval()


def random_tokens(batch: int = 3, length: int = CONTEXT) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(4))


def test_parameter_counts_are_those_of_the_papers() -> None:
    gpt2 = ModelConfig(
        family="classic", num_layers=12, width=768, num_heads=12, context_length=1024, tie_embeddings=True
    )
    assert count_parameters(gpt2, 50_257) == 124_439_808
    reference = ModelConfig(family="classic", num_layers=16, width=384, num_heads=16, context_length=128, dropout=0.2)
    assert count_parameters(reference, 32_172) == pytest.approx(53_175_468, rel=0.001)


def test_the_count_is_what_the_model_holds_without_padding(model: GPT) -> None:
    padding = (len(model.embedding.weight) - VOCABULARY) * model.config.width
    held = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == held - padding * (1 if model.config.tie_embeddings else 2)


def test_flops_are_six_per_weight_and_the_attention() -> None:
    config = ModelConfig(num_layers=3, width=64, num_heads=2, context_length=16, mlp_width=128)
    assert block_parameters(config)[0] == 4 * 64 * 64 + 3 * 64 * 128
    assert flops_per_token(config, 1000) == 6 * (3 * (4 * 64 * 64 + 3 * 64 * 128) + 64_000) + 12 * 3 * 64 * 16


def test_chunks_are_whole_tiles_of_matrix_units() -> None:
    rows, wide = [], 50_304  # GPT-2's vocabulary: 166 tokens would fit a CPU's limit, 1,334 a GPU's

    def note(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append(len(logits))
        return logits.sum().detach(), logits

    hidden, weight = torch.zeros(300, 2, requires_grad=True), torch.zeros(wide, 2)
    chunked_cross_entropy(hidden, weight, torch.zeros(300, dtype=torch.long), wide, chunk_gradient=note)
    assert rows == [128, 128, 44]


def test_the_chunked_loss_has_the_loss_and_gradients_of_plain_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(128, 16, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (50,))
    targets[3:9] = -100
    plain = F.cross_entropy((hidden @ weight.t())[:, :VOCABULARY], targets, ignore_index=-100, reduction="sum")
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    for chunk_tokens in (7, 50, 64):
        chunked = chunked_cross_entropy(hidden, weight, targets, VOCABULARY, chunk_tokens)
        torch.testing.assert_close(chunked, plain)
        for found, wanted in zip(torch.autograd.grad(3 * chunked, (hidden, weight)), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, weight, targets, VOCABULARY, 7), plain)


def test_the_gradients_of_bfloat16_weights_add_up_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(512, 16), torch.randn(128, 16), torch.randint(0, VOCABULARY, (512,))
    half = weight.bfloat16().requires_grad_()
    chunked_cross_entropy(hidden.bfloat16(), half, targets, VOCABULARY, 4).backward()
    exact = half.detach().float().requires_grad_()
    chunked_cross_entropy(hidden.bfloat16().float(), exact, targets, VOCABULARY).backward()
    assert half.grad is not None
    assert exact.grad is not None
    assert (half.grad.float() - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_the_loss_under_autocast_stays_close_and_its_gradients_float32(model: GPT) -> None:
    tokens = random_tokens()
    exact = model.loss(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_padding_of_the_vocabulary_is_zero_and_learns_nothing(model: GPT) -> None:
    tokens = random_tokens()
    assert model(tokens).shape == (3, CONTEXT, VOCABULARY)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for weight in (model.embedding.weight, model.head.weight):
        assert len(weight) == 128
        assert not weight[VOCABULARY:].any()
        assert weight.grad is not None
        assert not weight.grad[VOCABULARY:].any()


@torch.no_grad()
def test_a_token_sees_only_what_came_before(model: GPT) -> None:
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % VOCABULARY
    torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10])
    assert not torch.allclose(model(tokens)[:, 10:], model(changed)[:, 10:])


@torch.no_grad()
def test_the_cache_computes_what_the_whole_text_does(model: GPT) -> None:
    tokens = random_tokens()
    cache = model.new_cache(slots=3)
    steps = []
    for start, end in [(0, 7), *((place, place + 1) for place in range(7, CONTEXT))]:
        positions = torch.arange(start, end).expand(3, -1)
        hidden = model.forward_hidden(tokens[:, start:end], cache=cache, positions=positions, visible=end)
        steps.append(model.logits(hidden))
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_of_different_lengths_share_a_batch(model: GPT) -> None:
    tokens = random_tokens()
    lengths = [5, 9]
    cache = model.new_cache(slots=4)
    slots = torch.tensor([3, 1])
    # Both prompts at once, the shorter padded on the right; then one token each.
    prompt = model.forward_hidden(
        tokens[:2, :9], cache=cache, slots=slots, positions=torch.arange(9).repeat(2, 1), visible=9
    )
    following = torch.stack([tokens[row, length] for row, length in enumerate(lengths)])[:, None]
    step = model.forward_hidden(
        following, cache=cache, slots=slots, positions=torch.tensor(lengths)[:, None], visible=10
    )
    for row, length in enumerate(lengths):
        alone = model.forward_hidden(tokens[row : row + 1, : length + 1])
        torch.testing.assert_close(prompt[row, :length], alone[0, :length], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step[row, 0], alone[0, length], rtol=1e-4, atol=1e-4)


def test_the_heads_gradient_can_be_added_up_without_rounding_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs do in one pass, by a stand-in for the product that they have and a CPU has not."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(size, 16, generator=generator).bfloat16() for size in (512, VOCABULARY))
    targets = torch.randint(0, VOCABULARY, (512,), generator=generator)

    def gradient_in(dtype: torch.dtype) -> Tensor:
        head = weight.to(dtype).float().requires_grad_()
        loss = gpt.ChunkedCrossEntropy.apply(
            hidden.to(dtype), head, targets, VOCABULARY, 64, gpt.cross_entropy_gradient
        )
        return torch.autograd.grad(loss, head)[0]

    calls = []
    real_addmm = torch.addmm

    def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        calls.append((left.dtype, out_dtype))
        assert out is total, "in place"
        return real_addmm(total, left.to(out_dtype), right.to(out_dtype), out=out)

    exact, rounded = gradient_in(torch.float32), gradient_in(torch.bfloat16)
    monkeypatch.setattr(gpt, "keeps_float32_sums", lambda device: True)
    monkeypatch.setattr(torch, "addmm", addmm)
    added = gradient_in(torch.bfloat16)
    assert calls == [(torch.bfloat16, torch.float32)] * 8
    assert (added - exact).norm() < (rounded - exact).norm() < 0.01 * exact.norm()


def test_only_gpus_are_asked_for_that_product_and_pytorch_has_it() -> None:
    assert gpt.keeps_float32_sums(torch.device("cuda"))
    assert not gpt.keeps_float32_sums(torch.device("cpu"))
    with torch.no_grad(), FakeTensorMode():  # shapes and types alone: without a GPU nothing is computed
        total = torch.empty(64, 32, device="cuda")
        left, right = (torch.empty(128, size, device="cuda", dtype=torch.bfloat16) for size in (64, 32))
        assert torch.addmm(total, left.t(), right, out_dtype=torch.float32).dtype == torch.float32


@torch.no_grad()
def test_document_boundaries_keep_attention_inside(model: GPT) -> None:
    first, second = random_tokens(2, 12)
    together = torch.cat((first, second))[None]
    documents = find_documents(torch.tensor([[0] * 12 + [1] * 12]))
    hidden = model.forward_hidden(together, documents=documents)
    torch.testing.assert_close(hidden[0, :12], model.forward_hidden(first[None])[0], rtol=1e-4, atol=1e-4)
    changed = torch.cat(((first + 1) % VOCABULARY, second))[None]
    unchanged = model.forward_hidden(changed, documents=documents)[0, 12:]
    torch.testing.assert_close(hidden[0, 12:], unchanged, rtol=1e-4, atol=1e-4)
    if model.config.is_modern:
        # RoPE knows only distances, so the second document computes as if it stood alone.
        torch.testing.assert_close(hidden[0, 12:], model.forward_hidden(second[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"family": "gpt"}, "modern or classic"),
        ({"width": 100, "num_heads": 3}, "divisible"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads"),
        ({"dropout": 0.1}, "no dropout"),
        ({"family": "classic", "num_kv_heads": 2}, "GPT-2"),
        ({"head_dim": 33}, "even"),
        ({"num_layers": 0}, "positive"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelConfig(**settings)
