from dataclasses import replace

import mlflow
import pytest

from pipeline import register, tracking
from pipeline.artifacts import Artifact, Manifest, artifact_at
from pipeline.config import Config, RegisterConfig, load_config
from pipeline.registry import PROBE_TAG


@pytest.fixture
def config(storage: str) -> Config:
    return load_config(None, [f"storage={storage}", "name=tiny"])


def finished(config: Config, stage: str, counts: dict[str, object], **files: str) -> Artifact:
    artifact = artifact_at(config.storage, config.name, stage, stage[0] * 20)
    records = {name: artifact.write_text(name, text) for name, text in files.items()}
    artifact.commit(counts, records)
    return artifact


@pytest.fixture
def inputs(config: Config) -> dict[str, Artifact]:
    tracking.connect(config)
    with mlflow.start_run() as run:
        run_id = run.info.run_id
    counts = {"mlflow_run_id": run_id, "num_parameters": 7}
    return {
        "tokenizer": finished(config, "tokenizer", {}),
        "prepare": finished(config, "prepare", {}),
        "train": finished(config, "train", counts, **{"checkpoint/model.safetensors": "weights"}),
        "evaluate": finished(config, "evaluate", {"bits_per_byte": 1.5, PROBE_TAG: 2.5}),
    }


def run(config: Config, inputs: dict[str, Artifact], fingerprint: str = "9" * 20) -> Manifest:
    return register.run(config, inputs, artifact_at(config.storage, config.name, "register", fingerprint))


def champion(name: str = "tiny") -> mlflow.entities.model_registry.ModelVersion:
    return mlflow.MlflowClient().get_model_version_by_alias(name, "champion")


def test_a_version_says_where_it_came_from(config, inputs):
    run(config, inputs)
    tags = champion().tags
    assert tags["data_digest"] == inputs["prepare"].fingerprint
    assert tags["bits_per_byte"] == "1.50000"
    assert tags["checkpoint_url"].endswith("/checkpoint")
    assert champion().run_id == tags["mlflow_run_id"]


def test_a_version_holds_the_weights_and_no_pickle(config, inputs, tmp_path):
    run(config, inputs)
    folder = mlflow.artifacts.download_artifacts("models:/tiny@champion", dst_path=str(tmp_path))
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert "model.safetensors" in names
    assert not {name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".bin"))}, folder


def test_the_same_model_stays_one_version_and_another_becomes_the_champion(config, inputs):
    first = run(config, inputs).counts["version"]
    assert run(config, inputs).counts["version"] == first
    second = run(config, inputs, "8" * 20).counts["version"]
    assert str(champion().version) == second != first


def test_it_no_longer_holds_once_the_alias_has_moved(config, inputs):
    first = run(config, inputs)
    assert register.still_holds(config, first)
    run(config, inputs, "8" * 20)
    assert not register.still_holds(config, first)


def test_the_name_can_be_chosen(config, inputs):
    chosen = replace(config, register=replace(config.register, model_name="chosen"))
    assert run(chosen, inputs).counts["model_name"] == "chosen"
    assert champion("chosen")


def test_a_run_that_was_deleted_before_takes_the_version(config, inputs):
    run_id = inputs["train"].manifest().counts["mlflow_run_id"]
    mlflow.MlflowClient().delete_run(run_id)
    run(config, inputs)
    assert champion().run_id == run_id


def test_a_version_whose_run_is_gone_for_good_gets_another(config, inputs):
    inputs["train"].commit({"mlflow_run_id": "0" * 32, "num_parameters": 7}, inputs["train"].manifest().files)
    run(config, inputs)
    assert champion().run_id == champion().tags["mlflow_run_id"] != "0" * 32


@pytest.mark.parametrize("deleted", ["the registered model", "the version", "the version's files"])
def test_what_was_deleted_in_the_registry_is_registered_again(config, inputs, deleted):
    first = run(config, inputs)
    client, version = mlflow.MlflowClient(), champion()
    if deleted == "the registered model":
        client.delete_registered_model("tiny")
    elif deleted == "the version":
        client.delete_model_version("tiny", version.version)
    else:
        client.delete_logged_model(version.source.removeprefix("models:/"))
    assert not register.still_holds(config, first)
    assert register.still_holds(config, run(config, inputs))
    assert champion().source != version.source


@pytest.mark.parametrize("name", ["it's", 'a "b"', "a/b", "a:b", "`x`"])
def test_a_name_that_the_registry_cannot_search_for_is_refused_with_the_settings(name):
    with pytest.raises(ValueError, match=r"register\.model_name is "):
        RegisterConfig(model_name=name)
