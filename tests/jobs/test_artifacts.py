"""The command line over storage: what is listed, shown and pruned, for a person and for another program."""

import json
from pathlib import Path

import pytest

from jobs.artifacts import main
from tests.pipeline.records.tiny_store import fill_store


@pytest.fixture(autouse=True)
def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_listing_makes_nothing(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = fill_store(storage, days_old=40)
    before = sorted(Path(storage).rglob("*"))
    assert main(["list", f"storage={storage}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (training,) = [line for line in lines if line.startswith(f"novel/train-{store['train'].fingerprint}")]
    assert " 40 d" in training
    assert f"evaluate-{store['evaluate'].fingerprint}" in training
    assert lines[-1].startswith("4 artifacts, ")
    assert sorted(Path(storage).rglob("*")) == before


def test_one_is_shown_by_the_beginning_of_its_name(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = fill_store(storage)
    assert main(["show", "train", f"storage={storage}"]) == 0
    shown = capsys.readouterr().out
    assert f"made from      prepare: novel/prepare-{store['prepare'].fingerprint}" in shown
    assert "train.steps" in shown
    assert main(["show", "nothing", f"storage={storage}"]) == 2
    assert "holds no artifact 'nothing'" in capsys.readouterr().err


def test_pruning_shows_first_and_deletes_when_it_is_told_to(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = fill_store(storage, days_old=40)
    words = ["prune", f"storage={storage}", "--older-than", "30"]
    assert main(words) == 0
    assert "4 would go" in capsys.readouterr().out
    assert all(artifact.is_done for artifact in store.values())
    assert main([*words, "--yes"]) == 0
    assert "4 of 4 deleted." in capsys.readouterr().out
    assert main(words) == 0
    assert "Nothing is to go." in capsys.readouterr().out


def test_a_prune_without_a_wish_is_refused(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill_store(storage)
    assert main(["prune", f"storage={storage}", "--yes"]) == 2
    assert "Say what may go" in capsys.readouterr().err


def test_without_an_answer_of_the_registry_nothing_goes(
    storage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill_store(storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["prune", f"storage={storage}", "--name", "novel", "--yes"]) == 2
    assert "MLflow at http://127.0.0.1:9 does not answer" in capsys.readouterr().err
    assert all(artifact.is_done for artifact in store.values())


def test_another_program_reads_the_same(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = fill_store(storage)
    assert main(["list", f"storage={storage}", "--json"]) == 0
    listed = {each["stage"]: each for each in json.loads(capsys.readouterr().out)}
    assert listed["train"]["fingerprint"] == store["train"].fingerprint
    assert listed["train"]["needed_by"] == [listed["evaluate"]["folder"]]
    assert main(["prune", f"storage={storage}", "--name", "novel", "--yes", "--json"]) == 0
    assert [each["deleted"] for each in json.loads(capsys.readouterr().out)] == [True] * 4
