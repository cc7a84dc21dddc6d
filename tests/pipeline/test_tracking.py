"""Nothing logged is lost or doubled, whether or not MLflow is there."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlflow
import pytest

from pipeline import evaluate, orchestrator, tracking
from pipeline.artifacts import artifact_at
from pipeline.config import Config, load_config
from pipeline.training.tracker import Tracker


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests: to make it takes MLflow seconds."""
    return str(tmp_path_factory.mktemp("storage"))


@pytest.fixture
def config(store: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return load_config(None, [f"storage={store}", "name=tiny"])


@pytest.fixture
def run(config: Config) -> tuple[str, str]:
    """A tracking URI and a run in it."""
    uri = tracking.connect(config)
    return uri, new_run(config)


def new_run(config: Config) -> str:
    return tracking.open_run(config, None, name="try", data={}, facts={"fingerprint": "f"})


def steps_of(run: tuple[str, str], name: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient(tracking_uri=run[0]).get_metric_history(run[1], name)
    return [(metric.step, metric.value) for metric in history]


def test_everything_logged_arrives_in_order(run: tuple[str, str]) -> None:
    with Tracker(*run) as tracker:
        for step in range(2000):
            tracker.log_metrics({"a": step / 2, "b": -step}, step)
        tracker.log_text("notes/first.txt", "Grüße")
        tracker.log_drawing("picture.png", lambda: b"png")
        assert tracker.flush(timeout_seconds=60)
    assert steps_of(run, "a") == [(step, step / 2) for step in range(2000)]
    assert len(steps_of(run, "b")) == 2000
    client = mlflow.MlflowClient(tracking_uri=run[0])
    assert Path(client.download_artifacts(run[1], "notes/first.txt")).read_text() == "Grüße"
    assert Path(client.download_artifacts(run[1], "picture.png")).read_bytes() == b"png"


def test_a_step_logged_again_after_a_restart_is_not_doubled(run: tuple[str, str]) -> None:
    with Tracker(*run) as tracker:
        for step in range(8):
            tracker.log_metrics({"loss": 10.0 - step}, step)
        tracker.flush(timeout_seconds=30)
    with Tracker(*run, resumed=True) as tracker:
        for step in range(5, 12):
            tracker.log_metrics({"loss": 10.0 - step}, step)
            tracker.log_metrics({"loss": 10.0 - step}, step)
        tracker.flush(timeout_seconds=30)
    assert steps_of(run, "loss") == [(step, 10.0 - step) for step in range(12)]


def test_what_one_tracker_could_not_send_the_next_one_sends(run: tuple[str, str], tmp_path: Path) -> None:
    nowhere = Tracker(f"http://127.0.0.1:{free_port()}", run[1])
    nowhere.log_metrics({"loss": 1.5}, 1)
    nowhere.log_text("sample.txt", "The cat")
    assert not nowhere.flush(timeout_seconds=0.2)
    unsent = nowhere.close(timeout_seconds=0)
    assert len(unsent) == 2
    with Tracker(*run, unsent=unsent, resumed=True) as tracker:
        assert tracker.flush(timeout_seconds=30)
    assert steps_of(run, "loss") == [(1, 1.5)]


def test_logging_never_waits(run: tuple[str, str]) -> None:
    tracker = Tracker(f"http://127.0.0.1:{free_port()}", run[1])
    began = time.monotonic()
    for step in range(1000):
        tracker.log_metrics({"loss": 1.0}, step)
    assert time.monotonic() - began < 1.0
    tracker.close(timeout_seconds=0)


def test_storage_on_s3_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        tracking.connect(load_config(None, ["storage=s3://bucket/runs", "name=tiny"]))


def test_a_server_that_is_not_there_is_named_without_its_password(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match=r"MLflow at http://…@127\.0\.0\.1:\d+ does not answer") as raised:
        tracking.connect(config)
    assert "secret" not in str(raised.value)


def test_a_resumed_training_keeps_its_run_and_a_deleted_one_is_replaced(config: Config, run: tuple[str, str]) -> None:
    again = tracking.open_run(config, run[1], name="try", data={}, facts={})
    assert again == run[1]
    other = tracking.open_run(config, "0" * 32, name="try", data={}, facts={})
    assert other not in ("0" * 32, run[1])


@pytest.mark.slow
def test_every_metric_arrives_although_the_server_was_killed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    config = load_config(None, ["storage=unused", "name=tiny"])
    with mlflow_server(tmp_path, port):
        uri = tracking.connect(config)
        run = (uri, new_run(config))
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


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """A real `mlflow server`, killed without a warning at the end."""
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert time.monotonic() < deadline
                assert server.poll() is None
                time.sleep(0.5)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_commit_is_named_and_marked_when_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert tracking.git_commit(tmp_path) == ""
    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    assert tracking.git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert tracking.git_commit(tmp_path) == git("rev-parse", "HEAD") + "+"


def test_a_job_on_a_cluster_names_the_commit_that_it_was_sent_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "git_commit", lambda folder: "")  # .git stays at home
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert tracking.git_tags() == {}
    monkeypatch.setenv("GIT_COMMIT", "abc+")
    assert tracking.git_tags() == {"mlflow.source.git.commit": "abc", "git_files_changed": "true"}
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert tracking.git_tags()["git_files_changed"] == "false"


@pytest.mark.slow
def test_a_stage_waits_for_a_server_that_went_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    config = load_config(None, [f"storage={tmp_path}", "name=tiny"])
    with mlflow_server(tmp_path, port):
        tracking.connect(config)
    attempts, said = [], []

    def run(*_: object) -> str:
        attempts.append(1)
        mlflow.MlflowClient().search_experiments()
        return "done"

    with ExitStack() as server:

        def report(words: str) -> None:
            said.append(words)
            server.enter_context(mlflow_server(tmp_path, port))

        monkeypatch.setattr(evaluate, "run", run)
        output = artifact_at(config.storage, config.name, "evaluate", "0" * 20)
        done: object = orchestrator._run_through_outages("evaluate", config, {}, output, report)
        assert done == "done"
        with pytest.raises(mlflow.exceptions.MlflowException) as refused:
            mlflow.MlflowClient().get_run("0" * 32)
    assert len(attempts) == 2
    assert [words[:24] for words in said] == ["evaluate  waits for MLfl"]
    assert not tracking.is_outage(refused.value), "an answer of the server is no outage"
