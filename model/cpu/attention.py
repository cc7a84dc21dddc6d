"""Causal attention on a CPU, for training and inside documents. It goes block by block and skips the blocks that the
mask throws away.

PyTorch's attention skips them too in its forward pass. Its backward pass is slow: it takes half as long again in
float32, and three times as long in bfloat16. The two forms here are faster, each in its precision, once they are
compiled, which fuses the passes over the scores.
"""

from typing import Any

import torch
from torch import Tensor

from model.documents import BLOCK_TOKENS, Documents
from model.gpt import torch_causal_attention
from model.training import HAS_BFLOAT16_UNITS

# The fastest of the block sizes 64 to 512: the first on EPYCs (Zen 3 and Zen 5), the second on a Xeon whose matrix
# units make products cheap.
KEPT_BLOCK = 128
RECOMPUTED_BLOCK = 512
HAS_MATRIX_UNITS = torch.cpu._is_amx_tile_supported()
MAX_KEPT_LENGTH = 1024  # of a longer text, nothing that the backward pass needs would take as much memory


def fastest_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Compute causal attention by the block-wise form where that is the faster one, else by PyTorch's.

    The choice depends on shapes and precision alone, so a compiled model makes it once for each, while it is compiled.
    """
    return (causal_attention if pays(queries, keys) else torch_causal_attention)(queries, keys, values)


def pays(queries: Tensor, keys: Tensor) -> bool:
    """Tell whether the block-wise form is faster than PyTorch's: compiled, on a CPU with units for the precision, and
    in float32 only if there are several whole blocks.
    """
    suits = HAS_BFLOAT16_UNITS if queries.dtype == torch.bfloat16 else queries.dtype == torch.float32
    return (
        torch.compiler.is_compiling()
        and queries.device.type == "cpu"
        and queries.requires_grad
        and queries.shape == keys.shape
        and suits
        and (queries.dtype == torch.bfloat16 or is_worth_keeping(queries))
    )


def is_worth_keeping(queries: Tensor) -> bool:
    """Tell whether `KeptAttention` is the faster form for these lengths and this precision.

    In bfloat16 PyTorch's forward pass, which `RecomputedAttention` uses, is the faster one on matrix units. Without
    them PyTorch multiplies in float32 and takes three times as long.
    """
    length = queries.shape[2]
    in_whole_blocks = KEPT_BLOCK < length <= MAX_KEPT_LENGTH and length % KEPT_BLOCK == 0
    return in_whole_blocks and not (queries.dtype == torch.bfloat16 and HAS_MATRIX_UNITS)


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax of scaled scores times values, [B, H, T, D] each; a query sees its own position and those before."""
    form = KeptAttention if is_worth_keeping(queries) else RecomputedAttention
    mixed: Tensor = form.apply(queries, keys, values)
    return mixed


