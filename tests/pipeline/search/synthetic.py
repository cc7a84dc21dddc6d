"""Trials without a training: a curve that their settings decide, told evaluation by evaluation."""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.search.trial import DONE, Attempt, Trial


def curve(trial: Trial, share: float) -> float:
    """Bits per byte after a share of the tokens; best at a learning rate of 0.01 and batches of 128."""
    rate, batch = trial.config.optimizer.muon_learning_rate, trial.config.train.batch_tokens
    floor = 2 + 0.1 * math.log2(rate / 0.01) ** 2 + 0.05 * math.log2(batch / 128) ** 2
    return floor + 2 * math.exp(-4 * share) + 0.01 * math.sin(1000 * rate + batch)


class Synthetic(Attempt):
    """As Tune sees a trial, with nothing behind it."""

    def _begin(self, asked: Mapping[str, Any]) -> None:
        self._trial = self._finder.find(asked)
        self._record = self._trial.read_record()
        self._told = 0
        self._training = None

    def step(self) -> dict[str, Any]:
        record, train = self._record, self._trial.config.train
        if not record.is_over and self._told == len(record.points):
            steps = min(train.steps, train.evaluate_every_steps * (self._told + 1))
            record.points.append([steps, steps * train.batch_tokens, curve(self._trial, steps / train.steps)])
            if steps == train.steps:
                record.state = DONE
            self._trial.write_record(record)
        return super().step()
