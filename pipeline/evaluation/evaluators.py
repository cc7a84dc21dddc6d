"""How an item of each shape is scored, and which metrics come of it, as lm-eval defines them.

EVALUATORS is the table: a new evaluator is one entry. An item is a context and the endings that may follow it; a
model says how likely each is (`answers.py`), and a metric is made of what it said (`summarise`).

Every metric is one quotient over all items, sum of amounts by sum of weights, shown as it is or through a function.
So each has a standard error: of the quotient, by its residuals, and through the function by its slope. Where every
weight is 1 it is lm-eval's: the sample's standard deviation by the root of n.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Item:
    """One question of a task."""

    endings: tuple[str, ...]  # as they follow the context, white space included
    context: str = ""
    gold: int = 0  # which ending is right
    counted: tuple[str, ...] = ()  # the endings as their characters, bytes and words are counted; empty: as they are
    group: str = ""  # what accuracies are also given by

    def texts(self) -> tuple[str, ...]:
        return self.counted or self.endings


@dataclass(frozen=True)
class ItemAnswer:
    """What a model said to one item: each ending's log-probability, and whether greedy decoding would say it."""

    nats: tuple[float, ...]
    greedy: tuple[bool, ...]


Term = tuple[float, float]  # an item's amount and its weight


@dataclass(frozen=True)
class Metric:
    """One figure of a task: a quotient over all items, and how it is shown."""

    term: Callable[[Item, ItemAnswer], Term]
    is_exponential: bool = False  # a perplexity
    higher_is_better: bool = True


@dataclass(frozen=True)
class Evaluator:
    """One shape of items: the columns that say it, how a row becomes an item, and the metrics, the headline first."""

    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Item]
    metrics: Mapping[str, Metric]
    chance: Callable[[Item], float] = field(default=lambda item: 1 / len(item.endings))

    @property
    def headline(self) -> str:
        return next(iter(self.metrics))


@dataclass(frozen=True)
class Figure:
    """A metric of a task, with what says how much it may be trusted."""

    value: float
    standard_error: float
    n: int


def is_correct(item: Item, answer: ItemAnswer, lengths: Sequence[float] | None = None) -> bool:
    """Whether the right ending is the likeliest, by its length if lengths are given; of equals the first is taken."""
    shown = np.array(answer.nats) if lengths is None else np.array(answer.nats) / np.array(lengths)
    return int(np.argmax(shown)) == item.gold


def _accuracy(item: Item, answer: ItemAnswer) -> Term:
    return float(is_correct(item, answer)), 1.0


def _accuracy_by_characters(item: Item, answer: ItemAnswer) -> Term:
    return float(is_correct(item, answer, [len(text) for text in item.texts()])), 1.0


def _accuracy_by_bytes(item: Item, answer: ItemAnswer) -> Term:
    return float(is_correct(item, answer, [len(text.encode()) for text in item.texts()])), 1.0


def _greedy(item: Item, answer: ItemAnswer) -> Term:
    return float(answer.greedy[item.gold]), 1.0


def _nats(item: Item, answer: ItemAnswer) -> Term:
    return -answer.nats[item.gold], 1.0


def _nats_per_word(item: Item, answer: ItemAnswer) -> Term:
    return -answer.nats[item.gold], float(len(re.split(r"\s+", item.texts()[item.gold])))


def _nats_per_byte(item: Item, answer: ItemAnswer) -> Term:
    return -answer.nats[item.gold], float(len(item.texts()[item.gold].encode()))


def _bits_per_byte(item: Item, answer: ItemAnswer) -> Term:
    nats, num_bytes = _nats_per_byte(item, answer)
    return nats / math.log(2), num_bytes


BITS_PER_BYTE = Metric(_bits_per_byte, higher_is_better=False)
SPACE = " "  # lm-eval puts it before every choice, also where nothing stands before it


def _read_pair(row: Mapping[str, Any]) -> Item:
    pair = (str(row["good"]), str(row["bad"]))
    return Item((SPACE + pair[0], SPACE + pair[1]), counted=pair, group=str(row.get("group", "")))


