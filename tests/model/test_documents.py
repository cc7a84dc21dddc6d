"""Attention inside documents: every way gives the dense mask's loss and gradients, and none holds a [B, 1, T, T]."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from model import documents as ways
from model.cpu.attention import document_attention
from model.documents import (
    Documents,
    find_documents,
    flash_suits,
    let_number_vary,
    split_documents,
    varlen_attention,
    varlen_reference,
)
from model.gpt import GPT, ModelConfig
from model.training import count_shares

VOCABULARY = 70
WAYS = {
    "sequences to a flash kernel": partial(varlen_attention, kernel=varlen_reference),
    "blocks skipped": document_attention,
}
# Rows, heads, key heads, tokens, and tokens of a document on average: whole blocks and not, none as long as a block,
# one document a row, as many documents as tokens.
SHAPES = [(2, 4, 2, 300, 40), (2, 2, 2, 256, 9), (2, 2, 1, 640, 10_000), (1, 1, 1, 7, 1)]


def random_ids(rows: int, length: int, mean: float) -> Tensor:
    return (torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) < 1 / mean).cumsum(1)


def test_documents_are_runs_of_equal_ids() -> None:
    found = find_documents(torch.tensor([[0, 0, 1, 1, 1], [4, 4, 4, 4, 4], [0, 1, 2, 2, 0]]))
    assert found.starts.tolist() == [[0, 0, 2, 2, 2], [0] * 5, [0, 1, 2, 2, 4]]
    assert found.offsets.tolist() == [0, 2, 5, 10, 11, 12, 14, 15]
    assert found.positions.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 1, 0]]
    assert found.reach == 1
    assert found.mask().shape == (3, 1, 5, 5)
    assert found.mask()[2, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(("last_of_the_first", "reach"), [(127, 1), (128, 2), (255, 2), (256, 4), (400, 4), (639, 8)])
def test_the_reach_is_of_the_longest_document_in_blocks_and_few_numbers(last_of_the_first: int, reach: int) -> None:
    ids = torch.arange(640)[None].clamp(min=last_of_the_first) - last_of_the_first
    short = torch.arange(640)[None]
    assert find_documents(torch.cat((short, ids))).reach == reach
    # Parts are compiled once for all: the part of short documents gets the reach of the other.
    assert [each.reach for each in split_documents(torch.cat((short, ids)), 2)] == [reach, reach]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_attends_as_the_dense_mask_does(shape: tuple[int, ...], way: str) -> None:
    rows, heads, key_heads, length, mean = shape
    found = find_documents(random_ids(rows, length, mean))
    torch.manual_seed(0)
    # As the model has them: a transposed view, not contiguous.
    parts = [
        torch.randn(rows, length, number, 16).transpose(1, 2).requires_grad_()
        for number in (heads, key_heads, key_heads)
    ]
    upstream = torch.randn(rows, heads, length, 16)
    mixed = WAYS[way](*parts, found)
    expected = F.scaled_dot_product_attention(*parts, attn_mask=found.mask(), enable_gqa=True)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    gradients = zip(
        torch.autograd.grad(mixed, parts, upstream), torch.autograd.grad(expected, parts, upstream), strict=True
    )
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_probabilities_too_many_to_keep_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.cpu.attention.MAX_KEPT_LENGTH", 0)
    test_every_way_attends_as_the_dense_mask_does(SHAPES[0], "blocks skipped")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["classic", "modern"])
def test_a_model_learns_from_documents_as_with_the_dense_mask(family: str, way: str) -> None:
    config = ModelConfig(family, num_layers=2, width=32, num_heads=2, context_length=256)
    torch.manual_seed(0)
    model = GPT(config, VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    tokens = torch.randint(0, VOCABULARY, (3, 256))
    found = find_documents(random_ids(3, 256, 30))
    masks = []
    real_mask = Documents.mask
    counted = pytest.MonkeyPatch()
    counted.setattr(Documents, "mask", lambda self: masks.append(1) or real_mask(self))

    def learn(attention: Callable[..., Tensor] | None) -> list[Tensor]:
        for block in model.blocks:
            block.attention.document_attention = attention
        loss = model.loss(tokens, tokens.roll(-1), found)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    try:
        ours, theirs = learn(WAYS[way]), learn(None)
    finally:
        counted.undo()
    assert len(masks) == 1, "the reference's alone"
    for found_gradient, expected in zip(ours, theirs, strict=True):
        assert (found_gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-6


def test_dropout_takes_the_mask_and_so_does_what_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert flash_suits(cuda, torch.bfloat16, 128)
    assert flash_suits(cuda, torch.float16, 64)
    assert not flash_suits(cuda, torch.float32, 128)
    assert not flash_suits(cuda, torch.bfloat16, 512)
    assert not flash_suits(cuda, torch.bfloat16, 20)
    assert not flash_suits(torch.device("cpu"), torch.bfloat16, 128)
    config = ModelConfig("classic", num_layers=1, width=16, num_heads=2, context_length=8, dropout=0.1)
    block = GPT(config, VOCABULARY).blocks[0]
    block.attention.document_attention = document_attention
    assert block.attention.find_document_attention(torch.zeros(1)) is None
    monkeypatch.setattr(ways, "flash_kernel", lambda: None)  # an older PyTorch
    assert not flash_suits(cuda, torch.bfloat16, 128)


@torch.no_grad()
def test_pytorchs_own_kernel_takes_what_it_is_given() -> None:
    # Shapes alone: without a GPU nothing is computed, and autograd asks fake GPU tensors for a stream.
    with FakeTensorMode():
        parts = [torch.empty(2, heads, 64, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
        offsets = torch.zeros(7, device="cuda", dtype=torch.int32)
        mixed = varlen_attention(*parts, Documents(torch.zeros(2, 64, device="cuda"), offsets, 1))
    assert mixed.shape == (2, 4, 64, 32)
    assert mixed.device.type == "cuda"
    assert mixed.dtype == torch.bfloat16


@torch.library.custom_op("tests::varlen", mutates_args={})
def opaque_kernel(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    return varlen_reference(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0), enable_gqa=False)


@opaque_kernel.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    return torch.empty_like(q)


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


@torch.no_grad()
def test_one_graph_serves_any_number_of_documents(graphs: list[torch.fx.GraphModule]) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, _: Tensor, longest: int, *__: int, **___: object):
        return opaque_kernel(q, k, v, offsets, longest)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model = GPT(ModelConfig(num_layers=2, width=32, num_heads=2, context_length=64), VOCABULARY)
    for block in model.blocks:
        block.attention.document_attention = partial(varlen_attention, kernel=kernel)
        block.compile(dynamic=False, backend=backend)
    for mean in (4, 8, 64):
        found = find_documents(random_ids(3, 64, mean))
        let_number_vary(found.offsets)
        model.forward_hidden(torch.zeros(3, 64, dtype=torch.long), documents=found)
    assert len(graphs) == 1


def test_a_share_of_a_batch_knows_its_own_documents() -> None:
    ids = random_ids(4, 256, 20)
    parts = split_documents(ids, count_shares(2, 4))
    whole = find_documents(ids)
    assert torch.equal(torch.cat([each.starts for each in parts]), whole.starts)
    assert [int(each.offsets[-1]) for each in parts] == [512, 512]
