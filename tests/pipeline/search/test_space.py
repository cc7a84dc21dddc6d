"""What a search tries: entries become dimensions, dimensions points, points trainings of as many tokens."""

import pytest

from pipeline import orchestrator
from pipeline.config import Config, SearchConfig, load_config
from pipeline.search.space import Choices, Range, configure, draw_points, parse_space, target_tokens
from tests.pipeline.search.plain_demo import PLAIN


@pytest.fixture
def demo() -> Config:
    return load_config("demo", PLAIN)


def test_entries_are_values_values_together_and_ranges() -> None:
    assert parse_space(
        [
            "train.batch_tokens = 2048 | 4_096",
            "model.width, model.num_heads = 128,2 | 192,3",
            "optimizer.muon_learning_rate = log 0.005 .. 0.08",
            "optimizer.momentum_warmup_steps=10..300",
        ]
    ) == [
        Choices(("train.batch_tokens",), (("2048",), ("4_096",))),
        Choices(("model.width", "model.num_heads"), (("128", "2"), ("192", "3"))),
        Range("optimizer.muon_learning_rate", 0.005, 0.08, is_log=True, is_whole=False),
        Range("optimizer.momentum_warmup_steps", 10, 300, is_log=False, is_whole=True),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("model.width", "is none; write key = value"),
        ("model.width =", "is none; write key = value"),
        ("model.widht = 1 | 2", "there is no setting 'model.widht'"),
        ("prepare.shard_tokens = 1 | 2", "prepare.shard_tokens is not tried; a trial has its own model"),
        ("seed = 1 | 2", "seed is not tried"),
        ("train.steps = 1 | 2", "train.steps is not tried; it follows from"),
        ("model.width, model.num_heads = 128 | 192,3", "needs 2 values between two bars"),
        ("model.width = 128 | 128", "names a value twice"),
        ("model.family = a .. b", "model.family is no number"),
        ("model.width = 1 .. x", "is no range"),
        ("optimizer.beta1 = 0.9 .. 0.1", "does not go from a lower to a higher"),
        ("optimizer.beta1 = log 0 .. 0.1", "no logarithm at 0"),
        ("optimizer.beta1 = nan .. 0.1", "does not go from a lower"),
    ],
)
def test_an_entry_that_cannot_be_tried_is_named(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_space([entry])
    with pytest.raises(ValueError, match=r"names model\.width twice"):
        parse_space(["model.width = 1 | 2", "model.width = 3 | 4"])


def test_a_grid_is_tried_whole_or_drawn_from_with_the_seed() -> None:
    space = ["train.batch_tokens = 1024 | 2048 | 4096", "optimizer.beta1 = 0.8 | 0.9"]
    grid = draw_points(SearchConfig(space=space), 1)
    assert len(grid) == 6
    assert grid[0] == {"train.batch_tokens": "1024", "optimizer.beta1": "0.8"}
    four = draw_points(SearchConfig(space=space, trials=4), 1)
    assert len({tuple(point.items()) for point in four}) == 4
    assert all(point in grid for point in four)
    assert four == draw_points(SearchConfig(space=space, trials=4), 1)
    assert four != draw_points(SearchConfig(space=space, trials=4), 2)
    assert draw_points(SearchConfig(space=space, trials=60), 1) == grid


def test_ranges_are_drawn_inside_their_bounds() -> None:
    space = ["optimizer.muon_learning_rate = log 0.001 .. 0.1", "optimizer.warmup_steps = 0 .. 20"]
    points = draw_points(SearchConfig(space=space, trials=200), 1)
    rates = sorted(float(point["optimizer.muon_learning_rate"]) for point in points)
    assert 0.001 <= rates[0] < 0.0015
    assert 0.08 < rates[-1] <= 0.1
    assert 0.005 < rates[100] < 0.02, "half of them below the geometric mean"
    assert {int(point["optimizer.warmup_steps"]) for point in points} <= set(range(21))
    with pytest.raises(ValueError, match=r"search\.trials must say how many"):
        draw_points(SearchConfig(space=space), 1)


def test_the_presets_own_point_is_the_presets_own_training(demo: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    train = orchestrator.module_of("train")
    own = configure(demo, {})
    assert train.settings(own) == train.settings(demo)
    assert train.settings(configure(demo, {"train.batch_tokens": "4096"})) == train.settings(demo)
    assert train.settings(configure(demo, {}, seed=5)) != train.settings(demo)
    assert configure(load_config("demo", [*PLAIN, "train.run=mine"]), {}).train.run == ""


def test_a_larger_batch_takes_fewer_steps_and_as_many_tokens(demo: Config) -> None:
    large = configure(demo, {"train.batch_tokens": "8192"}).train
    assert (large.steps, large.evaluate_every_steps) == (85, 25)
    half = configure(demo, {}, tokens=target_tokens(demo) // 2).train
    assert (half.steps, half.evaluate_every_steps) == (85, 25)
    with pytest.raises(ValueError, match="not a multiple of model"):
        configure(demo, {"train.batch_tokens": "100"})


def test_a_search_of_nothing_is_refused_before_anything_starts(demo: Config) -> None:
    from pipeline.search import study

    with pytest.raises(ValueError, match=r"nothing to search: give search\.space, search\.widths"):
        study.check(demo)
    with pytest.raises(ValueError, match=r"model\.width must be divisible"):
        study.check(load_config("demo", ["search.space=[model.width = 192 | 100]"]))
    with pytest.raises(ValueError, match=r"leave train\.extends empty"):
        study.check(load_config("demo", ["search.space=[model.width = 192 | 96]", "train.extends=before"]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("search.seeds=1", "one figure has no interval"),
        ("search.widths=[64]", "two or more"),
        ("search.widths=[64,64]", "two or more different"),
        ("search.scheduler=pbt", "it can be none or asha"),
        ("search.reduction=1", "at least 2"),
        ("search.trials=-1", "cannot be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("demo", [setting])
