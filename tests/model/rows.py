"""A micro-batch for tests: what `MicroBatch` asks for, and nothing else."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Rows:
    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None = None
