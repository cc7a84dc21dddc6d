"""Ray Tune over trials whose curves are known: what ASHA saves, what a budget ends, and what is never run twice."""

from dataclasses import replace

import pytest

from pipeline.artifacts import Artifact, artifact_at
from pipeline.config import Config
from pipeline.search import tuning
from pipeline.search.space import configure, draw_points, target_tokens
from pipeline.search.trial import DONE, FAILED, RUNNING, STOPPED, Record, Trial
from pipeline.search.tuning import Budget, count_places, forget_failures, make_scheduler, run_trials
from tests.pipeline.search.synthetic import Synthetic, curve
from tests.pipeline.search.tiny_search import search_config

GRID = "[optimizer.muon_learning_rate = 0.0025 | 0.01 | 0.04,train.batch_tokens = 512 | 128 | 256]"


def make_trials(config: Config) -> list[Trial]:
    search = artifact_at(config.storage, "tiny", "search", "s" * 20)
    return [
        Trial(number, point, configure(config, point), {}, Artifact("/nowhere", "train", f"{number:020}"), search)
        for number, point in enumerate(draw_points(config.search, 1))
    ]


@pytest.fixture
def config(storage: str) -> Config:
    return search_config(
        storage, f"search.space={GRID}", "search.scheduler=asha", "search.concurrent=1", "train.evaluate_every_steps=1"
    )


@pytest.mark.slow
def test_asha_finds_the_grids_best_with_three_fifths_of_its_tokens(
    ray_session: None, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "Attempt", Synthetic)
    trials = make_trials(config)
    best = min(trials, key=lambda trial: curve(trial, 1.0))
    records = run_trials("trial", trials, scheduler=make_scheduler(config, target_tokens(config)), may_end_early=True)
    assert {record.state for record in records} == {DONE, STOPPED}
    found = min((record.bits_per_byte, number) for number, record in enumerate(records) if record.state == DONE)
    assert trials[found[1]].point == best.point == {"optimizer.muon_learning_rate": "0.01", "train.batch_tokens": "128"}
    spent = sum(record.tokens for record in records)
    assert spent <= 0.6 * len(trials) * target_tokens(config)
    said = capsys.readouterr().out
    assert "search    trial 1 (muon_learning_rate=0.0025, batch_tokens=128): " in said
    assert "stopped: others were better after " in said
    assert not trials[0].search.exists("tune"), "Tune's own notes are gone"

    # The same training under another number is not run beside itself.
    twin = replace(trials[0], number=99, output=replace(trials[0].output, fingerprint="t" * 20))
    twins = run_trials("trial", [twin, replace(twin, number=98)])
    assert twins[0] == twins[1]
    assert capsys.readouterr().out.count(": done") == 1

    # Once more: nothing runs, and the scheduler's word stands.
    monkeypatch.setattr(tuning, "Attempt", None)
    assert run_trials("trial", trials, scheduler=make_scheduler(config, 1), may_end_early=True) == records

    # Two are half done: a budget ends them there.
    for trial, record in zip(trials[:2], records, strict=False):
        trial.write_record(replace(record, state=RUNNING, points=record.points[:1]))
    monkeypatch.setattr(tuning, "Attempt", Synthetic)
    bounded = replace(config, search=replace(config.search, budget_tokens=100, scheduler="none"))
    pair = [replace(trial, config=replace(trial.config, search=bounded.search)) for trial in trials[:2]]
    ended = run_trials("trial", pair, may_end_early=True)
    assert [record.reason for record in ended] == [tuning.SPENT] * 2


def test_a_budget_counts_what_earlier_starts_spent(config: Config) -> None:
    trials = make_trials(config)[:2]
    trials[0].write_record(Record(points=[[6, 600, 3.0]]))
    budget = Budget(replace(config.search, budget_tokens=1000), trials)
    assert not budget.stop_all()
    budget("x", {"training": trials[0].output.fingerprint, "tokens": 600})  # told again
    assert not budget.stop_all()
    budget("y", {"training": trials[1].output.fingerprint, "tokens": 400})
    assert budget.stop_all()
    assert not Budget(config.search, trials).stop_all()
    assert Budget(replace(config.search, budget_minutes=1e-9), trials).is_spent()


def test_what_somebody_may_have_mended_is_tried_again(config: Config) -> None:
    full, diverged = trials = make_trials(config)[:2]
    full.write_record(Record(FAILED, points=[[6, 600, 3.0]], reason="No space left on the device."))
    diverged.write_record(Record(FAILED, reason="The loss of step 3 is nan"))
    forget_failures(trials)
    assert full.read_record() == Record(RUNNING, points=[[6, 600, 3.0]])
    assert diverged.read_record().state == FAILED


def test_rungs_lie_where_trials_are_evaluated(config: Config) -> None:
    assert make_scheduler(replace(config, search=replace(config.search, scheduler="none")), 3072) is None
    scheduler = make_scheduler(config, 3072)
    [bracket] = scheduler._brackets
    assert [milestone for milestone, _ in bracket._rungs] == [2070, 690, 230]


def test_as_many_trials_run_at_once_as_workers_find_room(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "wants_gpu", lambda options: False)
    monkeypatch.setattr(tuning, "worker_resources", lambda options, use_gpu: {"CPU": 1.0})
    monkeypatch.setattr(tuning.ray, "cluster_resources", lambda: {"CPU": 8.0, "memory": 1e9})
    free = replace(config, search=replace(config.search, concurrent=0))
    for workers, places in ((1, 8), (3, 2), (8, 1)):
        assert count_places(replace(free, train=replace(free.train, num_workers=workers))) == places
    assert count_places(config) == 1
