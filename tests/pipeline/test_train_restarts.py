"""Whatever is killed, and whenever: the run goes on by itself and ends with the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import boto3
import mlflow
import psutil
import pytest
import torch

from model.checkpoint import load_model
from model.tokenizer import load_tokenizer
from pipeline.evaluation.exam import choose_exam
from pipeline.training import launch, worker
from tests.mlflow_store import free_port, mlflow_server
from tests.pipeline.tiny_training import (
    WORDS,
    Training,
    dying_worker,
    last_checkpoint,
    last_history,
    start_training,
    tiny_config,
    tiny_inputs,
    tiny_output,
)
from tests.s3_server import s3_server

# Steps enough that a person's kill falls between them.
LONG = ("train.steps=300", "train.evaluate_every_steps=100", "train.checkpoint_every_steps=20")


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return start_training(str(tmp_path_factory.mktemp("undisturbed")))


def same_as(training: Training, other: Training) -> None:
    """The same losses and weights, and one continuous curve in one MLflow run."""
    assert training.losses() == other.losses()
    assert training.weights_digest() == other.weights_digest()
    steps = list(training.losses())
    history = training.metric_history()
    for name in ("train/loss", "speed/tokens_per_second", "time/restart_seconds"):
        assert [metric.step for metric in history(name)] == steps, name
    assert [metric.value for metric in history("train/loss")] == list(other.losses().values())
    assert len(mlflow.search_runs(search_all_experiments=True)) == 1


def killed(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *deaths: tuple[int, int, str], settings: tuple[str, ...] = ()
) -> Training:
    monkeypatch.setattr(launch, "train_worker", dying_worker(folder, *deaths))
    return start_training(str(folder / "storage"), *settings)


def test_killed_rank_of_a_training_that_asks_tasks_as_it_goes(
    undisturbed: Training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.jsonl"
    pairs = [{"good": f"the {one} sat on {two}", "bad": f"the {two} {one} sat"} for one in WORDS for two in WORDS]
    mine.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = (f"train.evaluate_tasks=[{mine}]", "train.evaluate_tasks_every_steps=4", "train.evaluate_tasks_items=25")
    training = killed(monkeypatch, tmp_path, (1, 6, "step"), settings=settings)
    same_as(training, undisturbed)  # which asked none
    assert training.manifest.counts["restarts"] == 1
    [restart] = training.history().restarts
    assert restart["step"] in (4, 6)  # that of step 6, the best so far, may have been on its way
    assert restart["workers"] == 2
    assert restart["why"]
    assert training.history().seconds["restart"] > 0

    curve = training.metric_history()("tasks/mine/bits_per_byte")
    assert [metric.step for metric in curve] == [0, 4, 8, 12]
    assert curve[-1].value < curve[0].value - 0.5
    assert training.history().seconds["tasks"] > 0
    assert "step 12: mine acc " in capsys.readouterr().out
    exam = choose_exam(training.config.train.evaluate_tasks, 25)
    assert exam is not None
    folder = training.output.download(tmp_path / "again") / "checkpoint"
    assert training.manifest.counts["best_step"] == 12
    alone, _ = exam.ask(load_model(folder), load_tokenizer(folder), torch.float32, rank=0, world_size=1)
    assert curve[-1].value == pytest.approx(alone["mine/bits_per_byte"], rel=1e-5)
    assert (folder / "README.md").read_text().count("bits per byte of held-out text, as the training measured it") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "deaths",
    [
        [(0, 0, "step")],
        [(0, 6, "accumulation")],
        [(1, 11, "accumulation")],
        [(0, 8, "checkpoint")],
        [(0, 9, "step"), (1, 9, "step")],
        [(0, 3, "step"), (1, 5, "accumulation"), (0, 12, "checkpoint")],
    ],
    ids=str,
)
def test_killed_anywhere(
    undisturbed: Training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deaths: list[tuple[int, int, str]]
) -> None:
    same_as(killed(monkeypatch, tmp_path, *deaths), undisturbed)


@pytest.mark.slow
def test_bad_batch_is_skipped_and_counted(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "train_worker", dying_worker(tmp_path, (0, 5, "poison")))
    training = start_training(str(tmp_path / "storage"), "train.on_bad_loss=skip")
    assert training.manifest.counts["skipped_steps"] == [6]
    assert list(training.losses()) == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    assert "this batch was skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_batch_stops_the_run_and_keeps_the_checkpoint_before_it(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "train_worker", dying_worker(tmp_path, (0, 6, "poison")))
    storage = str(tmp_path / "storage")
    with pytest.raises(ValueError, match="The loss of step 7 is nan"):
        start_training(storage)
    config = tiny_config(storage)
    output = tiny_output(config, tiny_inputs(config))
    assert last_checkpoint(config, output).counts["step"] == 6  # the best so far, and the one just before
    identity = json.loads(output.read_text("bad_batch_step_00000007.json"))
    assert identity["step"] == 6
    assert len(identity["rows"]) == 8


@pytest.mark.slow
def test_workers_that_always_fail_are_given_up(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(told: dict[str, object]) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("no such kernel")

        worker.train_step = refuse  # type: ignore[assignment]
        worker.train_worker(told)  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "train_worker", fail)
    with pytest.raises(ValueError, match=r"failed 5 times in a row after step 0.*no such kernel"):
        start_training(str(tmp_path))


class Driver:
    """A training in a process of its own."""

    def __init__(self, storage: Path | str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipeline.tiny_driver", str(storage), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        )
        self.lines: list[str] = []

    def wait_for(self, pattern: str) -> None:
        """Read what it prints until a line matches."""
        output: IO[str] = self.process.stdout  # type: ignore[assignment]
        for line in output:
            self.lines.append(line.rstrip())
            if re.match(pattern, line):
                return
        raise AssertionError(f"{pattern} never came in:\n" + "\n".join(self.lines[-20:]))

    def end(self) -> dict[str, object]:
        """Let it finish; returns the manifest's counts."""
        self.wait_for(r"\{")
        self.process.wait(timeout=60)
        return json.loads(self.lines[-1])


