"""Points that Optuna suggests, each from what the ones before came to; the extra `search` installs it.

Which points there were stands in `suggested.json`, so that a search that goes on tells Optuna of all of them.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from pipeline.artifacts import Artifact
from pipeline.config import Config
from pipeline.search.space import Choices, Dimension, Point, parse_space
from pipeline.search.trial import Attempt, Record, Trial
from pipeline.search.tuning import Budget, check_ends, count_places, forget_tune, make_run_config, run_trials

FILE = "suggested.json"


@dataclass(frozen=True)
class Suggested:
    """Trials as Optuna names them: a value for the number of each dimension."""

    dimensions: tuple[Dimension, ...]
    make: Callable[[Point], Trial]

    def find(self, asked: Mapping[str, Any]) -> Trial:
        point: Point = {}
        for number, dimension in enumerate(self.dimensions):
            value = asked[str(number)]
            if isinstance(dimension, Choices):
                point |= dict(zip(dimension.keys, dimension.values[value], strict=True))
            else:
                point[dimension.key] = dimension.write(value)
        return self.make(point)

    def space(self) -> dict[str, Any]:
        """The space as Tune writes it; of choices Optuna sees the places, which have no order."""
        return {str(number): _domain(dimension) for number, dimension in enumerate(self.dimensions)}

    def name(self, point: Point) -> dict[str, Any]:
        """A point as Optuna names it."""
        named: dict[str, Any] = {}
        for number, dimension in enumerate(self.dimensions):
            if isinstance(dimension, Choices):
                named[str(number)] = dimension.values.index(tuple(point[key] for key in dimension.keys))
            else:
                value = float(point[dimension.key])  # rounded when it was written: perhaps beyond a bound
                named[str(number)] = min(max(value, dimension.low), dimension.high)
        return named


def _domain(dimension: Dimension) -> Any:
    if isinstance(dimension, Choices):
        return tune.choice(list(range(len(dimension.values))))
    return (tune.loguniform if dimension.is_log else tune.uniform)(dimension.low, dimension.high)


def check_optuna() -> None:
    """Raise `ValueError` where it is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("search.algorithm=optuna needs Optuna: pip install -e '.[search]'.")


def run_suggested(
    config: Config,
    preset: Trial,
    make: Callable[[Point], Trial],
    *,
    scheduler: Callable[[], TrialScheduler | None],
) -> tuple[list[Trial], list[Record]]:
    """Run the preset, what was suggested before, and as many further points as `search.trials` says."""
    from ray.tune.search.optuna import OptunaSearch

    search, finder = preset.search, Suggested(tuple(parse_space(config.search.space)), make)
    points = read_points(search)
    trials = [preset, *map(make, points)]
    records = run_trials("trial", trials, scheduler=scheduler(), may_end_early=True)
    left = config.search.trials - len(points)
    budget = Budget(config.search, trials)
    if left > 0 and not budget.is_spent():
        run_config = make_run_config("trial", search, finder, budget)
        run_config.callbacks.append(Notebook(search, finder))
        results = tune.Tuner(
            tune.with_parameters(Attempt, finder=finder),
            tune_config=tune.TuneConfig(
                metric="bits_per_byte",
                mode="min",
                search_alg=OptunaSearch(
                    space=finder.space(),
                    metric="bits_per_byte",
                    mode="min",
                    # Its first points are random: with the seed alone it would draw those again that it has told.
                    seed=(config.seed + len(points)) % 2**32,
                    points_to_evaluate=[finder.name(point) for point in points] or None,
                    evaluated_rewards=[record.bits_per_byte for record in records[1:]] or None,
                ),
                scheduler=scheduler() or FIFOScheduler(),
                num_samples=left,
                max_concurrent_trials=count_places(config),
                reuse_actors=True,
            ),
            run_config=run_config,
        ).fit()
        forget_tune(search)
        trials = [preset, *map(make, read_points(search))]
        check_ends(trials, results, budget)
    return trials, [trial.read_record() for trial in trials]


def read_points(search: Artifact) -> list[Point]:
    return json.loads(search.read_text(FILE)) if search.exists(FILE) else []


class Notebook(tune.Callback):
    """Writes down each point before its trial begins."""

    def __init__(self, search: Artifact, finder: Suggested) -> None:
        self._search, self._finder = search, finder

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        point, points = dict(self._finder.find(trial.config).point), read_points(self._search)
        if point not in points:
            self._search.write_text(FILE, json.dumps([*points, point]))
