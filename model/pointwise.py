"""What a block computes between its matrix products, and so waits for memory: norms, residuals and SwiGLU.

    normalised = passes.normalise(x, weight, epsilon)                     # [..., C]
    total, normalised = passes.add_and_normalise(x, added, weight, epsilon)
    inner = passes.gate(gate_up)                                          # [..., 2 I] to [..., I]

PyTorch's own are here; `torch.compile` fuses them with their neighbours. `liger.py` has another library's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PointwisePasses:
    normalise: Callable[[Tensor, Tensor, float], Tensor]
    add_and_normalise: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    gate: Callable[[Tensor], Tensor]


def normalise(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm in float32, as transformers has it; returns the precision of its input."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), epsilon).to(x.dtype)


def add_and_normalise(x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x + added, which the block goes on with, and its RMSNorm."""
    total = x + added
    return total, normalise(total, weight, epsilon)


def gate(gate_up: Tensor) -> Tensor:
    """SwiGLU's product: silu of the first half of the channels, times the second half."""
    first, second = gate_up.chunk(2, dim=-1)
    return F.silu(first) * second


TORCH_PASSES = PointwisePasses(normalise, add_and_normalise, gate)
