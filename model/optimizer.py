"""Optimizers."""

from dataclasses import dataclass

from model.settings import require, setting


@dataclass(frozen=True)
class OptimizerConfig:
    kind: str = setting("muon", "muon (2-D block weights, AdamW for the rest) or adamw (all weights)")

    def __post_init__(self) -> None:
        require(self.kind in ("muon", "adamw"), f"optimizer.kind is {self.kind!r}; it can be muon or adamw.")
