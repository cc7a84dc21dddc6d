"""What only GPUs run: a step's work in two CUDA graphs, and later versions of flash attention.

    use_flash_attention("3")
    module = parallelize(model, compile=True, graphs=True)

No GPU has run this yet: the graph's way is tested with a recording that simply computes again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.documents import find_documents
from model.gpt import GPT
from model.optimizer import Optimizer
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


class GraphRecorder:
    """Records what `compute` starts on the GPU; returns what starts it again, and its result, written each time.

    All of its graphs take their memory from one pool: one runs after the other, and nothing that one leaves there is
    read after the next began.
    """

    def __init__(self) -> None:
        self.pool: Any = None  # PyTorch's handle

    def __call__(self, compute: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph, result = record_graph(compute, device, self.pool)
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

    def __init__(self, model: GPT, loss: Callable[..., Tensor], record: Record | None = None) -> None:
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.loss = loss  # of tokens, targets, documents or None, and the precision of products
        self.record = record or GraphRecorder()
        self.memory: Tensor | None = None  # of all gradients, one behind the other
        self.gradients: list[Tensor] = []
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
        nats = self.loss(tokens, targets, documents, precision)
        (nats * scale).backward()
        return nats.detach()

    def _place_gradients(self) -> None:
        """Put the gradients' memory back, zeroed, where the optimizer has let go of it."""
        if self.memory is None:
            sizes = [weight.numel() for weight in self.weights]
            self.memory = self.weights[0].new_zeros(sum(sizes))
            self.gradients = [
                part.view_as(weight) for part, weight in zip(self.memory.split(sizes), self.weights, strict=True)
            ]
        if self.weights[0].grad is not self.gradients[0]:
            for weight, gradient in zip(self.weights, self.gradients, strict=True):
                weight.grad = gradient
            self.memory.zero_()

    def add_up(self, precision: torch.dtype) -> None:
        """Add the gradients of all ranks, which travel in `precision`, all at once: a graph has no hooks for parts."""
        assert self.memory is not None, "gradients are added up after a backward pass"
        sent = self.memory.to(precision)
        dist.all_reduce(sent)
        if sent is not self.memory:
            self.memory.copy_(sent)


class GraphedUpdate:
    """Clipping and the optimizer's step, launched at once; the first is run as usual, which makes the moments."""

    def __init__(self, optimizer: Optimizer, record: Record) -> None:
        self.optimizer = optimizer
        self.record = record
        self.written: list[Tensor] = []
        self.replay: Replay | None = None
        if optimizer.muon is not None:
            optimizer.muon.is_shared = False  # ranks that wait for each other have no place in a graph

    def step(self, step: int, norm: Tensor) -> None:
        """Do what `clip` and `Optimizer.step` do, for gradients of this length, which stay where they were."""
        numbers = self.optimizer.begin(step)
        written = self.optimizer.tensors()
        if len(written) == len(self.optimizer.parameters):  # there are no moments yet
            clip(self.optimizer, norm)
            self.optimizer.update(numbers)
            return
        if [id(each) for each in written] != [id(each) for each in self.written]:  # a resume brings its own
            self._record(written, numbers, norm)
        self.norm.copy_(norm)
        self.numbers.copy_(torch.tensor([*numbers.values()]), non_blocking=True)
        assert self.replay is not None
        self.replay()

    def _record(self, written: list[Tensor], numbers: dict[str, float], norm: Tensor) -> None:
        self.written, self.norm = written, norm.clone()
        self.numbers = torch.zeros(len(numbers), device=norm.device)
        read = dict(zip(numbers, self.numbers.unbind(), strict=True))

        def update() -> Tensor:
            clip(self.optimizer, self.norm)
            self.optimizer.update(read)
            return self.norm

        gradients = [weight.grad for weight in self.optimizer.parameters.values() if weight.grad is not None]
        with torch.no_grad():
            # A recording begins by doing it a few times. What that writes is kept where there is room.
            before = [each.to("cpu", copy=True) for each in written + gradients]
            self.replay, _ = self.record(update, norm.device)
            for each, kept in zip(written + gradients, before, strict=True):
                each.copy_(kept)


def clip(optimizer: Optimizer, norm: Tensor) -> None:
    """Shorten gradients of length `norm` to the optimizer's `clip_norm`, where it has one."""
    if optimizer.config.clip_norm:
        nn.utils.clip_grads_with_norm_(optimizer.parameters.values(), optimizer.config.clip_norm, norm, foreach=True)