class KeptAttention(torch.autograd.Function):
    """Keeps the probabilities for the backward pass, where PyTorch's attention computes them again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        queries, keys, values = (part.flatten(0, 1) for part in inputs)
        mixed, kept, blocks = [], [], []
        scale = queries.shape[-1] ** -0.5
        for start in range(0, queries.shape[1], KEPT_BLOCK):
            end = start + KEPT_BLOCK
            block = queries[:, start:end].contiguous()  # else each product makes its own copy
            scores = torch.bmm(block, keys[:, :end].mT).float() * scale
            seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril(start)
            probabilities = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).to(values.dtype)
            mixed.append(torch.bmm(probabilities, values[:, :end]))
            kept.append(probabilities)
            blocks.append(block)
        ctx.save_for_backward(keys, values, *kept, *blocks)
        return torch.cat(mixed, dim=1).view(inputs[0].shape)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        shape = upstream[0].shape
        gradient = upstream[0].flatten(0, 1)
        keys, values, *saved = ctx.saved_tensors
        kept, blocks = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        scale = keys.shape[-1] ** -0.5
        by_queries = []
        by_keys, by_values = BlockSums(KEPT_BLOCK), BlockSums(KEPT_BLOCK)
        for number, (probabilities, queries) in enumerate(zip(kept, blocks, strict=True)):
            start, end = number * KEPT_BLOCK, number * KEPT_BLOCK + KEPT_BLOCK
            by_mixed = gradient[:, start:end].contiguous()
            by_values.add(torch.bmm(probabilities.mT, by_mixed))
            by_probabilities = torch.bmm(by_mixed, values[:, :end].mT).float()
            means = (by_probabilities * probabilities).sum(dim=-1, keepdim=True)
            by_scores = ((by_probabilities - means) * probabilities * scale).to(keys.dtype)
            by_queries.append(torch.bmm(by_scores, keys[:, :end]))
            by_keys.add(torch.bmm(by_scores.mT, queries))
        gradients = torch.cat(by_queries, dim=1), by_keys.join(keys.dtype), by_values.join(values.dtype)
        return tuple(part.view(shape) for part in gradients)


class BlockSums:
    """Sums of products [B x H, keys, D], each of which covers some of the blocks of keys.

    Block by block: of sums in slices of one tensor the compiler makes conditions for each element, twice as many with
    every slice.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.sums: list[Tensor] = []  # of each block, in float32

    def add(self, product: Tensor, first: int = 0) -> None:
        """Add a product over the keys from `first` on, where a block begins."""
        for place, part in enumerate(product.split(self.block_tokens, dim=1), first // self.block_tokens):
            if place < len(self.sums):
                self.sums[place] = self.sums[place] + part
            else:
                self.sums.append(part.float())

    def join(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([part.to(dtype) for part in self.sums], dim=1)


class RecomputedAttention(torch.autograd.Function):
    """Flash attention's backward pass (arXiv:2205.14135) in matrix products of the whole batch, for matrix units.

    Forward is PyTorch's, which gives each query's normaliser. Backward goes over blocks of keys; scores lie as [keys,
    queries], so that two of the three products that follow need no transposed copy of them.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mixed: Tensor
        mixed, normalisers = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, is_causal=True
        )
        ctx.save_for_backward(queries, keys, values, mixed, normalisers)
        return mixed

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        shape, length = upstream[0].shape, upstream[0].shape[2]
        queries, keys, values, mixed, normalisers, gradient = (
            part.flatten(0, 1) for part in (*ctx.saved_tensors, upstream[0])
        )
        scale = queries.shape[-1] ** -0.5
        normalisers = normalisers.reshape(-1, 1, length)
        means = (gradient.float() * mixed.float()).sum(dim=-1)[:, None]
        by_queries, by_keys, by_values = torch.zeros_like(queries, dtype=torch.float32), [], []
        for start in range(0, length, RECOMPUTED_BLOCK):
            block = slice(start, start + RECOMPUTED_BLOCK)
            scores = torch.bmm(keys[:, block], queries[:, start:].mT).float()
            unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril(-1)
            probabilities = (scores * scale - normalisers[..., start:]).exp().masked_fill(unseen, 0)
            by_probabilities = torch.bmm(values[:, block], gradient[:, start:].mT).float()
            by_scores = ((by_probabilities - means[..., start:]) * probabilities * scale).to(keys.dtype)
            by_values.append(torch.bmm(probabilities.to(keys.dtype), gradient[:, start:]))
            by_keys.append(torch.bmm(by_scores, queries[:, start:]))
            by_queries[:, start:] += torch.bmm(by_scores.mT, keys[:, block])
        gradients = by_queries.to(keys.dtype), torch.cat(by_keys, dim=1), torch.cat(by_values, dim=1)
        return tuple(part.view(shape) for part in gradients)


def document_attention(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document, [B, H, T, D] by [B, K, T, D], for compiled blocks."""
    group = queries.shape[1] // keys.shape[1]
    if group > 1:
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    mixed: Tensor = AttentionInDocuments.apply(queries, keys, values, documents.starts, documents.reach)
    return mixed


class AttentionInDocuments(torch.autograd.Function):
    """Blocks of queries by the blocks of keys that some query among them sees: at most `reach`, their own the last.

    Keeps the probabilities as `KeptAttention` does, or, where they would take too much memory, computes them again.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, reach: int) -> Tensor:
        shape, length = queries.shape, queries.shape[2]
        queries, keys, values = (part.flatten(0, 1) for part in (queries, keys, values))
        keeps = min(length, reach * BLOCK_TOKENS) <= MAX_KEPT_LENGTH
        mixed, kept = [], []
        for start in range(0, length, BLOCK_TOKENS):
            first, end = max(0, start + BLOCK_TOKENS - reach * BLOCK_TOKENS), min(start + BLOCK_TOKENS, length)
            scores = scores_in_documents(queries[:, start:end], keys[:, first:end], starts, start, first)
            probabilities = torch.softmax(scores, dim=-1).to(values.dtype)
            mixed.append(torch.bmm(probabilities, values[:, first:end]))
            kept.append(probabilities if keeps else scores.logsumexp(dim=-1, keepdim=True))
        ctx.save_for_backward(queries, keys, values, starts, *kept)
        ctx.reach, ctx.keeps, ctx.shape = reach, keeps, shape
        return torch.cat(mixed, dim=1).view(shape)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient = upstream[0].flatten(0, 1)
        queries, keys, values, starts, *kept = ctx.saved_tensors
        scale, length = queries.shape[-1] ** -0.5, queries.shape[1]
        by_queries = []
        by_keys, by_values = BlockSums(BLOCK_TOKENS), BlockSums(BLOCK_TOKENS)
        for number, start in enumerate(range(0, length, BLOCK_TOKENS)):
            first, end = max(0, start + BLOCK_TOKENS - ctx.reach * BLOCK_TOKENS), min(start + BLOCK_TOKENS, length)
            probabilities = kept[number]
            if not ctx.keeps:
                scores = scores_in_documents(queries[:, start:end], keys[:, first:end], starts, start, first)
                probabilities = (scores - probabilities).exp().to(values.dtype)
            by_values.add(torch.bmm(probabilities.mT, gradient[:, start:end]), first)
            by_probabilities = torch.bmm(gradient[:, start:end], values[:, first:end].mT).float()
            means = (by_probabilities * probabilities).sum(dim=-1, keepdim=True)
            by_scores = ((by_probabilities - means) * probabilities * scale).to(keys.dtype)
            by_queries.append(torch.bmm(by_scores, keys[:, first:end]))
            by_keys.add(torch.bmm(by_scores.mT, queries[:, start:end]), first)
        gradients = torch.cat(by_queries, dim=1), by_keys.join(keys.dtype), by_values.join(values.dtype)
        return *(part.view(ctx.shape) for part in gradients), None, None


def scores_in_documents(queries: Tensor, keys: Tensor, starts: Tensor, start: int, first: int) -> Tensor:
    """Scaled scores [B x H, q, k] in float32 of queries from `start` on and keys from `first` on; -inf where unseen."""
    scores = torch.bmm(queries, keys.mT).float() * queries.shape[-1] ** -0.5
    length, rows = queries.shape[1], len(starts)
    query_places = torch.arange(start, start + length, device=starts.device, dtype=torch.int32)
    key_places = torch.arange(first, first + keys.shape[1], device=starts.device, dtype=torch.int32)
    seen = (key_places >= starts[:, start : start + length, None]) & (key_places <= query_places[:, None])
    by_row = scores.unflatten(0, (rows, -1))
    return by_row.masked_fill(~seen[:, None], -torch.inf).flatten(0, 1)
