"""Whether one model is better than another: both scored on the same documents, both asked the same questions.

    gain = measure_gain(candidate_nats, champion_nats, num_bytes)      # paired bootstrap over documents
    change = compare_outcomes("blimp", candidate_right, champion_right)  # McNemar's test
    decision = decide("better", gain, [change], least_gain=0.001)
    decision.passes, decision.reason

Documents differ far more from each other than two models do on one of them, so figures are compared document by
document: what is resampled is the difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.01  # one-sided: how often a gate may be wrong
# Percentiles of a resampled mean are too narrow where it has few terms, and one document may decide.
FEWEST_DOCUMENTS = 50
DRAWS = 4000
NORMAL_99, NORMAL_95 = 2.326, 1.645  # quantiles of the normal distribution, one-sided


@dataclass(frozen=True)
class Gain:
    """By how many bits per byte the candidate needs less than the champion, over some documents."""

    bits_per_byte: float  # positive: the candidate is better
    low: float  # 95 % interval
    high: float
    p_not_better: float  # how often as much came of a resampling of documents that shows no gain
    p_not_worse: float
    standard_error: float
    documents: int

    def __str__(self) -> str:
        return f"{self.bits_per_byte:+.4f} bits per byte (95 % interval {self.low:+.4f} to {self.high:+.4f})"


@dataclass(frozen=True)
class Change:
    """How the candidate's right answers to a task differ from the champion's."""

    task: str
    n: int
    wins: int  # items that the candidate alone answered right
    losses: int  # items that the champion alone answered right
    p_worse: float  # one-sided, McNemar's exact test: so many losses, or more, among those that differ

    @property
    def difference(self) -> float:
        return (self.wins - self.losses) / self.n

    @property
    def standard_error(self) -> float:
        differing = self.wins + self.losses
        return math.sqrt(max(differing - (self.wins - self.losses) ** 2 / self.n, 0.0)) / self.n

    def __str__(self) -> str:
        return f"{self.task} {100 * self.difference:+.1f} ± {196 * self.standard_error:.1f} points"


@dataclass(frozen=True)
class Decision:
    """Whether a candidate may take the champion's place, and why, in one sentence."""

    passes: bool
    reason: str
    undecided: bool = False  # neither better nor worse was shown


def measure_gain(
    candidate_nats: Sequence[float],
    champion_nats: Sequence[float],
    num_bytes: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Gain:
    """Resample documents with replacement; each draw's gain is of all its bits by all its bytes.

    The three sequences have one entry for each document, the same one in each.
    """
    assert len(candidate_nats) == len(champion_nats) == len(num_bytes) > 0
    saved = (np.array(champion_nats) - np.array(candidate_nats)) / math.log(2)
    sizes = np.array(num_bytes, dtype=float)
    random = np.random.default_rng(seed)
    drawn: list[np.ndarray] = []
    for start in range(0, draws, 250):  # a few megabytes at a time
        chosen = random.integers(len(saved), size=(min(250, draws - start), len(saved)))
        drawn.append(saved[chosen].sum(axis=1) / sizes[chosen].sum(axis=1))
    gains = np.concatenate(drawn)
    low, high = np.quantile(gains, (0.025, 0.975))
    return Gain(
        bits_per_byte=float(saved.sum() / sizes.sum()),
        low=float(low),
        high=float(high),
        p_not_better=float((1 + (gains <= 0).sum()) / (draws + 1)),
        p_not_worse=float((1 + (gains >= 0).sum()) / (draws + 1)),
        standard_error=float(gains.std()),
        documents=len(saved),
    )


def compare_outcomes(task: str, candidate: Sequence[bool], champion: Sequence[bool]) -> Change:
    """Count the items on which two models differ, and how likely so many losses are by chance."""
    assert len(candidate) == len(champion) > 0
    ours, theirs = np.array(candidate, dtype=bool), np.array(champion, dtype=bool)
    wins, losses = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    return Change(task, len(ours), wins, losses, tail_of_coin(losses, wins + losses))


def tail_of_coin(heads: int, throws: int) -> float:
    """Return the probability that a fair coin shows at least `heads` heads in `throws`."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, throws + 1)))])  # of factorials
    shown = np.arange(heads, throws + 1)
    terms = logs[throws] - logs[shown] - logs[throws - shown] - throws * math.log(2)
    return float(min(1.0, np.exp(terms).sum()))


def decide(gate: str, gain: Gain, changes: Sequence[Change] = (), *, least_gain: float = 0.001) -> Decision:
    """Apply a gate.

    `better`: the gain is at least `least_gain` and shown (one-sided p < 0.01), and no task is shown to be worse.
    `not_worse`: neither a loss of `least_gain` nor a worse task is shown.
    """
    accepts_equal = gate == "not_worse"
    where = f"{gain} over {gain.documents:,} documents"
    if gain.documents < FEWEST_DOCUMENTS:
        return Decision(
            False,
            f"too few documents for a decision: {gain.documents:,} held out, {FEWEST_DOCUMENTS} are the fewest"
            f" ({gain}); raise prepare.validation_fraction",
            undecided=True,
        )
    worse = [change for change in changes if change.p_worse < LEVEL]
    if worse:
        told = "; ".join(f"{change}, p = {change.p_worse:.2g}" for change in worse)
        return Decision(False, f"worse at {told} ({where})")
    if gain.p_not_worse < LEVEL and gain.bits_per_byte <= -least_gain:
        return Decision(False, f"worse: {where}")
    if gain.p_not_better < LEVEL and gain.bits_per_byte >= least_gain:
        return Decision(True, f"better: {where}")
    if gain.p_not_better < LEVEL:
        reason = f"no gain of {least_gain:g} or more: {where}"
        return Decision(accepts_equal, f"not worse: {where}" if accepts_equal else reason)
    reason = f"no gain is shown: {where}"
    if gain.bits_per_byte >= least_gain:
        needed = gain.documents * ((NORMAL_99 + NORMAL_95) * gain.standard_error / gain.bits_per_byte) ** 2
        reason = (
            f"too few documents for a decision: {where}; about {math.ceil(needed / 100) * 100:,} would show such a gain"
        )
    if accepts_equal:
        return Decision(True, f"not shown to be worse: {where}", undecided=True)
    return Decision(False, reason, undecided=True)
