"""What a person reads in MLflow: names, descriptions, few parameters, data sets, and the experiment's kind."""

import json

import mlflow
import pytest

from pipeline import tracking
from pipeline.artifacts import artifact_at
from pipeline.config import Config, load_config
from pipeline.evaluation.model_card import Facts, write_card
from pipeline.records.lab_book import describe_count, name_run, name_start, write_note


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["demo"], "demo 2.6M python-docs"),
        (["gpt2-124m"], "gpt2-124m 124M openwebtext"),
        (["demo", "name=mine", "source.kind=files", "source.paths=[a/books/,b/news.txt,c.md]"],
         "mine 2.6M books+news+1 more"),
        (["demo", "name=mine", "source.kind=files", "source.paths=[books/*.txt,x/v1.5/]"], "mine 2.6M books+v1.5"),
        (["demo", "source.kind=mix", "source.mix=[3 files a/ name=code,1 files b/ name=prose]"],
         "demo 2.6M code+prose"),
    ],
)  # fmt: skip
def test_a_run_is_called_what_a_person_would_call_it(settings: list[str], name: str) -> None:
    assert name_run(load_config(settings[0], settings[1:])) == name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("hf://HuggingFaceTB/SmolLM2-135M@main", "SmolLM2-135M"),
        ("hf://Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("models:/demo@champion", "demo"),
        ("models:/demo/3", "demo"),
        ("s3://bucket/runs/train-1/checkpoint/", "checkpoint"),
    ],
)
def test_weights_to_start_from_have_a_short_name(model: str, name: str) -> None:
    assert name_start(model) == name


def test_a_number_of_parameters_is_short() -> None:
    assert [describe_count(count) for count in (7, 1500, 53.2e6, 1.3e9)] == ["7", "1.5K", "53M", "1.3B"]


def test_the_description_is_the_card_with_the_plot_and_without_the_code() -> None:
    config = load_config("demo")
    card = write_card(Facts(config, {"steps": 170, "bits_per_byte": 2.5}))
    note = write_note(card, "a" * 32)
    assert note.startswith("**2.5000 bits per byte")
    assert f"get-artifact?path=loss.png&run_uuid={'a' * 32}" in note
    assert "2.5000 bits per byte" in note
    assert "## Recipe" in note
    assert "from transformers import" in card
    assert "from transformers import" not in note
    assert "library_name" not in note
    assert "loss.png" not in write_note(card)
    long = card.replace("## Recipe", "x" * 20_000 + "\n\n## Recipe")
    assert len(write_note(long, "b")) == tracking.LONGEST_NOTE


def test_a_run_has_few_parameters_and_all_settings_in_its_file(tracked_config: Config) -> None:
    chosen = load_config(
        "demo", [f"storage={tracked_config.storage}", "name=tiny", "serve.port=9", "optimizer.warmup_steps=7"]
    )
    told = tracking.tell_settings(chosen)
    assert told["optimizer.warmup_steps"] == 7
    assert told["train.steps"] == chosen.train.steps
    assert not [key for key in told if key.startswith(("serve", "register", "evaluate", "search"))]
    assert len(told) <= 30
    run_id = tracking.open_run(chosen, None, name="x", data={}, facts={"fingerprint": "f"})
    mlflow.MlflowClient().log_text(run_id, "train:\n  log_every_steps: 9\n", "config.yaml")
    settings = tracking.read_settings(run_id)
    assert settings["train.log_every_steps"] == "9"
    assert settings["optimizer.warmup_steps"] == "7"
    assert tracking.read_settings("0" * 32) == {}


def test_a_run_says_who_made_it_and_shows_its_data(tracked_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    shards = artifact_at(tracked_config.storage, "tiny", "prepare", "5" * 20)
    shards.commit({"train": {"documents": 3, "tokens": 40, "bytes": 90, "learnt_tokens": 7}}, {})
    run_id = tracking.open_run(tracked_config, None, name="x", data={"prepare": shards}, facts={})
    run = mlflow.MlflowClient().get_run(run_id)
    assert run.data.tags["mlflow.user"] == "ada"
    (data,) = run.inputs.dataset_inputs
    assert json.loads(data.dataset.source) == {"uri": shards.url}
    assert json.loads(data.dataset.profile) == {"documents": 3, "tokens": 40, "bytes": 90}
    assert {tag.key: tag.value for tag in data.tags} == {"mlflow.data.context": "training"}


def test_experiments_open_as_model_training_also_those_from_before(tracked_config: Config) -> None:
    client = mlflow.MlflowClient()
    number = client.get_experiment_by_name("tiny").experiment_id
    assert client.get_experiment(number).tags["mlflow.experimentKind"] == "custom_model_development"
    before = client.create_experiment("from-before")
    tracking.connect(load_config(None, [f"storage={tracked_config.storage}", "name=from-before"]))
    assert client.get_experiment(before).tags["mlflow.experimentKind"] == "custom_model_development"


def test_what_is_known_of_the_data_lies_apart_from_the_trainings(tracked_config: Config) -> None:
    number = tracking.open_data_experiment(tracked_config)
    assert tracking.open_data_experiment(tracked_config) == number
    assert mlflow.MlflowClient().get_experiment(number).name == "tiny data"
