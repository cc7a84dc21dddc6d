"""How often the gate is wrong, on real scores.

`seed_scores.json` holds the nats of 1,000 held-out beginnings of English books (their first 800 characters) under three
models that differ in their seed alone, and the bytes of each.

A seed alone is worth some 0.02 bits per byte to models as small as these (two layers, 200 steps): that is no document's
chance, and taken out here. What is left, document by document, is what the bootstrap has to judge.
"""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.comparison import Gain, decide, measure_gain

SCORES = json.loads((Path(__file__).parent / "seed_scores.json").read_text())
BYTES = np.array(SCORES["bytes"])
NATS = np.array(SCORES["nats"])
DRAWS = 500


def simulate(true_gain: float, documents: int) -> list[Gain]:
    """Draw documents for a pair of models of which the candidate is better by `true_gain`, 500 times."""
    drawn = np.random.default_rng(0)
    pairs = list(combinations(range(len(NATS)), 2))
    gains = []
    for draw in range(DRAWS):
        first, second = pairs[draw % len(pairs)][:: 1 if draw % 2 else -1]
        difference = NATS[second] - NATS[first]
        champion = NATS[first] + difference - BYTES * (difference.sum() / BYTES.sum())  # as good over all documents
        candidate = NATS[first] - true_gain * math.log(2) * BYTES
        chosen = drawn.integers(len(BYTES), size=documents)
        gains.append(
            measure_gain(candidate[chosen], champion[chosen], BYTES[chosen], draws=DRAWS, seed=draw)  # type: ignore[arg-type]
        )
    return gains


@pytest.mark.parametrize("documents", [60, 1000])
def test_an_equal_model_passes_at_most_twice_in_a_hundred(documents):
    passed = sum(decide("better", gain).passes for gain in simulate(0.0, documents))
    assert passed <= 0.02 * DRAWS


def test_a_true_gain_of_a_hundredth_passes_more_than_95_times_in_a_hundred():
    passed = sum(decide("better", gain).passes for gain in simulate(0.01, 1000))
    assert passed > 0.95 * DRAWS


def test_a_true_loss_of_a_hundredth_never_passes_not_worse():
    assert not any(decide("not_worse", gain).passes for gain in simulate(-0.01, 1000))


def test_a_seed_alone_is_worth_more_than_the_least_gain_here():
    """What the interval does not know: it is about documents, not about trainings."""
    for first, second in combinations(range(len(NATS)), 2):
        assert abs(NATS[first].sum() - NATS[second].sum()) / math.log(2) / BYTES.sum() > 0.001
