"""The interval over seeds is wrong as often as it says, and the line through a power of compute finds it."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_ind

from pipeline.search.verdict import fit_scaling, judge


def test_a_gain_has_welchs_interval() -> None:
    preset, other = [2.31, 2.33, 2.35], [2.20, 2.26, 2.23]
    verdict = judge(preset, other)
    theirs = ttest_ind(preset, other, equal_var=False).confidence_interval(0.95)
    assert (verdict.low, verdict.high) == pytest.approx((theirs.low, theirs.high))
    assert verdict.gain == pytest.approx(0.1)
    assert verdict.shows_gain
    assert judge(other, preset).shows_loss
    assert str(verdict).startswith("+0.1000 bits per byte (95 % interval +0.0")


def test_two_comparisons_need_more_than_one() -> None:
    one, two = judge([2.31, 2.33, 2.35], [2.2, 2.26, 2.23]), judge([2.31, 2.33, 2.35], [2.2, 2.26, 2.23], comparisons=2)
    assert two.low < one.low < one.high < two.high


def test_of_equal_settings_few_are_called_better() -> None:
    drawn = np.random.default_rng(0)
    draws = [judge(*drawn.normal(2.3, 0.02, (2, 3))) for _ in range(1000)]
    assert sum(verdict.shows_gain for verdict in draws) <= 35  # 2.5 % on this side, and some chance
    better = [judge(drawn.normal(2.3, 0.01, 3), drawn.normal(2.2, 0.01, 3)) for _ in range(200)]
    assert sum(verdict.shows_gain for verdict in better) > 190


def test_the_same_figures_show_nothing() -> None:
    verdict = judge([2.3, 2.3], [2.3, 2.3])
    assert (verdict.gain, verdict.shows_gain, verdict.shows_loss) == (0.0, False, False)


def test_a_power_of_compute_is_found_and_goes_on() -> None:
    flops = [1e12, 4e12, 1.6e13]
    exact = fit_scaling(flops, [30 * each**-0.08 for each in flops])
    assert exact.exponent == pytest.approx(0.08)
    middle, low, high = exact.predict(1e14)
    assert middle == pytest.approx(30 * 1e14**-0.08)
    assert low == pytest.approx(high, rel=1e-6)


def test_an_interval_holds_as_often_as_it_says() -> None:
    drawn, flops, held = np.random.default_rng(1), np.array([1e12, 3e12, 9e12, 2.7e13]), 0
    for _ in range(500):
        bits = 30 * flops**-0.08 * np.exp(drawn.normal(0, 0.01, 4))
        _, low, high = fit_scaling(flops.tolist(), bits.tolist()).predict(1e14)
        held += low <= 30 * 1e14**-0.08 * math.exp(drawn.normal(0, 0.01)) <= high
    assert 460 <= held <= 490


def test_two_points_leave_the_doubt_unsaid() -> None:
    middle, low, high = fit_scaling([1e12, 1e13], [3.0, 2.5]).predict(1e14)
    assert middle == pytest.approx(2.5 * 2.5 / 3.0)
    assert (low, high) == (0.0, math.inf)
