"""A training step on CPUs: blocks whose matrices are rounded once for all threads that share a batch.

Under autocast every thread rounds each matrix for itself and widens its gradient to float32, before the threads' are
added: with two threads 36 bytes of memory traffic a weight. Here it is 14. The sums are the same bits where nothing is
compiled; else the compiler joins other passes, and the last bits differ.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from model.gpt import GPT

AddGradients = Callable[[Tensor | None, Sequence[Tensor]], Tensor]


class RoundedBlocks:
    """A model's blocks a second time, with copies of their matrices in `precision`; all else is the model's own."""

    def __init__(self, model: GPT, precision: torch.dtype) -> None:
        self.precision = precision
        self._model = model
        self._own = model.blocks
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self.blocks = nn.ModuleList(self._round(block) for block in model.blocks)

    def _round(self, block: nn.Module) -> nn.Module:
        placed = {}
        for weight in block.parameters():
            placed[id(weight)] = weight
            if weight.ndim > 1:
                copy = nn.Parameter(weight.detach().to(self.precision), requires_grad=weight.requires_grad)
                placed[id(weight)] = self._copies[weight] = copy
        return deepcopy(block, placed)

    @contextmanager
    def in_use(self, weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Have the model compute with these blocks as they are now; yields what stands for each of its `weights`."""
        with torch.no_grad():
            for weight, copy in self._copies.items():
                copy.copy_(weight)
        self._model.blocks = self.blocks
        try:
            yield [self._copies.get(weight, weight) for weight in weights]
        finally:
            self._model.blocks = self._own


def add_gradients(total: Tensor | None, parts: Sequence[Tensor]) -> Tensor:
    """Return the sum in float32 of a weight's gradient so far and the threads', always in the same order."""
    for part in parts:
        total = part.float() if total is None else total + part
    assert total is not None
    return total
