"""What is true of a search: the gain over the preset with fresh seeds, and what compute would predict.

    verdict = judge(preset=[2.31, 2.33, 2.32], best=[2.25, 2.28, 2.26], level=0.95)
    verdict.gain, verdict.low, verdict.high, verdict.shows_gain

The best of many trials looks better than it is: it was chosen for its luck too. So it is trained again with seeds that
chose nothing, and so is the preset; their difference is judged by Welch's interval over seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95


@dataclass(frozen=True)
class Verdict:
    """By how many bits per byte one setting needs less than the preset, over trainings with other seeds."""

    gain: float  # positive: better than the preset
    low: float
    high: float
    seed_deviation: float  # of trainings that differ in their seed alone, both settings together

    @property
    def shows_gain(self) -> bool:
        return self.low > 0

    @property
    def shows_loss(self) -> bool:
        return self.high < 0

    def __str__(self) -> str:
        return f"{self.gain:+.4f} bits per byte (95 % interval {self.low:+.4f} to {self.high:+.4f})"


def judge(preset: Sequence[float], other: Sequence[float], *, comparisons: int = 1) -> Verdict:
    """Compare bits per byte of two settings, each trained with two or more seeds.

    With several comparisons against one preset the intervals hold together (Bonferroni).
    """
    first, second = np.array(preset, dtype=float), np.array(other, dtype=float)
    assert len(first) > 1
    assert len(second) > 1
    gain = float(first.mean() - second.mean())
    parts = [first.var(ddof=1) / len(first), second.var(ddof=1) / len(second)]
    pooled = math.sqrt(
        ((len(first) - 1) * first.var(ddof=1) + (len(second) - 1) * second.var(ddof=1)) / (len(first) + len(second) - 2)
    )
    error = math.sqrt(sum(parts))
    if error == 0:
        return Verdict(gain, gain, gain, pooled)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(first) - 1) + parts[1] ** 2 / (len(second) - 1))
    reach = float(student.ppf(1 - (1 - LEVEL) / (2 * comparisons), freedom)) * error
    return Verdict(gain, gain - reach, gain + reach, pooled)


@dataclass(frozen=True)
class Scaling:
    """Bits per byte as a power of compute: bits = scale x FLOPs^-exponent."""

    scale: float
    exponent: float
    residual: float  # of the logarithms, about the line
    points: int
    mean_log: float
    spread_log: float  # sum of squares of the logarithms of compute about their mean

    def predict(self, flops: float) -> tuple[float, float, float]:
        """Return what is expected at some compute, and its 95 % interval; infinite where two points leave no doubt."""
        middle = self.scale * flops**-self.exponent
        if self.points < 3:
            return middle, 0.0, math.inf
        far = (math.log(flops) - self.mean_log) ** 2 / self.spread_log
        error = self.residual * math.sqrt(1 + 1 / self.points + far)
        factor = math.exp(float(student.ppf((1 + LEVEL) / 2, self.points - 2)) * error)
        return middle, middle / factor, middle * factor


def fit_scaling(flops: Sequence[float], bits: Sequence[float]) -> Scaling:
    """Fit a straight line through the logarithms of compute and of bits per byte."""
    assert len(flops) == len(bits) > 1
    x, y = np.log(np.array(flops, dtype=float)), np.log(np.array(bits, dtype=float))
    slope, level = np.polyfit(x, y, 1)
    rest = y - (level + slope * x)
    residual = math.sqrt(float((rest**2).sum()) / (len(x) - 2)) if len(x) > 2 else 0.0
    spread = float(((x - x.mean()) ** 2).sum())
    return Scaling(math.exp(float(level)), -float(slope), residual, len(x), float(x.mean()), spread)
