"""When a training ends: after its steps, or when its minutes are over, with its learning rates at their end."""

from itertools import pairwise
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

import pytest
import ray

from model.config import OptimizerConfig
from model.optimizer import schedule
from pipeline import train
from pipeline.config import TrainConfig
from pipeline.training.length import WORK, Length, work_seconds
from tests.pipeline.tiny_training import last_history, start_training, tiny_config, tiny_inputs, tiny_output


def seconds(**spent: float) -> dict[str, float]:
    return {"startup": 100.0, "restart": 100.0} | dict.fromkeys(WORK, 0.0) | spent


def test_steps_end_a_training_whatever_the_clock_says() -> None:
    length = Length(TrainConfig(steps=40))
    assert length.share_passed(seconds(compute=1e6)) == 0
    assert [length.is_over(step, 0.0) for step in (39, 40)] == [False, True]
    assert length.count_steps(3, 0.0) == 40


def test_minutes_end_it_when_as_much_work_is_done_starts_not_counted() -> None:
    length = Length(TrainConfig(minutes=2))
    share = length.share_passed(seconds(compute=20, evaluation=4, data_wait=6))
    assert share == 0.25
    assert not length.is_over(10, share)
    assert length.is_over(10, 1.0)
    assert length.is_over(0, length.share_passed(seconds(compute=500))), "a resumed run whose time is over ends at once"
    assert length.seconds_left(seconds(compute=90, tasks=10)) == 20


def test_rates_follow_the_clock_and_not_the_steps() -> None:
    """A first step that compiles for half of the time says nothing of how many will follow."""
    length, config = Length(TrainConfig(minutes=2)), OptimizerConfig(decay_fraction=0.4, final_ratio=0.0)
    shares = {0: 0.0, 1: 0.5, 2: 0.6, 100: 0.8, 200: 0.9, 300: 1.0}
    rates = [schedule(config, step, length.count_steps(step, share)) for step, share in shares.items()]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.25, 0.0], abs=0.01)


def test_a_timed_training_lasts_its_minutes_and_its_rates_fall_to_their_end(ray_session: None, tmp_path: Path) -> None:
    training = start_training(str(tmp_path), "train.minutes=0.1", "train.steps=1", "train.evaluate_every_steps=50")
    counts = training.manifest.counts
    assert counts["steps"] > 20
    assert 0 < counts["tokens"] <= 256 * counts["steps"]
    last_evaluation_seconds = 3  # comes when the time is over
    assert 6 <= work_seconds(counts["seconds"]) < 6 + last_evaluation_seconds
    points = training.metric_history()("learning_rate/matrices")
    rates = [each.value for each in points]
    assert rates[2] == pytest.approx(max(rates))
    # A step's rate is that of the time when it began, as the step before had said: two steps before the end, and the
    # evaluation that may lie between. On a busy machine those are a tenth of six seconds.
    seconds_before_end = (points[-1].timestamp - points[-4].timestamp) / 1000
    at_the_latest = max(rates) * (0.05 + 0.95 * min(1.0, seconds_before_end / 6 / 0.65))
    assert rates[-1] <= 1.1 * at_the_latest
    assert rates[-1] < 0.5 * max(rates)
    assert max(later - earlier for earlier, later in pairwise(rates[2:])) < 0.2 * max(rates)


@pytest.mark.slow
def test_a_timed_training_that_was_stopped_goes_on_with_the_time_that_is_left(
    ray_session: None, tmp_path: Path
) -> None:
    config = tiny_config(str(tmp_path), "train.minutes=0.2", "train.evaluate_every_steps=2")
    inputs = tiny_inputs(config)
    output = tiny_output(config, inputs)

    def stop_soon(plan: Any, line: Any) -> None:
        def wait() -> None:
            while not any(step >= 2 for step, _ in ray.get(line.scores.remote())):
                sleep(0.1)
            line.stop.remote()

        Thread(target=wait, daemon=True).start()

    with pytest.raises(SystemExit):
        train.run(config, inputs, output, stop_soon)
    first = work_seconds(last_history(config, output).seconds)
    assert 0 < first < 12
    counts = train.run(config, inputs, output).counts
    assert counts["restarts"] == 1
    both = work_seconds(counts["seconds"])
    assert both >= 12
    assert both - first < 12, "the second had what the first left"