@pytest.fixture(scope="module")
def long_undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return start_training(str(tmp_path_factory.mktemp("long")), *LONG)


def finished(storage: Path, *settings: str) -> Training:
    config = tiny_config(str(storage), *settings)
    inputs = tiny_inputs(config)
    output = tiny_output(config, inputs)
    manifest = output.manifest()
    assert manifest is not None
    return Training(config, inputs, output, manifest)


@pytest.mark.slow
def test_killed_driver_goes_on_at_the_next_submit(long_undisturbed: Training, tmp_path: Path) -> None:
    first = Driver(tmp_path, *LONG)
    first.wait_for(r"step +150/")
    first.process.kill()
    first.process.wait()
    # The newest checkpoint is damaged too: the one before it must do.
    config = tiny_config(str(tmp_path), *LONG)
    output = tiny_output(config, tiny_inputs(config))
    newest = Path(output.url) / "checkpoints" / max(os.listdir(Path(output.url) / "checkpoints"))
    (newest / "model.safetensors").write_bytes(b"cut short")
    second = Driver(tmp_path, *LONG)
    counts = second.end()
    assert counts["restarts"] == 1
    same_as(finished(tmp_path, *LONG), long_undisturbed)


@pytest.mark.slow
def test_sigterm_saves_and_exits_within_thirty_seconds(long_undisturbed: Training, tmp_path: Path) -> None:
    first = Driver(tmp_path, *LONG)
    first.wait_for(r"step +133/")
    asked = time.monotonic()
    first.process.send_signal(signal.SIGTERM)
    first.process.wait(timeout=60)
    assert time.monotonic() - asked < 30
    assert first.process.returncode == 128 + signal.SIGTERM
    config = tiny_config(str(tmp_path), *LONG)
    stopped_at = last_history(config, tiny_output(config, tiny_inputs(config))).step
    assert stopped_at > 133
    assert stopped_at % 20 != 0 or stopped_at < 300  # a checkpoint of its own
    second = Driver(tmp_path, *LONG)
    second.end()
    same_as(finished(tmp_path, *LONG), long_undisturbed)


