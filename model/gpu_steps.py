"""What only GPUs run: a micro-batch's whole work as one CUDA graph, and later versions of flash attention.

    use_flash_attention("3")
    module = parallelize(model, compile=True, graphs=True)

No GPU has run this yet: the graph's way is tested with a recording that simply computes again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.documents import find_documents
from model.gpt import GPT
from model.runner import record_graph

FLASH_VERSIONS = ("2", "3", "4")
Replay = Callable[[], Any]
Record = Callable[[Callable[[], Tensor], torch.device], tuple[Replay, Tensor]]


def use_flash_attention(version: str) -> None:
    """Have PyTorch's attention run this version of flash attention from now on; 2 is its own.

    Raises `ValueError` where this PyTorch does not know it, or its package is not installed.
    """
    if version == "2":
        return
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl(f"FA{version}")
    except Exception as error:  # a missing package, a GPU that it is not for: PyTorch says it in many ways
        raise ValueError(
            f"train.flash_attention={version} cannot be used here ({type(error).__name__}: {error}); install its"
            " package (flash-attn-3 for Hopper, flash-attn-4 for Blackwell), or set it to 2, PyTorch's own."
        ) from None


def record(compute: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
    """Record what `compute` starts on the GPU; returns what starts it again, and its result, written each time."""
    graph, result = record_graph(compute, device)
    return graph.replay, result


@dataclass
class Recorded:
    """One shape of micro-batch: what to fill in, what starts it, and what comes of it."""

    tokens: Tensor
    targets: Tensor
    scale: Tensor
    replay: Replay
    nats: Tensor


class GraphedGradients:
    """Forward and backward pass of a micro-batch, launched at once instead of kernel by kernel.

    A graph reads and writes the same memory every time, so inputs are copied to where it reads, and gradients stay
    where it adds them up. Micro-batches with document boundaries are of any number of documents, and run as usual.
    """

    def __init__(self, model: GPT, loss: Callable[..., Tensor], record: Record = record) -> None:
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.loss = loss
        self.record = record
        self.gradients: list[Tensor] | None = None
        self.recorded: dict[tuple[torch.Size, torch.dtype], Recorded] = {}

    def add(self, batch: Any, scale: float, precision: torch.dtype) -> Tensor:
        """Add the gradients of `scale` x nats of a micro-batch to those of the weights; return the nats."""
        device = self.weights[0].device
        self._place_gradients()
        if batch.document_ids is not None:
            documents = find_documents(batch.document_ids).to(device)
            tokens, targets = (each.to(device, non_blocking=True) for each in (batch.tokens, batch.targets))
            return self._learn(tokens, targets, torch.tensor(scale, device=device), precision, documents)
        key = batch.tokens.shape, precision
        if key not in self.recorded:
            self.recorded[key] = self._record(batch, precision, device)
        found = self.recorded[key]
        found.tokens.copy_(batch.tokens, non_blocking=True)
        found.targets.copy_(batch.targets, non_blocking=True)
        found.scale.fill_(scale)
        found.replay()
        return found.nats.clone()  # the next replay writes over it

    def _record(self, batch: Any, precision: torch.dtype, device: torch.device) -> Recorded:
        tokens, targets = batch.tokens.to(device, copy=True), batch.targets.to(device, copy=True)
        scale = torch.zeros((), device=device)  # what is learnt while recording is nothing
        replay, nats = self.record(lambda: self._learn(tokens, targets, scale, precision), device)
        return Recorded(tokens, targets, scale, replay, nats)

    def _learn(
        self, tokens: Tensor, targets: Tensor, scale: Tensor, precision: torch.dtype, documents: Any = None
    ) -> Tensor:
        is_half = precision != torch.float32
        # Weights cast once and kept would be those of the step that was recorded.
        with torch.autocast(tokens.device.type, dtype=precision, enabled=is_half, cache_enabled=False):
            nats = self.loss(tokens, targets, documents)
        (nats * scale).backward()
        return nats.detach()

    def _place_gradients(self) -> None:
        """Put the gradients' memory back, zeroed, where the optimizer has let go of it."""
        if self.gradients is None:
            self.gradients = [torch.zeros_like(weight) for weight in self.weights]
        fresh = []
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            if weight.grad is not gradient:
                weight.grad = gradient
                fresh.append(gradient)
        if fresh:
            torch._foreach_zero_(fresh)
