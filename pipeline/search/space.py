"""What a search tries: the dimensions of its space, the points drawn from it, and the training that each point is.

    train.batch_tokens = 2048 | 4096                         some values
    model.width, model.num_heads = 128,2 | 192,3             some values of several settings that go together
    optimizer.muon_learning_rate = log 0.005 .. 0.08         a range; without `log` drawn evenly

A trial is given tokens, not steps: with a larger batch it takes fewer steps, and is evaluated after as many tokens.
"""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from model.settings import require
from pipeline.config import Config, SearchConfig, kinds_of_settings, with_settings

Point = dict[str, str]  # a setting's dotted key -> its value as a text
SECTIONS = ("model", "optimizer", "stream", "train")  # what a training reads; the shards are the same for all
FOLLOWS = {
    "train.steps": "it follows from search.trial_tokens and train.batch_tokens",
    "train.minutes": "every trial learns from as many tokens",
    "train.evaluate_every_steps": "every trial is evaluated after as many tokens",
    "train.evaluation_tokens": "figures compare where as much is scored",
}
MOST_TRIALS = 10_000


@dataclass(frozen=True)
class Choices:
    """Some values of a setting, or of several that go together."""

    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    def draw(self, drawn: random.Random) -> Point:
        return dict(zip(self.keys, drawn.choice(self.values), strict=True))


@dataclass(frozen=True)
class Range:
    """Every number between two."""

    key: str
    low: float
    high: float
    is_log: bool
    is_whole: bool

    def draw(self, drawn: random.Random) -> Point:
        if self.is_log:
            value = math.exp(drawn.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = drawn.uniform(self.low, self.high)
        return {self.key: self.write(value)}

    def write(self, value: float) -> str:
        return str(round(value)) if self.is_whole else f"{value:.4g}"


Dimension = Choices | Range


def parse_space(entries: Sequence[str]) -> list[Dimension]:
    """Read the dimensions of `search.space`; raises `ValueError` that names the entry and what is wrong with it."""
    found = [_parse_dimension(entry) for entry in entries]
    keys = [key for dimension in found for key in keys_of(dimension)]
    double = next((key for key in keys if keys.count(key) > 1), None)
    require(double is None, f"search.space names {double} twice.")
    return found


def keys_of(dimension: Dimension) -> tuple[str, ...]:
    return dimension.keys if isinstance(dimension, Choices) else (dimension.key,)


def _parse_dimension(entry: str) -> Dimension:
    left, equals, right = entry.partition("=")
    keys = tuple(key.strip() for key in left.split(","))
    require(
        bool(equals) and all(keys) and right.strip(), f"search.space: {entry!r} is none; write key = value | value."
    )
    for key in keys:
        require(key in kinds_of_settings(), f"search.space: there is no setting {key!r}.")
        section = key.partition(".")[0]
        require(section in SECTIONS, f"search.space: {key} is not tried; a trial has its own {', '.join(SECTIONS)}.")
        require(key not in FOLLOWS, f"search.space: {key} is not tried; {FOLLOWS.get(key)}.")
    if ".." in right:
        require(len(keys) == 1, f"search.space: {entry!r} has one range for {len(keys)} settings.")
        return _parse_range(entry, keys[0], right.strip())
    values = tuple(tuple(part.strip() for part in value.split(",")) for value in right.split("|"))
    if len(keys) == 1:
        values = tuple((value.strip(),) for value in right.split("|"))
    require(
        all(len(value) == len(keys) and all(value) for value in values),
        f"search.space: {entry!r} needs {len(keys)} value{'s' * (len(keys) > 1)} between two bars.",
    )
    require(len(set(values)) == len(values), f"search.space: {entry!r} names a value twice.")
    return Choices(keys, values)


def _parse_range(entry: str, key: str, text: str) -> Range:
    words = text.removeprefix("log ").split("..")
    is_log, kind = text.startswith("log "), kinds_of_settings()[key]
    require(kind in (int, float), f"search.space: {key} is no number, and has no range.")
    try:
        low, high = (float(word.replace("_", "")) for word in words)
    except ValueError:
        raise ValueError(f"search.space: {entry!r} is no range; write 0.001 .. 0.1, or log 0.001 .. 0.1.") from None
    require(-math.inf < low < high < math.inf, f"search.space: {entry!r} does not go from a lower to a higher number.")
    require(low > 0 or not is_log, f"search.space: {entry!r} has no logarithm at {low:g}.")
    return Range(key, low, high, is_log, kind is int)


def draw_points(options: SearchConfig, seed: int) -> list[Point]:
    """Return the points to try, each once: the whole grid, or as many as asked for, drawn with the seed."""
    dimensions = parse_space(options.space)
    if not dimensions:
        return []
    if all(isinstance(dimension, Choices) for dimension in dimensions):
        grids = [
            [dict(zip(each.keys, value, strict=True)) for value in each.values]
            for each in dimensions
            if isinstance(each, Choices)
        ]
        size = math.prod(map(len, grids))
        require(size <= MOST_TRIALS, f"search.space has {size:,} points, over {MOST_TRIALS:,}: too many to list.")
        grid = [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*grids)]
        count = options.trials or len(grid)
        return grid if count >= len(grid) else random.Random(seed).sample(grid, count)
    require(options.trials > 0, "search.trials must say how many points to draw: search.space holds a range.")
    drawn = random.Random(seed)
    points: list[Point] = []
    for _ in range(100 * options.trials):
        point = {key: value for each in dimensions for key, value in each.draw(drawn).items()}
        if point not in points:
            points.append(point)
        if len(points) == options.trials:
            break
    return points


def target_tokens(config: Config) -> int:
    """How many tokens the preset itself trains on."""
    return config.train.steps * config.train.batch_tokens


def configure(base: Config, point: Mapping[str, str], *, tokens: int = 0, seed: int | None = None) -> Config:
    """Return the config of one training: a point over the preset, its steps by the tokens it may see.

    With the preset's own settings, tokens and seed this is the preset's own training, and shares its artifact.
    """
    tokens = tokens or target_tokens(base)
    config = with_settings(base, point)
    batch = config.train.batch_tokens
    tokens_between = base.train.evaluate_every_steps * base.train.batch_tokens * tokens / target_tokens(base)
    train = replace(
        config.train,
        run="",  # a folder of its own
        steps=max(1, round(tokens / batch)),
        evaluate_every_steps=max(1, round(tokens_between / batch)),
        keep_checkpoints=1,
    )
    return replace(config, train=train, seed=base.seed if seed is None else seed)


def describe_point(point: Mapping[str, str]) -> str:
    """Write a point in one line, without the sections' names."""
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items()) or "the preset"
