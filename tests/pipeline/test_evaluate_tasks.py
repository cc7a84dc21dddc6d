import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import evaluate, tracking
from pipeline.artifacts import artifact_at
from pipeline.evaluation.report import draw, name_metrics, read_outcomes, say
from tests.pipeline.test_evaluate import checkpoint
from tests.pipeline.tiny_training import tiny_config, tiny_inputs

PAIRS = [{"good": f"the cat sat on {n}", "bad": f"the cat cat on {n}"} for n in range(30)]
ACCURACY = {"value": 0.6, "standard_error": 0.05, "n": 100}
DESCRIBED = {
    "blimp": {"headline": "acc", "items": 100, "chance": 0.5, "metrics": {"acc": ACCURACY}},
    "wikitext2": {
        "headline": "bits_per_byte",
        "items": 1,
        "chance": None,
        "metrics": {"bits_per_byte": {"value": 1.25, "standard_error": None, "n": 1}},
    },
}


@pytest.mark.usefixtures("ray_session")
def test_tasks_are_answered_and_their_figures_are_everywhere(storage, tmp_path, capsys):
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    config = tiny_config(storage, f"evaluate.tasks=[{mine}]", "evaluate.prompts=[The]", "evaluate.sample_tokens=2")
    inputs = tiny_inputs(config, documents=60)
    train, _ = checkpoint(config, inputs, tmp_path)
    tracking.connect(config)
    with mlflow.start_run() as run:
        run_id = run.info.run_id
    train.commit({"mlflow_run_id": run_id}, train.manifest().files)
    output = artifact_at(storage, config.name, "evaluate", "e" * 20)
    manifest = evaluate.run(config, {**inputs, "train": train}, output)

    accuracy = json.loads(output.read_text("evaluation.json"))["tasks"]["mine"]["metrics"]["acc"]
    assert manifest.counts["tasks"]["mine"]["metrics"]["acc"] == accuracy
    assert accuracy["n"] == 30
    metrics = mlflow.MlflowClient().get_run(run_id).data.metrics
    assert metrics["evaluate/mine/acc"] == accuracy["value"]
    assert metrics["evaluate/mine/acc_standard_error"] == pytest.approx(accuracy["standard_error"])
    assert {"evaluate/mine/bits_per_byte", "evaluate/bits_per_byte"} <= set(metrics)
    files = {file.path for file in mlflow.MlflowClient().list_artifacts(run_id)}
    assert {"evaluation.json", "tasks.png"} <= files
    assert output.read_bytes("tasks.png").startswith(b"\x89PNG")
    table = pq.read_table(pa.BufferReader(output.read_bytes("tasks/mine.parquet")))
    assert sum(table["right"].to_pylist()) / 30 == pytest.approx(accuracy["value"])
    assert read_outcomes(output)["mine"].digest == manifest.counts["tasks"]["mine"]["digest"]
    assert f"evaluate  mine             acc {accuracy['value']:.3f}" in capsys.readouterr().out


def test_evaluating_again_keeps_the_earlier_figures(storage):
    config = tiny_config(storage)
    tracking.connect(config)
    with mlflow.start_run() as run:
        run_id = run.info.run_id
    client = mlflow.MlflowClient()
    for fingerprint, bits in (("a" * 20, 1.5), ("b" * 20, 1.7), ("a" * 20, 1.5), ("b" * 20, 1.6)):
        evaluate.log_evaluation(run_id, fingerprint, {"bits_per_byte": bits}, {"evaluation.json": str(bits).encode()})

    def history(name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]

    assert history("evaluate/bits_per_byte") == [(0, 1.5), (1, 1.5)]
    assert history("evaluate-bbbbbbbb/bits_per_byte") == [(0, 1.7), (1, 1.6)]
    assert {file.path for file in client.list_artifacts(run_id)} == {"evaluation.json", "evaluations"}
    assert mlflow.artifacts.load_text(f"runs:/{run_id}/evaluation.json") == "1.5"
    assert mlflow.artifacts.load_text(f"runs:/{run_id}/evaluations/bbbbbbbb-1/evaluation.json") == "1.6"


def test_an_evaluation_from_before_keeps_its_name(storage):
    tracking.connect(tiny_config(storage))
    with mlflow.start_run() as run:
        mlflow.log_metric("evaluate/bits_per_byte", 1.5)
    evaluate.log_evaluation(run.info.run_id, "a" * 20, {"bits_per_byte": 1.7}, {})
    metrics = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    assert metrics == {"evaluate/bits_per_byte": 1.5, "evaluate-aaaaaaaa/bits_per_byte": 1.7}


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [(["blimpy"], "There is no task 'blimpy'"), (["a/x.jsonl", "b/x.jsonl"], "Two tasks are called 'x'")],
)
def test_a_wrong_task_is_named_before_anything_runs(storage, tasks, sentence):
    config = tiny_config(storage)
    with pytest.raises(ValueError, match=sentence):
        evaluate.settings(replace(config, evaluate=replace(config.evaluate, tasks=tasks)))


def test_without_tasks_the_fingerprint_is_what_it_was(storage):
    assert "tasks" not in evaluate.settings(tiny_config(storage))


def test_a_task_is_said_in_one_line():
    assert say("blimp", DESCRIBED["blimp"]) == "blimp            acc 0.600 ± 0.098, chance 0.500, 100 items"
    assert say("wikitext2", DESCRIBED["wikitext2"]) == "wikitext2        bits_per_byte 1.250, 1 items"


def test_figures_without_an_error_are_logged_without_one():
    assert name_metrics(DESCRIBED) == {
        "blimp/acc": 0.6,
        "blimp/acc_standard_error": 0.05,
        "wikitext2/bits_per_byte": 1.25,
    }


def test_the_picture_is_drawn_with_any_number_of_accuracies():
    for tasks in ({}, DESCRIBED, {"wikitext2": DESCRIBED["wikitext2"]}):
        assert draw(tasks, title="tiny").startswith(b"\x89PNG")


def test_outcomes_of_an_evaluation_that_is_gone_are_none(tmp_path: Path):
    assert read_outcomes(artifact_at(str(tmp_path), "tiny", "evaluate", "0" * 20)) == {}
