"""Ray Tune over trials: who comes next, who is stopped early, when the budget is spent, and what is seen of it."""

import math
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipeline.artifacts import Artifact
from pipeline.config import Config, SearchConfig
from pipeline.search.space import describe_point
from pipeline.search.trial import FAILED, RUNNING, STOPPED, Attempt, Finder, Listed, Record, Trial
from pipeline.training.resources import wants_gpu, worker_resources

MOST_FAILURES = 3  # of a trial's actor or its node, after which the search gives it up until the next start
ALSO_NEXT_TIME = re.compile("The loss of step|Out of memory")  # failures that are the point's own
SPENT = "the budget was spent"


def run_trials(
    phase: str, trials: Sequence[Trial], *, scheduler: TrialScheduler | None = None, may_end_early: bool = False
) -> list[Record]:
    """Run the trials that are not over, and return every record in order.

    With a scheduler all are told to it again, so that it knows what those that are over came to. `may_end_early`
    bounds them by the search's budget.
    Raises `ValueError` where one could not be brought to its end, and `KeyboardInterrupt` after Ctrl-C.
    """
    config = trials[0].config
    forget_failures(trials)
    records = [trial.read_record() for trial in trials]
    told: dict[str, Trial] = {}  # two of the same training, such as the preset and a rung, are one
    for trial, record in zip(trials, records, strict=True):
        if scheduler is not None or not record.is_over:
            told.setdefault(trial.output.fingerprint, trial)
    if not all(record.is_over for record in records):
        budget = Budget(config.search, trials) if may_end_early else None
        results = tune.Tuner(
            tune.with_parameters(Attempt, finder=Listed(tuple(trials))),
            param_space={"number": tune.grid_search([trial.number for trial in told.values()])},
            tune_config=tune.TuneConfig(
                metric="bits_per_byte",
                mode="min",
                scheduler=scheduler or FIFOScheduler(),
                max_concurrent_trials=count_places(config),
                reuse_actors=True,
            ),
            run_config=make_run_config(phase, trials[0].search, Listed(tuple(trials)), budget),
        ).fit()
        forget_tune(trials[0].search)
        check_ends(trials, results, budget)
    return [trial.read_record() for trial in trials]


def make_run_config(phase: str, search: Artifact, finder: Finder, budget: "Budget | None") -> Any:
    return tune.RunConfig(
        name=f"{phase}-{secrets.token_hex(4)}",
        storage_path=f"{search.url}/tune",  # where every node may write
        verbose=0,
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trainings write their own
        failure_config=tune.FailureConfig(max_failures=MOST_FAILURES),
        stop=budget,
        callbacks=[Follow(phase, finder)],
    )


def check_ends(trials: Sequence[Trial], results: Any, budget: "Budget | None") -> None:
    """Close what the budget ended; raise where something else ended a trial."""
    errors = [str(error).strip().splitlines()[-1] for error in results.errors]
    for trial in trials:
        record = trial.read_record()
        if record.is_over:
            continue
        if errors:
            raise ValueError(f"{len(errors)} trials ended without a result ({errors[0]}). The same command goes on.")
        if budget is None or not budget.is_spent():
            raise KeyboardInterrupt  # Tune ends quietly on Ctrl-C
        record.state, record.reason = STOPPED, SPENT
        trial.write_record(record)


def forget_failures(trials: Sequence[Trial]) -> None:
    """Let trials try again that failed by what somebody may have mended: a full disk, a missing right."""
    for trial in trials:
        record = trial.read_record()
        if record.state == FAILED and not ALSO_NEXT_TIME.match(record.reason):
            trial.write_record(Record(point=record.point, points=record.points))


def forget_tune(search: Artifact) -> None:
    """Remove Tune's own notes: the records say all that goes on from here."""
    if search.filesystem.exists(search.file("tune")):
        search.filesystem.rm(search.file("tune"), recursive=True)


def count_places(config: Config) -> int:
    """How many trials' workers find room on the cluster at once."""
    if config.search.concurrent:
        return config.search.concurrent
    needed = worker_resources(config.train, wants_gpu(config.train))
    there = ray.cluster_resources()
    places = [there.get(kind, 0.0) // (amount * config.train.most_workers) for kind, amount in needed.items() if amount]
    return max(1, int(min(places, default=1.0)))


def make_scheduler(config: Config, trial_tokens: int) -> TrialScheduler | None:
    """ASHA by tokens, its rungs at evaluations; None where each trial shall run to its end."""
    if config.search.scheduler == "none":
        return None
    between = config.train.evaluate_every_steps * config.train.batch_tokens * trial_tokens
    first = max(1, between // (config.train.steps * config.train.batch_tokens))
    return ASHAScheduler(
        time_attr="tokens",
        max_t=max(trial_tokens, first),
        # An evaluation may come some tokens early: a batch does not end where a rung lies.
        grace_period=max(1, math.floor(0.9 * first)),
        reduction_factor=config.search.reduction,
    )


class Budget(tune.Stopper):
    """Ends all trials once they have seen as many tokens together, or after so many minutes.

    Tokens of earlier starts count; minutes are those of this start.
    """

    def __init__(self, options: SearchConfig, trials: Sequence[Trial]) -> None:
        self._most_tokens = options.budget_tokens
        self._ends = time.monotonic() + (60 * options.budget_minutes or math.inf)
        self._spent = {trial.output.fingerprint: trial.read_record().tokens for trial in trials}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        name = result["training"]
        self._spent[name] = max(self._spent.get(name, 0), int(result["tokens"]))
        return False

    def stop_all(self) -> bool:
        return self.is_spent()

    def is_spent(self) -> bool:
        return 0 < self._most_tokens <= sum(self._spent.values()) or time.monotonic() > self._ends


class Follow(tune.Callback):
    """Shows what trials come to, and notes which of them the scheduler stopped."""

    def __init__(self, phase: str, finder: Finder) -> None:
        self._phase, self._finder = phase, finder

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        ours = self._finder.find(trial.config)
        self._say(ours, f"{result['tokens']:,} tokens, {result['bits_per_byte']:.4f} bits per byte")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        ours = self._finder.find(trial.config)
        record = ours.read_record()
        if record.state == RUNNING:
            record.state, record.reason = STOPPED, f"others were better after {record.tokens:,} tokens"
            ours.write_record(record)
        self._say(ours, f"{record.state}{f': {record.reason}' if record.reason else ''}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._say(self._finder.find(trial.config), "its actor or node was lost")

    def _say(self, trial: Trial, words: str) -> None:
        print(f"search    {self._phase} {trial.number} ({describe_point(trial.point)}): {words}", flush=True)
