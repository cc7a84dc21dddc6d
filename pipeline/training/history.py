"""What a training has been through: a checkpoint carries it beside weights and optimizer, as `progress.json`."""

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.training.loss_plot import draw_loss

FILE = "progress.json"


@dataclass
class History:
    """Where a training is and how it got there, over all restarts; plain values."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    best_step: int = 0
    best_bits_per_byte: float = math.inf
    training: list[list[float]] = field(default_factory=list)  # points of (step, nats per token)
    validation: list[list[float]] = field(default_factory=list)  # points of (step, nats per token, bits per byte)
    base: list[list[float]] = field(default_factory=list)  # points of (step, bits per byte of the base's text)
    seconds: dict[str, float] = field(default_factory=dict)  # wall clock by activity
    saved: float = 0.0  # Unix time
    restarts: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    precision: str = ""  # in which products are computed, on whatever machine the training goes on
    unsent: list[dict[str, Any]] = field(default_factory=list)  # what MLflow had not taken yet

    @classmethod
    def load(cls, folder: Path) -> "History":
        return cls(**json.loads((folder / FILE).read_text()))

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)))

    def copy(self) -> "History":
        return History(**json.loads(json.dumps(asdict(self))))

    def draw(self, name: str) -> bytes:
        return draw_loss(self.training, self.validation, self.base, title=f"{name}, step {self.step:,}")

    def note_score(self, nats_per_token: float, bits_per_byte: float) -> None:
        """Add an evaluation; all ranks do, since all must know which checkpoint is the best."""
        self.validation.append([self.step, nats_per_token, bits_per_byte])
        if self.step > 0 and bits_per_byte < self.best_bits_per_byte:
            self.best_bits_per_byte, self.best_step = bits_per_byte, self.step

    def note_base(self, bits_per_byte: float) -> float:
        """Add what the base's text costs now; return by how much more that is than at first."""
        self.base.append([self.step, bits_per_byte])
        return bits_per_byte - self.base[0][1]

    def skipped_in_a_row(self) -> int:
        """How many steps up to the last skipped one were skipped without one between them that was not."""
        count = 0
        for step in reversed(self.skipped_steps):
            if step != self.skipped_steps[-1] - count:
                break
            count += 1
        return count

    def note_restart(self, workers: int, why: str) -> None:
        """Keep a record of going on from this checkpoint, and of what ended the work before."""
        self.restarts.append({"step": self.step, "workers": workers, "time": round(time.time()), "why": why})