@pytest.mark.slow
def test_sigterm_ends_in_time_where_no_worker_answers_and_the_next_start_tidies_up(
    long_undisturbed: Training, tmp_path: Path
) -> None:
    """As on a machine so loaded that the checkpoint is never written whole."""
    first = Driver(tmp_path, *LONG)
    first.wait_for(r"step +60/")
    for process in psutil.Process(first.process.pid).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.suspend()
    config = tiny_config(str(tmp_path), *LONG)
    half_written = Path(tiny_output(config, tiny_inputs(config)).url) / "checkpoints/step-00000061-00000000"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"half")
    asked = time.monotonic()
    first.process.send_signal(signal.SIGTERM)
    first.wait_for("stopping without it: it was not written in 20 s")
    first.process.wait(timeout=60)
    assert time.monotonic() - asked < 30
    assert first.process.returncode == 128 + signal.SIGTERM
    assert Driver(tmp_path, *LONG).end()["restarts"] == 1
    assert not half_written.exists()
    same_as(finished(tmp_path, *LONG), long_undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lost_node_goes_on_with_fewer_workers_and_a_new_one_is_used(long_undisturbed: Training, tmp_path: Path) -> None:
    steps = ("train.steps=2000", "train.evaluate_every_steps=1000", "train.checkpoint_every_steps=250")
    driver = Driver(
        tmp_path, *steps, "train.num_workers=[1,3]", "--nodes", "2",
        "--lose-node-after", "300", "--gain-node-after", "600",
        environment={"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"},
    )  # fmt: skip
    driver.end()
    words = [line for line in driver.lines if line.startswith("training on")]
    assert [line.split()[2] for line in words[:2]] == ["2", "1"], words
    training = finished(tmp_path, *steps)
    assert list(training.losses()) == list(range(1, 2001))
    history = training.metric_history()
    assert [metric.step for metric in history("train/loss")] == list(range(1, 2001))
    assert [line.split()[2] for line in words][-1] == "2", words
    assert "going on with 2 workers soon: writing a checkpoint first" in driver.lines
    assert int(words[-1].rpartition(" ")[2].replace(",", "")) % 250, "from the checkpoint that was written for it"


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        boto3.client("s3").create_bucket(Bucket="runs")
        yield environment


@pytest.mark.slow
def test_all_on_s3(undisturbed: Training, s3: dict[str, str], tmp_path: Path) -> None:
    environment = {**s3, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    driver = Driver("s3://runs/here", environment=environment)
    driver.end()
    listed = boto3.client("s3").list_objects_v2(Bucket="runs")["Contents"]
    names = [entry["Key"] for entry in listed]
    kept = [name.split("/")[-2] for name in names if name.endswith("/training_state.pt")]
    assert [name.split("-")[1] for name in kept] == ["00000012"], "the last one, which is the best too"
    assert sum(name.endswith("/checkpoint/model.safetensors") for name in names) == 1
    [digests] = [
        json.loads(boto3.client("s3").get_object(Bucket="runs", Key=name)["Body"].read())["files"]
        for name in names
        if re.search(r"/train-\w+/manifest.json$", name)
    ]
    assert (
        digests["checkpoint/model.safetensors"]["sha256"]
        == undisturbed.manifest.files["checkpoint/model.safetensors"].sha256
    )
    assert not Path("s3:").exists()


@pytest.mark.slow
def test_training_does_not_notice_that_mlflow_is_away(tmp_path: Path) -> None:
    port = free_port()
    environment = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    with mlflow_server(tmp_path, port):
        driver = Driver(tmp_path / "storage", *LONG, environment=environment)
        driver.wait_for(r"step +60/")
    driver.wait_for(r"step +250/")
    with mlflow_server(tmp_path, port):
        counts = driver.end()
        client = mlflow.MlflowClient(tracking_uri=environment["MLFLOW_TRACKING_URI"])
        history = client.get_metric_history(str(counts["mlflow_run_id"]), "train/loss")
        assert [metric.step for metric in history] == list(range(1, 301))
        samples = client.list_artifacts(str(counts["mlflow_run_id"]), "samples")
        assert len(samples) == 4


@pytest.mark.slow
def test_killed_process_of_every_rank_from_outside(undisturbed: Training, tmp_path: Path) -> None:
    driver = Driver(tmp_path, *LONG)
    driver.wait_for(r"step +50/")
    for process in psutil.Process(driver.process.pid).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
    assert driver.end()["restarts"] == 1
