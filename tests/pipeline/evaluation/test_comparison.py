import math
import random

import numpy as np
import pytest

from pipeline.evaluation.comparison import (
    FEWEST_DOCUMENTS,
    compare_outcomes,
    decide,
    measure_gain,
    tail_of_coin,
)


def documents(count: int, gain: float, seed: int = 0) -> tuple[list[float], list[float], list[int]]:
    """Scores of two models on made-up documents: the candidate saves `gain` bits per byte, give or take."""
    drawn = np.random.default_rng(seed)
    sizes = drawn.lognormal(8, 1, count).astype(int) + 50
    champion = drawn.normal(1.5, 0.3, count) * sizes * math.log(2)
    candidate = champion - drawn.normal(gain, 0.03, count) * sizes * math.log(2)
    return candidate.tolist(), champion.tolist(), sizes.tolist()


def test_the_gain_is_of_all_bits_by_all_bytes():
    gain = measure_gain([10.0, 40.0], [20.0, 80.0], [10, 100])
    assert gain.bits_per_byte == pytest.approx(50 / math.log(2) / 110)
    assert gain.documents == 2


def test_a_clear_gain_passes():
    decision = decide("better", measure_gain(*documents(1000, 0.02)))
    assert decision.passes
    assert decision.reason.startswith("better: +0.0")


def test_the_interval_holds_the_truth_as_often_as_it_says():
    gains = [measure_gain(*documents(500, 0.02, seed), draws=500) for seed in range(200)]
    assert 0.90 <= sum(gain.low < 0.02 < gain.high for gain in gains) / 200 <= 0.99


def test_swapped_models_give_the_opposite():
    candidate, champion, sizes = documents(1000, 0.02)
    gain = measure_gain(champion, candidate, sizes)
    assert gain.bits_per_byte == pytest.approx(-measure_gain(candidate, champion, sizes).bits_per_byte)
    for gate in ("better", "not_worse"):
        decision = decide(gate, gain)
        assert not decision.passes
        assert decision.reason.startswith("worse: -0.0")


def test_the_same_model_is_no_better_and_not_worse():
    _, champion, sizes = documents(200, 0.0)
    gain = measure_gain(champion, champion, sizes)
    assert gain.bits_per_byte == gain.low == gain.high == 0
    assert not decide("better", gain).passes
    assert decide("not_worse", gain).passes


def test_a_gain_that_is_sure_but_small_is_none():
    candidate, champion, sizes = documents(1000, 0.0)
    candidate = [nats - 0.0005 * size * math.log(2) for nats, size in zip(champion, sizes, strict=True)]
    gain = measure_gain(candidate, champion, sizes)
    assert gain.p_not_better < 0.01
    assert decide("better", gain).reason.startswith("no gain of 0.001 or more")
    assert decide("better", gain, least_gain=0.0001).passes
    assert decide("not_worse", gain).passes


def test_a_loss_that_is_sure_but_small_is_not_worse():
    candidate, champion, sizes = documents(1000, 0.0)
    candidate = [nats + 0.0005 * size * math.log(2) for nats, size in zip(champion, sizes, strict=True)]
    assert decide("not_worse", measure_gain(candidate, champion, sizes)).passes


def test_too_few_documents_are_said_to_be():
    for gate in ("better", "not_worse"):
        decision = decide(gate, measure_gain(*documents(FEWEST_DOCUMENTS - 1, 0.5)))
        assert not decision.passes
        assert decision.undecided
        assert decision.reason.startswith("too few documents for a decision: 49 held out, 50 are the fewest")


def test_a_gain_that_its_documents_cannot_show_says_how_many_would():
    candidate, champion, sizes = documents(60, 0.0, seed=3)
    shifted = [nats - 0.006 * size * math.log(2) for nats, size in zip(candidate, sizes, strict=True)]
    gain = measure_gain(shifted, champion, sizes)
    assert gain.p_not_better >= 0.01, "the test needs a gain that is not shown"
    assert gain.bits_per_byte > 0.001, "and one that is large enough"
    decision = decide("better", gain)
    assert decision.undecided
    assert "too few documents for a decision" in decision.reason
    assert "would show such a gain" in decision.reason


def test_mcnemars_test_counts_only_what_differs():
    both_right, both_wrong = [True] * 50, [False] * 30
    change = compare_outcomes(
        "mine", both_right + both_wrong + [True] + [False] * 9, [*both_right, *both_wrong] + [False] + [True] * 9
    )
    assert (change.n, change.wins, change.losses) == (90, 1, 9)
    assert change.p_worse == pytest.approx(11 / 1024)  # of 10 throws, 9 or 10
    assert change.difference == pytest.approx(-8 / 90)


@pytest.mark.parametrize("throws", [0, 1, 7, 300])
def test_the_tail_of_a_coin_is_exact(throws):
    heads = throws // 2 + 1 if throws else 0
    exact = sum(math.comb(throws, shown) for shown in range(heads, throws + 1)) / 2**throws
    assert tail_of_coin(heads, throws) == pytest.approx(exact)
    assert tail_of_coin(0, throws) == pytest.approx(1)


def test_a_task_that_got_worse_stops_a_better_model():
    gain = measure_gain(*documents(1000, 0.02))
    drawn = random.Random(0)
    champion = [drawn.random() < 0.7 for _ in range(1000)]
    worse = [right and drawn.random() < 0.9 for right in champion]
    for gate in ("better", "not_worse"):
        decision = decide(gate, gain, [compare_outcomes("blimp", worse, champion)])
        assert not decision.passes
        assert decision.reason.startswith("worse at blimp -")
    assert decide("better", gain, [compare_outcomes("blimp", champion, champion)]).passes
