"""Where MLflow is, what is wrong with that address, and which run a training has there."""

import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import mlflow
import pytest

from pipeline import evaluate, orchestrator, tracking
from pipeline.artifacts import Artifact, artifact_at
from pipeline.config import Config, load_config
from tests.mlflow_store import free_port, mlflow_server


def test_storage_on_s3_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        tracking.connect(load_config(None, ["storage=s3://bucket/runs", "name=tiny"]))


def test_a_server_that_is_not_there_is_named_without_its_password(
    tracked_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match=r"MLflow at http://…@127\.0\.0\.1:\d+ does not answer") as raised:
        tracking.connect(tracked_config)
    assert "secret" not in str(raised.value)


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


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("localhost:5000", "lacks its scheme; write http://localhost:5000"),
        ("10.0.0.1:5000/mlflow", "lacks its scheme; write http://10.0.0.1:5000/mlflow"),
        ("./mlruns", "a folder, and MLflow keeps runs in folders no longer; write sqlite:////"),
        ("/data/mlruns", "a folder"),
        ("file:///", "a folder"),
        ("file:///data/mlruns", "a folder"),
        ("nonsense", "no address of MLflow; write http://HOST:5000 or sqlite:////"),
        ("ftp://host/x", "no address of MLflow"),
        ("s3://bucket/x", "no address of MLflow"),
        ("sqlite://", "no address of MLflow"),
        ("sqlite:///s3://bucket/mlflow.db", "SQLite keeps no file at s3://bucket/mlflow.db"),
        ("http://", "names no host and port"),
        ("http://localhost:many", "names no host and port"),
        ("http://me:secret@:5000", "names no host and port"),
        ("mysql+nodriver://me:secret@host/x", "no address of a database"),
        ("mssql+pymssql://me:secret@host/x", "its driver 'pymssql' is not installed here"),
    ],
)
def test_an_address_that_can_be_none_is_refused_before_the_first_stage(
    address: str, sentence: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        orchestrator.run(load_config(None, [f"storage={storage}", "name=tiny"]))
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)
    assert not Path(storage).exists()


def test_a_server_that_does_not_answer_is_told_before_the_first_stage(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    lines: list[str] = []
    with pytest.raises(ValueError, match=r".") as raised:
        orchestrator.run(load_config(None, [f"storage={storage}", "name=tiny"]), report=lines.append)
    remedy = "start it, or correct MLFLOW_TRACKING_URI."
    assert str(raised.value) == f"MLflow at {place} does not answer (Connection refused): {remedy}"
    assert lines == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            "API request to http://h/x failed with exception HTTPConnectionPool(host='h', port=9): Max retries exceeded"
            " with url: /x (Caused by NameResolutionError(\"HTTPConnection(host='h', port=9): Failed to resolve 'h'"
            " ([Errno -2] Name or service not known)\"))",
            "Name or service not known",
        ),
        ("API request to http://h/x failed with exception HTTPConnectionPool(host='h', port=9): Read timed out."
         " (read timeout=20)", "Read timed out"),
        ("API request to endpoint /x failed with error code 502 != 200. Response body: 'no'",
         "error code 502 != 200. Response body: 'no'"),
        ("Database is away.", "Database is away"),
    ],
)  # fmt: skip
def test_the_reason_of_an_outage_comes_without_what_the_client_wraps_around_it(words: str, reason: str) -> None:
    assert tracking.reason_of(ValueError(words)) == reason


