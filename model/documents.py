"""Where the documents of a batch lie, and attention that stays inside them without a mask of [B, 1, T, T].

    documents = find_documents(batch.document_ids).to(device)       # found on the CPU, so that nothing waits for a GPU
    nats = model.loss(tokens, targets, documents)

On a GPU, flash attention takes documents as sequences of different lengths (`varlen_attention`). On a CPU, compiled
blocks skip the keys that lie before all documents of some queries (model/cpu/attention.py). Where neither works, as in
float32 on a GPU or with dropout, `Documents.mask` gives the dense mask, which is also what both are tested against.

Shapes: B sequences, T tokens, H heads, K key-value heads, D channels of a head, N documents.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_TOKENS = 128  # in which `reach` counts
MAX_FLASH_CHANNELS = 256  # of a head: more, and flash attention has no kernel


@dataclass(frozen=True)
class Documents:
    """The documents of a batch's rows; each lies in one row, and every token in one."""

    starts: Tensor  # [B, T] int32: the place in its row where each token's document begins
    offsets: Tensor  # [N + 1] int32: where each document begins among all B x T tokens, then B x T
    reach: int  # blocks, its own included, that the furthest-looking block of queries sees: a power of two

    def to(self, device: torch.device | str) -> "Documents":
        starts, offsets = (each.to(device, non_blocking=True) for each in (self.starts, self.offsets))
        if offsets.is_cuda:
            let_number_vary(offsets)
        return Documents(starts, offsets, self.reach)

    @property
    def positions(self) -> Tensor:
        """How many tokens of its own document stand before each, [B, T]."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    def mask(self) -> Tensor:
        """[B, 1, T, T]: true where a token may look, itself and earlier ones of its own document."""
        places = torch.arange(self.starts.shape[1], device=self.starts.device)
        return ((places >= self.starts[:, :, None]) & (places <= places[:, None]))[:, None]


DocumentAttention = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]


def find_documents(document_ids: Tensor) -> Documents:
    """Find the runs of equal ids in rows [B, T]."""
    rows, length = document_ids.shape
    places = torch.arange(length, device=document_ids.device)
    is_first = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    starts = (places * is_first).cummax(dim=1).values
    offsets = F.pad(is_first.flatten().nonzero().flatten(), (0, 1), value=rows * length)
    # A block's first query looks back the furthest; of all rows, the one whose document is the longest so far.
    first_blocks = starts[:, ::BLOCK_TOKENS].amin(dim=0) // BLOCK_TOKENS
    furthest = int((torch.arange(len(first_blocks), device=first_blocks.device) - first_blocks).max()) + 1
    # Each number is compiled once more, so there are few of them.
    return Documents(starts.int(), offsets.int(), 1 << (furthest - 1).bit_length())


def let_number_vary(offsets: Tensor) -> None:
    """Have compiled code take any number of documents: else it is compiled anew for each, and soon no more."""
    torch._dynamo.maybe_mark_dynamic(offsets, 0)


def split_documents(document_ids: Tensor, parts: int) -> list[Documents]:
    """Find the documents of each part of the rows; all parts get one reach, so that one compiled code serves them."""
    found = [find_documents(part) for part in document_ids.chunk(parts)]
    reach = max(each.reach for each in found)
    return [replace(each, reach=reach) for each in found]


def flash_kernel() -> Callable[..., Any] | None:
    """PyTorch's flash attention over sequences of different lengths; None where this PyTorch has none."""
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn
    return None


def flash_suits(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Tell whether `varlen_attention` runs there: it is for GPUs, and for 16 bits."""
    suits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return suits and channels <= MAX_FLASH_CHANNELS and channels % 8 == 0 and flash_kernel() is not None


def varlen_attention(
    queries: Tensor, keys: Tensor, values: Tensor, documents: Documents, kernel: Callable[..., Any] | None = None
) -> Tensor:
    """Causal attention inside each document, [B, H, T, D] by [B, K, T, D]; documents are sequences to the kernel."""
    rows, heads, length, channels = queries.shape
    kernel = kernel or flash_kernel()
    assert kernel is not None
    # [B, H, T, D] is a view of [B, T, H, D], which the kernel wants: nothing is copied unless RoPE has.
    parts = (part.transpose(1, 2).reshape(rows * length, part.shape[1], channels) for part in (queries, keys, values))
    # The row's length bounds every document's: the longest one's own would be compiled anew for each batch.
    mixed: Tensor = kernel(
        *parts,
        documents.offsets,
        documents.offsets,
        length,
        length,
        window_size=(-1, 0),  # causal
        enable_gqa=keys.shape[1] != heads,
    )
    return mixed.view(rows, length, heads, channels).transpose(1, 2)


def varlen_reference(
    queries: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, _: Tensor, longest: int, __: int, **asked: Any
) -> Tensor:
    """What the kernel computes, [N tokens, H, D], document by document in PyTorch's attention, on any device."""
    assert asked["window_size"] == (-1, 0), "causal"
    mixed = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert 0 < end - start <= longest
        query, key, value = (part[start:end].transpose(0, 1)[None] for part in (queries, keys, values))
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=asked["enable_gqa"])
        mixed.append(found[0].transpose(0, 1))
    return torch.cat(mixed)
