from dataclasses import dataclass
from pathlib import Path

import pytest

from model.settings import setting
from pipeline.config import describe_settings, load_config, result_settings, to_yaml


def write_preset(folder: Path, text: str) -> Path:
    path = folder / "preset.yaml"
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_preset_which_wins_over_the_defaults(tmp_path):
    preset = write_preset(tmp_path, "name: tiny\ntrain:\n  steps: 7\n  batch_tokens: 512\n")
    config = load_config(preset, ["train.steps=9"])
    assert (config.name, config.train.steps, config.train.batch_tokens) == ("tiny", 9, 512)
    assert config.tokenizer.kind == "bpe"


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    config = load_config(None, ["train.steps=9", "source.kind=files", "source.paths=[a.txt,b.jsonl]"])
    assert load_config(write_preset(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=5", r"There is no setting 'train.stepz'. Did you mean 'train.steps'?"),
        ("trian.steps=5", r"Did you mean 'train.steps'?"),
        ("train.steps=many", "train.steps: Value 'many'"),
        ("train.steps=0", "train.steps must be positive"),
        ("train", "write section.key=value"),
        ("name=Not A Name", "lower-case letters"),
        ("source.kind=web", "it can be python-docs, files"),
        ("source.kind=files", "needs source.paths"),
        ("model.family=mamba", "it can be modern or classic"),
        ("train=5", "train is a section"),
        ("seed=-1", "seed must be at least 0"),
        ("storage=gs://bucket", "use a local folder or s3://bucket/prefix"),
        ("storage=s3://", "use a local folder or s3://bucket/prefix"),
        ("evaluate.prompts=hello", "it takes a list; write evaluate.prompts=[first,second]"),
        ("tokenizer.vocabulary_size=99999999999", "at most"),
        ("register.model_name=a/b", "MLflow allows neither"),
        ("register.alias=latest", "neither 'latest' nor 'v1'"),
        ("register.alias=V3", "neither 'latest' nor 'v1'"),
    ],
)
def test_a_bad_setting_is_one_sentence(override, sentence):
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(None, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a list", "train: {steps: [", "train:\n  stepz: 3"])
def test_a_bad_preset_is_one_sentence(tmp_path, text):
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(write_preset(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_preset_names_those_there_are():
    with pytest.raises(ValueError, match=r"There is no preset 'nowhere.yaml'"):
        load_config("nowhere.yaml")


def test_every_setting_says_what_it_means():
    assert [key for key, _, meaning in describe_settings() if not meaning] == []


def test_what_does_not_change_the_result_stays_out_of_the_fingerprint():
    assert "cache_folder" not in result_settings(load_config(None).stream)
    assert "steps" in result_settings(load_config(None).train)


def test_a_setting_added_later_enters_the_fingerprint_once_it_is_used():
    @dataclass(frozen=True)
    class Section:
        steps: int = setting(1, "there from the first day")
        tasks: list[str] = setting([], "added on a later one", added_later=True)

    assert result_settings(Section()) == {"steps": 1}
    assert result_settings(Section(tasks=["blimp"])) == {"steps": 1, "tasks": ["blimp"]}
