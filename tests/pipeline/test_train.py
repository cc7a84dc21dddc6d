"""A training end to end on tiny shards: what it leaves behind, and that its numbers depend on nothing else."""

import json
import math
import platform
import re
import shlex
import sys
from pathlib import Path

import mlflow
import pytest
import torch
import transformers

from model.checkpoint import load_model
from pipeline import tracking, train
from pipeline.artifacts import Artifact
from pipeline.config import Config
from tests.pipeline.tiny_training import Training, start_training, tiny_config, tiny_inputs, tiny_output


@pytest.fixture(scope="module")
def training(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Twelve steps on two workers."""
    return start_training(str(tmp_path_factory.mktemp("storage")))


def test_manifest_says_what_was_made(training: Training) -> None:
    counts = training.manifest.counts
    assert counts["steps"] == 12
    assert counts["tokens"] == 12 * 256
    assert 0 < counts["bits_per_byte"] < 8
    assert counts["best_step"] in (6, 12)
    assert counts["restarts"] == 0
    assert counts["device"] == "cpu"
    assert {"loss.png", "config.yaml", "checkpoint/model.safetensors"} <= training.manifest.files.keys()
    assert not any("training_state" in name for name in training.manifest.files)


def test_loss_falls(training: Training) -> None:
    losses = training.losses()
    assert list(losses) == list(range(1, 13))
    assert losses[12] < losses[1] - 0.3
    assert losses[1] == pytest.approx(math.log(300), abs=0.1)  # the first guess is uniform


def test_checkpoint_opens_in_transformers(training: Training, tmp_path: Path) -> None:
    records = {name: record for name, record in training.manifest.files.items() if name.startswith("checkpoint/")}
    folder = training.output.download(tmp_path, records) / "checkpoint"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 300, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, load_model(folder)(tokens), atol=1e-4, rtol=0)


def test_mlflow_run_holds_every_figure_once_per_step(training: Training) -> None:
    history = training.metric_history()
    for name in (
        "train/loss",
        "train/bits_per_byte",
        "train/gradient_norm",
        "learning_rate/matrices",
        "speed/tokens_per_second",
        "speed/mfu",
        "memory/worker_gigabytes",
        "system/cpu_utilization_percentage",
        "time/compute_seconds",
    ):
        assert [metric.step for metric in history(name)] == list(range(1, 13)), name
    assert [metric.step for metric in history("validation/bits_per_byte")] == [0, 6, 12]
    assert [metric.step for metric in history("weights/norm")] == [0, 6, 12]


def test_mlflow_run_says_where_it_comes_from(training: Training) -> None:
    run = training.mlflow_run()
    assert run.info.status == "FINISHED"
    assert run.data.params["train.batch_tokens"] == "256"
    assert run.data.params["fingerprint"] == training.output.fingerprint
    tags = run.data.tags
    assert re.fullmatch("[0-9a-f]{40}", tags["mlflow.source.git.commit"])
    assert tags["command"] == shlex.join(sys.orig_argv)[: tracking.LONGEST_TAG]
    assert tags["machine.python"] == platform.python_version()
    assert tags["machine.torch"] == torch.__version__
    assert tags["machine.precision"] == "float32"
    assert (tags["machine.threads"], tags["machine.workers"], tags["machine.gpu"]) == ("1", "2", "none")
    assert {"machine.ray", "machine.processor"} <= tags.keys()
    digests = {each.dataset.name: each.dataset.digest for each in run.inputs.dataset_inputs}
    assert digests == {name: artifact.fingerprint for name, artifact in training.inputs.items()}


def test_mlflow_run_holds_config_samples_and_loss_plot(training: Training, tmp_path: Path) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(run_id=training.mlflow_run().info.run_id, dst_path=str(tmp_path)))
    assert "batch_tokens: 256" in (folder / "config.yaml").read_text()
    samples = sorted(path.name for path in (folder / "samples").iterdir())
    assert samples == ["step_00000000.txt", "step_00000006.txt", "step_00000012.txt"]
    assert (folder / "samples/step_00000012.txt").read_text().startswith("[The ]")
    assert (folder / "loss.png").read_bytes() == training.output.read_bytes("loss.png")


def test_time_split_adds_up_to_the_wall_clock(training: Training) -> None:
    seconds = training.manifest.counts["seconds"]
    started = json.loads(training.output.read_text("run.json"))["started"]
    history = training.history()
    assert sum(history.seconds.values()) == pytest.approx(history.saved - started, abs=0.5)
    assert seconds["compute"] > 0
    assert seconds["evaluation"] > 0


def test_nothing_is_left_of_the_machinery(training: Training) -> None:
    files = training.output.list_files()
    assert not any(name.startswith("ray/") for name in files)
    kept = {name.split("/")[1].split("-")[1] for name in files if name.startswith("checkpoints/")}
    assert kept == {"00000012"}  # the last one is the best, and going on needs no other


def test_the_weights_lie_on_the_disk_once(training: Training) -> None:
    files = training.output.list_files()
    weights = [Path(training.output.file(name)) for name in files if name.endswith(".safetensors")]
    assert len(weights) == 2
    assert len({path.stat().st_ino for path in weights}) == 1


def test_a_finished_run_may_keep_its_model_alone(ray_session: None, tmp_path: Path, training: Training) -> None:
    alone = start_training(str(tmp_path), "train.keep_training_state=false")
    assert alone.output.fingerprint == training.output.fingerprint
    assert not any(name.startswith("checkpoints") for name in alone.output.list_files())
    assert not Path(alone.output.file("checkpoints")).exists()
    assert alone.manifest.files.keys() == training.manifest.files.keys()
    for name in alone.manifest.files:
        assert alone.output.exists(name)


def test_same_seed_gives_the_same_bits(training: Training, tmp_path: Path) -> None:
    again = start_training(str(tmp_path))
    assert again.losses() == training.losses()
    assert again.weights_digest() == training.weights_digest()


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_computes_the_same(training: Training, tmp_path: Path, workers: int) -> None:
    other = start_training(str(tmp_path), f"train.num_workers={workers}", "train.cpus_per_worker=0.5")
    assert other.output.fingerprint == training.output.fingerprint
    losses = other.losses()
    for step, loss in training.losses().items():
        assert losses[step] == pytest.approx(loss, rel=2e-5), step


def test_infinite_loss_stops_at_once_and_names_the_batch(ray_session: None, tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), "optimizer.head_learning_rate=1e30", "optimizer.embedding_learning_rate=1e30")
    with pytest.raises(ValueError, match=r"The loss of step [23] is .*(nan|inf).*bad_batch_step") as raised:
        start_training(str(tmp_path), config=config)
    assert "\n" not in str(raised.value)
    [name] = Path(tmp_path).glob("tiny/train-*/bad_batch_step_*.json")  # MLflow has a copy
    assert len(json.loads(name.read_text())["rows"]) == 8
    losses = mlflow.MlflowClient().search_runs([mlflow.get_experiment_by_name("tiny").experiment_id])
    assert [run.info.status for run in losses] == ["FAILED"]


def test_a_model_that_does_not_fit_names_the_settings_to_change(ray_session: None, tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), f"model.mlp_width={2**36}")
    with pytest.raises(ValueError, match=r"Out of memory: .* estimate of `jobs.plan` is \d+") as raised:
        start_training(str(tmp_path), config=config)
    assert "train.sharding=fsdp, or lower model.num_layers" in str(raised.value)
    assert "\n" not in str(raised.value)


def check(config: Config, inputs: dict[str, Artifact]) -> None:
    train.check_inputs(config, inputs)


def test_bad_input_is_refused_in_one_sentence(storage: str) -> None:
    config = tiny_config(storage)
    inputs = tiny_inputs(config, documents=20)
    long = "the cat sat on the mat and " * 5
    for settings, words in (
        (["train.batch_tokens=8192"], "corpus is too small"),
        (["train.batch_tokens=100"], "not a multiple"),
        (["train.num_workers=9"], "too few for 9 workers"),
        ([f"train.sample_prompts=[{long}]"], "train.sample_prompts holds 'the cat"),
        ([f"evaluate.prompts=[The, {long}]"], "evaluate.prompts holds 'the cat.*do not fit model.context_length, 32"),
    ):
        with pytest.raises(ValueError, match=words) as raised:
            check(tiny_config(storage, *settings), inputs)
        assert "\n" not in str(raised.value)


def test_shards_of_another_vocabulary_are_refused(storage: str, tmp_path: Path) -> None:
    inputs = tiny_inputs(tiny_config(storage))
    others = tiny_inputs(tiny_config(str(tmp_path / "other")), vocabulary_size=280)
    with pytest.raises(ValueError, match="another vocabulary"):
        check(tiny_config(storage), inputs | {"tokenizer": others["tokenizer"]})


def test_changed_config_under_an_old_name_is_refused_with_the_difference(storage: str) -> None:
    config = tiny_config(storage, "train.run=mine")
    inputs = tiny_inputs(config)
    output = tiny_output(config, inputs)
    output.write_text(
        "run.json",
        json.dumps(
            {"fingerprint": "0" * 20, "settings": train.settings(config) | {"model.width": 64}, "mlflow_run_id": "x"}
        ),
    )
    with pytest.raises(ValueError, match=r"model\.width was 64 and is now 32\..*train\.run"):
        train.open_run(config, inputs, output)


def test_settings_of_speed_do_not_change_the_fingerprint() -> None:
    plain = train.settings(tiny_config("x"))
    assert plain == train.settings(tiny_config("y", "train.num_workers=4", "train.compile=true", "train.run=mine"))
    assert plain != train.settings(tiny_config("x", "train.steps=13"))


@pytest.mark.slow
def test_two_workers_of_which_one_compiles_learn_as_uncompiled_ones(ray_session: None, tmp_path: Path) -> None:
    losses = [
        start_training(str(tmp_path / compiled), f"train.compile={compiled}", "train.num_workers=2").losses()
        for compiled in ("true", "false")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
