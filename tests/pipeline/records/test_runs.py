"""Trainings in the terminal, as MLflow knows them."""

import dataclasses
import json
import time

import mlflow
import pytest

from jobs.runs import main
from pipeline import tracking
from pipeline.config import Config
from pipeline.records.runs import Row, describe_rows, find_run, list_runs, read_tasks


@pytest.fixture
def two_runs(tracked_config: Config) -> tuple[str, str]:
    """A training and one that began with its weights, in the store of all tests."""
    client, ids = mlflow.MlflowClient(), []
    for name in ("tiny 1K words", "tiny 1K words from tiny"):
        run_id = tracking.open_run(tracked_config, None, name=name, data={}, facts={"fingerprint": name})
        client.log_metric(run_id, "train/loss", 2.0, step=7)
        ids.append(run_id)
    client.log_metric(ids[0], "validation/bits_per_byte", 1.75)
    client.log_metric(ids[0], "evaluate/piqa/acc", 0.5)
    client.set_tag(ids[1], tracking.PARENT_TAG, ids[0])
    with mlflow.start_run(experiment_id=tracking.open_data_experiment(tracked_config)):
        pass
    return ids[0], ids[1]


def test_a_run_is_a_line_and_its_child_stands_under_it(
    tracked_config: Config, two_runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row.run_id: row for row in list_runs(tracked_config, "tiny")}
    parent = rows[two_runs[0]]
    assert (parent.step, parent.steps) == (7, 1000)
    assert parent.bits_per_byte == 1.75
    assert parent.tasks == {"piqa": 0.5}
    assert main([f"storage={tracked_config.storage}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if two_runs[0][:8] in line)
    assert "7/1,000" in lines[at]
    assert "1.750" in lines[at]
    assert "piqa 0.500" in lines[at]
    assert lines[at + 1].startswith("  tiny 1K words from tiny")
    assert not [line for line in lines if "words," in line]


def test_one_run_says_where_its_page_is(
    tracked_config: Config, two_runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"storage={tracked_config.storage}"
    assert main([two_runs[0][:10], storage]) == 0
    assert f"/runs/{two_runs[0]}?workflowType=machine_learning once this runs:" in capsys.readouterr().out
    assert main([two_runs[0][:10], storage, "--open"]) == 2
    assert "No server shows this store yet" in capsys.readouterr().err
    assert main(["nothing like it", storage]) == 2
    assert "MLflow has no run 'nothing like it'" in capsys.readouterr().err
    assert main([two_runs[0], storage, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == two_runs[0]


def test_a_store_that_nobody_has_made_holds_no_runs_and_is_not_made(
    storage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main([f"storage={storage}"]) == 0
    assert capsys.readouterr().out == "No training has a run here.\n"


def test_an_experiment_that_is_not_there_is_named_with_those_that_are(tracked_config: Config) -> None:
    with pytest.raises(ValueError, match=r"no experiment 'novel'; it has .*tiny"):
        list_runs(tracked_config, "novel")


def test_a_task_is_told_by_its_headline() -> None:
    metrics = {"evaluate/bits_per_byte": 1.0, "evaluate/arc/acc": 0.2, "evaluate/arc/acc_norm": 0.3, "train/loss": 2.0}
    assert read_tasks(metrics) == {"arc": 0.3}


def test_a_running_training_that_says_nothing_any_more_is_called_silent(
    tracked_config: Config, two_runs: tuple[str, str]
) -> None:
    row = next(row for row in list_runs(tracked_config, "tiny") if row.run_id == two_runs[0])
    assert abs(row.heard - time.time()) < 60
    assert " running " in describe_rows([row], now=row.heard + 60)
    assert " silent 2 h " in describe_rows([row], now=row.heard + 7200)
    ended = dataclasses.replace(row, state="finished")
    assert " finished " in describe_rows([ended], now=row.heard + 7200)


def test_ages_are_told_and_the_newest_of_a_name_is_meant() -> None:
    rows = [Row(letter * 32, "x", "same", "finished", 3, 3, None, started=time.time() - 7200) for letter in "ab"]
    assert "      2 h" in describe_rows(rows)
    assert find_run(rows, "same").run_id == "a" * 32
    assert find_run(rows, "bbb").run_id == "b" * 32
