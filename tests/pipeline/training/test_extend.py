"""Which finished run `--extend` goes on from, and what stands against it; no training is run."""

import json
import time
from pathlib import Path

import pytest

from pipeline import orchestrator
from pipeline.artifacts import Artifact, artifact_at
from pipeline.config import Config
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.extend import begin_from, find_finished, suggest
from pipeline.training.goodput import ACTIVITIES
from tests.pipeline.tiny_training import tiny_config


@pytest.fixture
def storage(tmp_path: Path) -> str:
    finish(str(tmp_path))
    return str(tmp_path)


def wanted(config: Config, text: str = "1") -> Artifact:
    inputs = {
        "tokenizer": artifact_at(config.storage, config.name, "tokenizer", "1" * 20),
        "prepare": artifact_at(config.storage, config.name, "prepare", text * 20),
    }
    return orchestrator.name_output("train", config, inputs)


def finish(storage: str, *settings: str) -> Artifact:
    """Leave what a finished training leaves, with a checkpoint that is whole."""
    config = tiny_config(storage, *settings)
    artifact = wanted(config)
    steps = config.train.steps
    checkpoint = Artifact(f"{artifact.url}/checkpoints/step-{steps:08d}-0123", "checkpoint", artifact.fingerprint)
    record = checkpoint.write_text("progress.json", '{"saved": 1.0}')
    checkpoint.commit({"step": steps, "bits_per_byte": 2.0}, {"progress.json": record})
    seconds = dict.fromkeys(ACTIVITIES, 0.0) | {"compute": 60 * config.train.minutes, "startup": 1e6}
    artifact.commit({"steps": steps, "mlflow_run_id": "run", "seconds": seconds}, {})
    return artifact


def extended(storage: str, *settings: str) -> str:
    config = tiny_config(storage, *settings)
    return find_finished(config, wanted(config)).train.extends


def test_the_run_with_the_most_steps_goes_on(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert extended(storage, "train.steps=20") == wanted(tiny_config(storage)).fingerprint
    said = capsys.readouterr().out
    assert "which ended at step 12: train.steps was 12 and is now 20." in said
    longer = finish(storage, "train.steps=16", "optimizer.schedule=cosine")
    assert extended(storage, "train.steps=20") == longer.fingerprint
    assert extended(storage, "train.steps=14") == wanted(tiny_config(storage)).fingerprint


def test_what_has_begun_goes_on_with_what_it_began_with(storage: str) -> None:
    first = wanted(tiny_config(storage)).fingerprint
    finish(storage, "train.steps=20", f"train.extends={first}")
    finish(storage, "train.steps=16")
    assert extended(storage, "train.steps=20") == first, "it is done already"
    assert extended(storage, "train.steps=12") == "", "the run itself is there"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["train.steps=20", "model.width=64"], "model.width was 32 and is now 64."),
        (["train.steps=20", "seed=8"], "seed was 7 and is now 8."),
        (["train.steps=20", "train.batch_tokens=512"], "train.batch_tokens was 256 and is now 512."),
        (["optimizer.schedule=cosine"], "it ended at step 12; give a train.steps above that, which is 12 now."),
        (["train.steps=8"], "it ended at step 12"),
    ],
)
def test_what_stands_against_it_is_named(settings: list[str], sentence: str, storage: str) -> None:
    with pytest.raises(ValueError, match="--extend cannot go on from") as caught:
        extended(storage, *settings)
    assert sentence in str(caught.value)
    assert suggest(wanted(tiny_config(storage, *settings))) == ""


def test_other_text_is_another_training(storage: str) -> None:
    config = tiny_config(storage, "train.steps=20")
    with pytest.raises(ValueError, match="its prepare differ, so that this is another training"):
        find_finished(config, wanted(config, text="2"))


def test_without_a_finished_run_there_is_nothing_to_extend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"goes on from a finished run, and .* holds none"):
        extended(str(tmp_path), "train.steps=20")


def test_a_run_whose_moments_are_gone_says_what_is_left(storage: str) -> None:
    Artifact(f"{wanted(tiny_config(storage)).url}/checkpoints", "checkpoint", "").delete()
    with pytest.raises(ValueError, match=r"is gone\. Its weights are left: start.model=.*/checkpoint begins a new run"):
        extended(storage, "train.steps=20")


def test_without_extend_the_difference_is_shown(storage: str) -> None:
    said = suggest(wanted(tiny_config(storage, "train.steps=20")))
    assert "train.steps was 12 and is now 20. With --extend it goes on from step 12" in said


def test_its_checkpoint_lies_where_the_new_run_looks_and_its_time_begins_now(storage: str) -> None:
    config = tiny_config(storage, "train.steps=20")
    config = find_finished(config, wanted(config))
    output = wanted(config)
    before = time.time()
    note = begin_from(config, output)
    assert note["mlflow_run_id"] == "run"
    assert note["started"] >= before
    [(name, manifest)] = CheckpointStore(output, 1).whole()
    assert manifest.counts["step"] == 12
    assert json.loads(output.read_text(f"checkpoints/{name}/progress.json"))["saved"] == 0
    assert begin_from(config, output), "killed there, it begins again"


def test_a_timed_run_goes_on_for_more_minutes_or_to_more_steps(tmp_path: Path) -> None:
    storage = str(tmp_path)
    artifact = finish(storage, "train.minutes=5")
    for settings in ("train.minutes=8", "train.steps=20"):
        assert extended(storage, settings) == artifact.fingerprint, settings
    with pytest.raises(ValueError, match=r"it worked for 5\.0 minutes; give train.minutes above that, not 4"):
        extended(storage, "train.minutes=4")


def test_a_run_with_a_name_keeps_its_folder_when_it_is_extended(tmp_path: Path) -> None:
    storage = str(tmp_path)
    first = finish(storage, "train.run=first")
    config = tiny_config(storage, "train.run=first", "train.steps=20")
    longer = wanted(find_finished(config, wanted(config)))
    assert longer.url == f"{first.url}-{longer.fingerprint[:8]}"
