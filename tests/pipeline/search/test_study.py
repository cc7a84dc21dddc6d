"""A search end to end on real Ray and real Tune: killed, gone on with, asked again, and asked a little more."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest

from pipeline import orchestrator
from pipeline.config import load_config
from pipeline.search import study
from pipeline.search.space import configure
from pipeline.search.trial import DONE, PARENT_TAG, Trial
from tests.mlflow_store import point_mlflow_at
from tests.pipeline.search.tiny_search import search_config

REPOSITORY = Path(__file__).parents[3]


def start(storage: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.search.tiny_search", storage, *arguments],
        cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def trainings(storage: str) -> dict[str, str]:
    """Which trainings are done, and when each was."""
    manifests = [json.loads(path.read_text()) for path in Path(storage).glob("tiny/train-*/manifest.json")]
    return {manifest["fingerprint"]: manifest["created"] for manifest in manifests}


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_tells_the_truth(ray_session: None, storage: str) -> None:
    killed = start(storage, "search.concurrent=1")
    try:
        deadline = time.monotonic() + 240
        # One trial is done and the other under way.
        while not (trainings(storage) and len(list(Path(storage).glob("tiny/train-*/run.json"))) > 1):
            assert time.monotonic() < deadline
            assert killed.poll() is None, killed.communicate()[0]
            time.sleep(0.2)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    before = trainings(storage)

    config = search_config(storage)
    manifest = study.run(config)
    after = trainings(storage)
    assert before.items() <= after.items(), "what was done was not done again"
    assert len(after) == 6, "two trials, and two settings with two fresh seeds"

    # Each trial is the training that the pipeline itself would look for.
    artifacts = orchestrator.locate(config)
    own = orchestrator.name_output("train", configure(config, {}, tokens=1536), artifacts)
    assert own.fingerprint in after
    output = study.name_output(config, artifacts["prepare"])
    rows = list(csv.DictReader(io.StringIO(output.read_text("trials.csv"))))
    assert [(row["optimizer.muon_learning_rate"], row["state"], row["tokens"]) for row in rows] == [
        ("0.02", DONE, "1536"),
        ("1e-05", DONE, "1536"),
    ]

    # A learning rate of next to nothing is worse, and nothing is called better than the preset.
    page = output.read_text("search.md")
    assert page.splitlines()[2].startswith(
        "Result: no difference from the preset is shown. muon_learning_rate=0.00001: -"
    )
    best = load_config(output.file("best.yaml"))
    assert (best.optimizer, best.train, best.model) == (config.optimizer, config.train, config.model)
    assert manifest.counts["search/gain"] < 0

    # One parent in MLflow, whose children are the trainings.
    point_mlflow_at(f"sqlite:///{storage}/mlflow.db")
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    parent = str(manifest.counts["mlflow_run_id"])
    children = [run for run in runs if run.data.tags.get(PARENT_TAG) == parent]
    assert len(children) == 6
    assert {run.info.status for run in children} == {"FINISHED"}
    assert client.get_run(parent).info.status == "FINISHED"
    shown = {file.path for file in client.list_artifacts(parent)}
    assert {"search.md", "trials.csv", "parallel.png", "curves.png", "best.yaml"} <= shown

    # Asked again it is done; asked for more, only what is new is trained.
    assert study.run(config).created == manifest.created
    more = search_config(storage, "search.widths=[16,32]")
    wider = study.run(more)
    assert len(trainings(storage)) == 8, "the ladder's two, of which none is a trial's: its tokens are the preset's"
    assert after.items() <= trainings(storage).items()
    assert "it really reached" in study.name_output(more, artifacts["prepare"]).read_text("search.md")
    assert wider.counts["search/predicted_bits_per_byte"] > 0


@pytest.mark.slow
def test_a_node_is_lost_and_the_search_goes_on(tmp_path: Path) -> None:
    space = "search.space=[optimizer.muon_learning_rate = 0.01 | 0.02 | 0.03]"
    searching = start(str(tmp_path), space, "search.seeds=0", "--nodes", "2", "--lose-node")
    try:
        said, _ = searching.communicate(timeout=280)
    finally:
        if searching.poll() is None:
            os.killpg(searching.pid, signal.SIGKILL)
    assert "a node was lost" in said
    assert searching.returncode == 0, said
    counts = json.loads(said.splitlines()[-1])
    assert counts["trials"] == 3
    [records] = Path(tmp_path).glob("tiny/search-*/trials")
    states = [json.loads(path.read_text())["state"] for path in records.iterdir()]
    assert states == [DONE] * 3


def test_a_record_comes_back(storage: str) -> None:
    config = search_config(storage)
    output = study.name_output(config, study.artifact_at(storage, "tiny", "prepare", "p" * 20))
    trial = Trial(3, {}, config, {}, study.artifact_at(storage, "tiny", "train", "t" * 20), output)
    record = trial.read_record()
    assert not record.is_over
    record.points.append([6, 1536, 5.5])
    record.state = DONE
    trial.write_record(record)
    assert trial.read_record() == record
    assert (record.tokens, record.bits_per_byte) == (1536, 5.5)
