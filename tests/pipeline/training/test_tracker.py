"""Nothing logged is lost or doubled, whether or not MLflow is there; what MLflow refuses is lost alone."""

import logging
import time
from pathlib import Path

import mlflow
import pytest

from pipeline import tracking
from pipeline.config import load_config
from pipeline.training.tracker import Tracker
from tests.mlflow_store import free_port, mlflow_server


def steps_of(run: tuple[str, str], name: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient(tracking_uri=run[0]).get_metric_history(run[1], name)
    return [(metric.step, metric.value) for metric in history]


def test_everything_logged_arrives_in_order(tracked_run: tuple[str, str]) -> None:
    with Tracker(*tracked_run) as tracker:
        for step in range(2000):
            tracker.log_metrics({"a": step / 2, "b": -step}, step)
        tracker.log_text("notes/first.txt", "Grüße")
        tracker.log_drawing("picture.png", lambda: b"png")
        assert tracker.flush(timeout_seconds=60)
    assert steps_of(tracked_run, "a") == [(step, step / 2) for step in range(2000)]
    assert len(steps_of(tracked_run, "b")) == 2000
    client = mlflow.MlflowClient(tracking_uri=tracked_run[0])
    assert Path(client.download_artifacts(tracked_run[1], "notes/first.txt")).read_text() == "Grüße"
    assert Path(client.download_artifacts(tracked_run[1], "picture.png")).read_bytes() == b"png"


def test_a_step_logged_again_after_a_restart_is_not_doubled(tracked_run: tuple[str, str]) -> None:
    with Tracker(*tracked_run) as tracker:
        for step in range(8):
            tracker.log_metrics({"loss": 10.0 - step}, step)
        tracker.flush(timeout_seconds=30)
    with Tracker(*tracked_run, resumed=True) as tracker:
        for step in range(5, 12):
            tracker.log_metrics({"loss": 10.0 - step}, step)
            tracker.log_metrics({"loss": 10.0 - step}, step)
        tracker.flush(timeout_seconds=30)
    assert steps_of(tracked_run, "loss") == [(step, 10.0 - step) for step in range(12)]


def test_what_one_tracker_could_not_send_the_next_one_sends(tracked_run: tuple[str, str], tmp_path: Path) -> None:
    nowhere = Tracker(f"http://127.0.0.1:{free_port()}", tracked_run[1])
    nowhere.log_metrics({"loss": 1.5}, 1)
    nowhere.log_text("sample.txt", "The cat")
    assert not nowhere.flush(timeout_seconds=0.2)
    unsent = nowhere.close(timeout_seconds=0)
    assert len(unsent) == 2
    with Tracker(*tracked_run, unsent=unsent, resumed=True) as tracker:
        assert tracker.flush(timeout_seconds=30)
    assert steps_of(tracked_run, "loss") == [(1, 1.5)]


def test_logging_never_waits(tracked_run: tuple[str, str]) -> None:
    tracker = Tracker(f"http://127.0.0.1:{free_port()}", tracked_run[1])
    began = time.monotonic()
    for step in range(1000):
        tracker.log_metrics({"loss": 1.0}, step)
    assert time.monotonic() - began < 1.0
    tracker.close(timeout_seconds=0)


def test_a_refused_figure_is_dropped_alone_and_told_once(
    tracked_run: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Tracker(*tracked_run) as tracker:
        for step in range(3):
            tracker.log_metrics({"good": 1.0, "bad:name?": 2.0, "fine": 3.0}, step)
        tracker.log_text("notes.txt", "Grüße")
        tracker.log_tags({"threads": "2"})
        tracker.log_drawing("picture.png", lambda: b"png")
        assert tracker.flush(timeout_seconds=60)
        assert tracker.unsent() == []
    for name in ("good", "fine"):
        assert [step for step, _ in steps_of(tracked_run, name)] == [0, 1, 2]
    client = mlflow.MlflowClient(tracking_uri=tracked_run[0])
    assert {file.path for file in client.list_artifacts(tracked_run[1])} == {"notes.txt", "picture.png"}
    assert client.get_run(tracked_run[1]).data.tags["threads"] == "2"
    assert caplog.text.count("did not take bad:name?") == 1


def test_a_drawing_that_fails_is_dropped_and_no_figure_with_it(
    tracked_run: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    def draw() -> bytes:
        raise ZeroDivisionError("no points")

    with caplog.at_level(logging.WARNING), Tracker(*tracked_run) as tracker:
        tracker.log_drawing("loss.png", draw)
        tracker.log_drawing("other.png", lambda: b"png")
        tracker.log_metrics({"loss": 1.0}, 1)
        assert tracker.flush(timeout_seconds=30)
    assert steps_of(tracked_run, "loss") == [(1, 1.0)]
    assert "loss.png, which is dropped: no points" in caplog.text


def test_a_full_disk_of_the_store_is_told_and_not_waited_for(
    tracked_run: tuple[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise mlflow.exceptions.MlflowException("(sqlite3.OperationalError) database or disk is full")

    with caplog.at_level(logging.WARNING), Tracker(*tracked_run) as tracker:
        monkeypatch.setattr(tracker._client, "log_batch", fill)
        tracker.log_metrics({"loss": 1.0}, 1)
        began = time.monotonic()
        assert not tracker.flush(timeout_seconds=60)
        assert time.monotonic() - began < 30
        assert len(tracker.unsent()) == 1
    assert caplog.text.count("No space left on the device of MLflow's store at sqlite:") == 1


def test_without_a_run_nothing_is_logged() -> None:
    with Tracker("", "") as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_drawing("loss.png", lambda: b"png")
        assert tracker.flush(timeout_seconds=0)
        assert tracker.unsent() == []


@pytest.mark.slow
def test_every_metric_arrives_although_the_server_was_killed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    config = load_config(None, ["storage=unused", "name=tiny"])
    with mlflow_server(tmp_path, port):
        uri = tracking.connect(config)
        run = (uri, tracking.open_run(config, None, name="try", data={}, facts={}))
        tracker = Tracker(*run)
        for step in range(100):
            tracker.log_metrics({"loss": float(step)}, step)
        assert tracker.flush(timeout_seconds=60)
    slowest = 0.0
    for step in range(100, 300):
        began = time.monotonic()
        tracker.log_metrics({"loss": float(step)}, step)
        tracker.log_text(f"samples/{step}.txt", "The cat") if step % 50 == 0 else None
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.01)
    assert slowest < 0.5
    assert tracker.unsent()
    with mlflow_server(tmp_path, port):
        assert tracker.flush(timeout_seconds=120)
        assert steps_of(run, "loss") == [(step, float(step)) for step in range(300)]
        assert len(mlflow.MlflowClient(tracking_uri=uri).list_artifacts(run[1], "samples")) == 4
    tracker.close(timeout_seconds=0)