def _read_choices(row: Mapping[str, Any]) -> Item:
    choices = tuple(map(str, row["choices"]))
    gold = int(row["gold"])
    if not 0 <= gold < len(choices) or len(choices) < 2:
        raise ValueError(f"gold is {gold}, with {len(choices)} choices")
    endings = tuple(SPACE + choice for choice in choices)
    return Item(endings, str(row["context"]), gold, choices, str(row.get("group", "")))


def _read_continuation(row: Mapping[str, Any]) -> Item:
    return Item((str(row["target"]),), str(row["context"]))


def _read_document(row: Mapping[str, Any]) -> Item:
    return Item((str(row["text"]),), counted=(str(row.get("counted", row["text"])),))


CHOSEN = {
    "acc": Metric(_accuracy),
    "acc_norm": Metric(_accuracy_by_characters),
    "acc_bytes": Metric(_accuracy_by_bytes),
    "bits_per_byte": BITS_PER_BYTE,
}
EVALUATORS = {
    # Two sentences; the good one should be the likelier.
    "pair": Evaluator(("good", "bad"), _read_pair, CHOSEN),
    # A question and some answers; the right one should be the likeliest.
    "choices": Evaluator(("context", "choices", "gold"), _read_choices, CHOSEN),
    # A text, and how it goes on, as it stands there: what greedy decoding says should be that.
    "continuation": Evaluator(
        ("context", "target"),
        _read_continuation,
        {
            "acc": Metric(_greedy),
            "perplexity": Metric(_nats, is_exponential=True, higher_is_better=False),
            "bits_per_byte": BITS_PER_BYTE,
        },
        chance=lambda item: 0.0,
    ),
    # A whole document from its beginning, in windows where it is longer than the context.
    "document": Evaluator(
        ("text",),
        _read_document,
        {
            "bits_per_byte": BITS_PER_BYTE,
            "byte_perplexity": Metric(_nats_per_byte, is_exponential=True, higher_is_better=False),
            "word_perplexity": Metric(_nats_per_word, is_exponential=True, higher_is_better=False),
        },
        chance=lambda item: math.nan,
    ),
}


def summarise(shape: str, items: Sequence[Item], answers: Sequence[ItemAnswer]) -> dict[str, Figure]:
    """Return every metric of a shape with its standard error; NaN where one item leaves none."""
    figures = {}
    for name, metric in EVALUATORS[shape].metrics.items():
        amounts, weights = np.array(
            [metric.term(item, said) for item, said in zip(items, answers, strict=True)], dtype=float
        ).T
        value, error = divide(amounts, weights)
        if metric.is_exponential:
            value = math.exp(min(value, 700.0))
            error *= value
        figures[name] = Figure(value, error, len(items))
    return figures


def divide(amounts: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Sum of amounts by sum of weights, and the standard error of that."""
    n, total = len(amounts), weights.sum()
    value = amounts.sum() / total
    if n < 2:
        return float(value), math.nan
    residuals = amounts - value * weights
    return float(value), float(math.sqrt(n / (n - 1) * (residuals**2).sum()) / total)


def accuracies_by_group(items: Sequence[Item], answers: Sequence[ItemAnswer]) -> dict[str, float]:
    """Return the share of right answers in each group; empty where items have none."""
    groups: dict[str, list[bool]] = {}
    for item, said in zip(items, answers, strict=True):
        if item.group:
            groups.setdefault(item.group, []).append(is_correct(item, said))
    return {group: sum(correct) / len(correct) for group, correct in sorted(groups.items())}


def chance_of(shape: str, items: Sequence[Item]) -> float:
    """Return what guessing would score in the headline metric; NaN where there is no guessing."""
    return float(np.mean([EVALUATORS[shape].chance(item) for item in items]))


def headline_outcomes(shape: str, items: Sequence[Item], answers: Sequence[ItemAnswer]) -> list[bool] | None:
    """Return for each item whether it was answered right; None where the headline is not a matter of right or wrong."""
    if EVALUATORS[shape].headline != "acc":
        return None
    metric = EVALUATORS[shape].metrics["acc"]
    return [metric.term(item, said)[0] == 1.0 for item, said in zip(items, answers, strict=True)]
