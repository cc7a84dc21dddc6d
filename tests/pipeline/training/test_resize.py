"""Before workers are replaced by more of them, they are asked for a checkpoint, and given the time to write it."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.training.agreement import Agreement
from pipeline.training.launch import RESIZE_SECONDS
from pipeline.training.line import Line
from pipeline.training.resize import SaveBeforeResize

MORE = SimpleNamespace(num_workers=3)


@pytest.fixture
def line(ray_session: None) -> Any:
    return ray.remote(num_cpus=0)(Line).remote()


def test_gpus_wait_for_more_nodes_to_come_together() -> None:
    assert RESIZE_SECONDS["cuda"] >= 60


def test_a_resize_waits_until_the_checkpoint_is_written(line: Any) -> None:
    callback = SaveBeforeResize(line, patience_seconds=60)
    callback.after_worker_group_training_start(None)
    resizing = threading.Thread(target=callback.before_controller_execute_resize_decision, args=(MORE,))
    resizing.start()
    while not (wish := ray.get(line.wishes.remote())[1]):
        time.sleep(0.05)
    said = [news.words for news in ray.get(line.listen.remote())]
    assert said == ["going on with 3 workers soon: writing a checkpoint first"]
    resizing.join(timeout=0.5)
    assert resizing.is_alive()
    line.note_saved.remote(wish)
    resizing.join(timeout=30)
    assert not resizing.is_alive()
    assert ray.get(line.wishes.remote()) == (False, 0)


def test_a_checkpoint_that_does_not_come_holds_it_up_only_so_long(line: Any) -> None:
    callback = SaveBeforeResize(line, patience_seconds=0.1)
    callback.after_worker_group_training_start(None)
    callback.before_controller_execute_resize_decision(MORE)
    assert ray.get(line.wishes.remote()) == (False, 1)
    assert ray.get(line.begin.remote(5)) == "started again, or resized"
    assert ray.get(line.wishes.remote()) == (False, 0), "the next workers are not asked for it"


@pytest.mark.parametrize("failed", [False, True])
def test_workers_that_are_not_there_are_not_asked(line: Any, failed: bool) -> None:
    callback = SaveBeforeResize(line, patience_seconds=60)
    if failed:
        callback.after_worker_group_training_start(None)
        callback.before_controller_execute_failure_decision(None)
    callback.before_controller_execute_resize_decision(MORE)
    assert ray.get(line.wishes.remote()) == (False, 0)


def test_a_wish_makes_one_checkpoint(line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    agreement = Agreement(1, line)
    monkeypatch.setattr("pipeline.training.agreement.is_preempted", lambda: False)  # asks Ray Train
    assert agreement.exchange(save=False, share_passed=0.5) == (False, False, 0.5)
    wish = ray.get(line.ask_to_save.remote(2))
    while agreement.save_wish != wish:
        time.sleep(0.05)
    assert [agreement.exchange(save=False).save for _ in range(2)] == [True, False]
    agreement.close()
