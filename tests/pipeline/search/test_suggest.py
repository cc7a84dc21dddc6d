"""What Optuna is asked and told; with Optuna itself where the extra `search` is installed."""

import hashlib
import json
from dataclasses import dataclass, replace

import pytest

from pipeline.artifacts import Artifact, artifact_at
from pipeline.config import Config
from pipeline.search import suggest, tuning
from pipeline.search.space import Point, configure, parse_space
from pipeline.search.suggest import Suggested, read_points, run_suggested
from pipeline.search.trial import DONE, Trial
from tests.pipeline.search.synthetic import Synthetic
from tests.pipeline.search.tiny_search import search_config

SPACE = (
    "search.space=[optimizer.muon_learning_rate = log 0.001 .. 0.1,train.batch_tokens = 128 | 256 | 512]",
    "search.algorithm=optuna",
    "search.trials=6",
    "search.concurrent=1",
)


@dataclass(frozen=True)
class Make:
    """Makes a trial of any point, as a search's own maker does."""

    config: Config
    search: Artifact

    def __call__(self, point: Point) -> Trial:
        name = hashlib.sha256(json.dumps(point).encode()).hexdigest()[:20]
        chosen = configure(self.config, point)
        return Trial(int(name[:5], 16), point, chosen, {}, Artifact("/nowhere", "train", name), self.search)


@pytest.fixture
def make(storage: str) -> Make:
    config = search_config(storage, *SPACE)
    return Make(config, artifact_at(storage, "tiny", "search", "s" * 20))


def test_a_point_and_its_name_for_optuna_mean_the_same(make: Make) -> None:
    finder = Suggested(tuple(parse_space(make.config.search.space)), make)
    trial = finder.find({"0": 0.0123456, "1": 2})
    assert trial.point == {"optimizer.muon_learning_rate": "0.01235", "train.batch_tokens": "512"}
    assert finder.name(trial.point) == {"0": 0.01235, "1": 2}
    assert finder.name({"optimizer.muon_learning_rate": "0.1001", "train.batch_tokens": "128"}) == {"0": 0.1, "1": 0}
    assert set(finder.space()) == {"0", "1"}


def test_without_optuna_it_is_said_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suggest.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"search\.algorithm=optuna needs Optuna: pip install"):
        suggest.check_optuna()


@pytest.mark.slow
def test_optuna_suggests_points_and_is_told_of_them_again(
    ray_session: None, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    for room in (tuning, suggest):
        monkeypatch.setattr(room, "Attempt", Synthetic)
    few = replace(make.config, search=replace(make.config.search, trials=3))
    preset = make({})
    trials, records = run_suggested(few, preset, make, scheduler=lambda: None)
    assert [record.state for record in records] == [DONE] * 4
    first = read_points(make.search)
    assert [trial.point for trial in trials] == [{}, *first]
    trials, records = run_suggested(make.config, preset, make, scheduler=lambda: None)
    points = read_points(make.search)
    assert points[:3] == first
    assert len(points) == 6
    assert [record.state for record in records] == [DONE] * 7