@pytest.mark.parametrize(
    "address",
    ["http://localhost:5000", "https://me:secret@host/mlflow", "sqlite:////x/y.db", "postgresql+psycopg2://u:p@h/db"],
)
def test_an_address_that_can_be_one_is_taken(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert tracking.address(load_config(None, ["storage=s3://bucket/runs"])) == address


def test_a_locked_store_is_told_in_a_sentence_and_is_waited_for(
    tracked_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = tracking.address(tracked_config)
    holder = sqlite3.connect(store.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{store}?timeout=0.1")
    with pytest.raises(tracking.MlflowAway, match=r"is locked by another process: end that one .* or wait") as raised:
        tracking.connect(tracked_config)
    assert "\n" not in str(raised.value)
    assert tracking.is_outage(raised.value)
    assert "Traceback" not in caplog.text
    holder.execute("ROLLBACK")
    holder.close()
    tracking.connect(tracked_config)


def test_a_full_disk_is_told_and_not_waited_for(tracked_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise mlflow.exceptions.MlflowException("(sqlite3.OperationalError) database or disk is full")

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", fill)
    with pytest.raises(ValueError, match="No space left on the device of MLflow's store") as raised:
        tracking.connect(tracked_config)
    assert not tracking.is_outage(raised.value)


def test_a_resumed_training_keeps_its_run_and_one_that_is_gone_is_replaced(
    tracked_config: Config, tracked_run: tuple[str, str]
) -> None:
    again = tracking.open_run(tracked_config, tracked_run[1], name="try", data={}, facts={})
    assert again == tracked_run[1]
    other = tracking.open_run(tracked_config, "0" * 32, name="try", data={}, facts={})
    assert other not in ("0" * 32, tracked_run[1])


def test_a_run_says_which_command_started_it_even_if_it_goes_on(
    tracked_config: Config, tracked_run: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> str:
        return str(mlflow.MlflowClient().get_run(tracked_run[1]).data.tags["command"])

    assert command() == shlex.join(sys.orig_argv)[: tracking.LONGEST_TAG]
    monkeypatch.setattr(tracking.sys, "orig_argv", ["python", "-m", "jobs.train", "demo", "x=http://me:secret@host"])
    tracking.open_run(tracked_config, tracked_run[1], name="try", data={}, facts={})
    assert command() == "python -m jobs.train demo x=http://…@host"


def test_a_deleted_run_is_brought_back_and_a_purged_one_replaced_once(
    tracked_config: Config, tracked_run: tuple[str, str]
) -> None:
    def trained(run_id: str, fingerprint: str) -> Artifact:
        artifact = artifact_at(tracked_config.storage, "tiny", "train", fingerprint)
        artifact.commit({"mlflow_run_id": run_id}, {})
        return artifact

    mlflow.MlflowClient().delete_run(tracked_run[1])
    assert tracking.find_run(tracked_config, trained(tracked_run[1], "1" * 20)) == tracked_run[1]
    assert mlflow.MlflowClient().get_run(tracked_run[1]).info.lifecycle_stage == "active"
    purged = trained("0" * 32, "2" * 20)
    new = tracking.find_run(tracked_config, purged)
    assert new not in ("0" * 32, tracked_run[1])
    assert tracking.find_run(tracked_config, purged) == new


def test_each_outage_has_a_deadline_of_its_own(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine minutes away, an hour of work, nine minutes away, with a patience of ten."""
    now, deadlines = [1000.0], []

    def wait(config: Config, deadline: float) -> bool:
        deadlines.append(deadline - now[0])
        now[0] += 9 * 60
        return now[0] < deadline

    attempts = iter([0, 3600, 30])

    def run(*_: object) -> str:
        for worked in attempts:
            now[0] += worked
            raise tracking.MlflowAway("MLflow does not answer.")
        return "done"

    monkeypatch.setattr(tracking, "_answered", {"somewhere"})
    monkeypatch.setattr(tracking, "wait_for_answer", wait)
    monkeypatch.setattr(orchestrator.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(evaluate, "run", run)
    config = load_config(None, [f"storage={storage}", "name=tiny", "train.mlflow_patience_minutes=10"])
    output = artifact_at(config.storage, config.name, "evaluate", "0" * 20)
    # Thirty seconds after an answer it is still the same outage: a server that flaps is not waited for for ever.
    with pytest.raises(tracking.MlflowAway):
        orchestrator._run_through_outages("evaluate", config, {}, output, lambda words: None)
    assert deadlines == [600, 600, 30]


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
