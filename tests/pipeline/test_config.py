import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from model.settings import setting
from pipeline.config import SourceConfig, describe_settings, load_config, result_settings, to_yaml


def write_preset(folder: Path, text: str) -> Path:
    path = folder / "preset.yaml"
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_preset_which_wins_over_the_defaults(tmp_path):
    preset = write_preset(tmp_path, "name: tiny\ntrain:\n  steps: 7\n  batch_tokens: 2048\n")
    config = load_config(preset, ["train.steps=9"])
    assert (config.name, config.train.steps, config.train.batch_tokens) == ("tiny", 9, 2048)
    assert config.tokenizer.kind == "bpe"


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    config = load_config(None, ["train.steps=9", "source.kind=files", "source.paths=[a.txt,b.jsonl]"])
    assert load_config(write_preset(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=5", r"There is no setting 'train.stepz'. Did you mean 'train.steps'?"),
        ("trian.steps=5", r"Did you mean 'train.steps'?"),
        ("train.steps=many", "train.steps is 'many'; it takes a whole number"),
        ("train.steps=", "train.steps is ''; it takes a whole number"),
        ("train.steps=1.5", "it takes a whole number"),
        ("train.compile=maybe", "train.compile is 'maybe'; it takes true or false"),
        ("model.dropout=nan", "model.dropout is 'nan'; it takes a number"),
        ("train.num_workers=[2,many]", "it takes a whole number, or two in brackets"),
        ("train.num_workers=[4,2]", "use a positive number or [least, most]"),
        ("train.num_workers=[2]", "use a positive number or [least, most]"),
        ("name=", "name is ''; use up to 63"),
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
        ("evaluate.prompts=hello", "evaluate.prompts is 'hello'; it takes a list; write [first,second]"),
        ("tokenizer.vocabulary_size=99999999999", "at most"),
        ("register.model_name=a/b", "register.model_name is 'a/b'; use up to 250 letters"),
        ("register.model_name=Ada's", "use up to 250 letters"),
        ("train.batch_tokens=1000", "train.batch_tokens is 1000, not a multiple of model.context_length, 1024"),
        ("train.num_workers=300", "is 256 sequences of 1024, too few for 300 workers"),
        ("model.context_length=64", "train.sample_tokens is 64, which with the prompt before it does not fit"),
        ("evaluate.sample_tokens=1024", "evaluate.sample_tokens is 1024, which with the prompt"),
        ("register.alias=latest", "neither 'latest' nor 'v1'"),
        ("register.alias=V3", "neither 'latest' nor 'v1'"),
    ],
)
def test_a_bad_setting_is_one_sentence(override, sentence):
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(None, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["/data/run #2/st", "010", "2024.10", "12:30", "no", "null", "[a]", "{a: b}", " x"])
def test_a_string_setting_takes_its_text_as_it_stands(given):
    assert load_config(None, [f"source.text_column={given}"]).source.text_column == given


@example(text="\x85 \u2028 \u2029")
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis_settings(max_examples=100, deadline=None)
def test_every_text_comes_back_from_the_resolved_config(text, tmp_path_factory):
    config = load_config(None, [f"source.text_column={text}"])
    config = replace(config, evaluate=replace(config.evaluate, prompts=[text, "x"]))
    assert load_config(write_preset(tmp_path_factory.mktemp("preset"), to_yaml(config))) == config


@pytest.mark.parametrize("written", ["2024.10", "010", "no", "12:30", "1_0", "null", "'no'", '"a # b"'])
def test_a_preset_too_takes_strings_as_they_stand(tmp_path, written):
    preset = write_preset(tmp_path, f"source:\n  text_column: {written}  # the column\n")
    assert load_config(preset).source.text_column == written.strip("'\"")


@pytest.mark.parametrize(
    ("given", "items"),
    [
        ("[He said: hi]", ["He said: hi"]),
        ("[a,b , c]", ["a", "b", "c"]),
        ("[]", []),
        ('["The ", \'it\'\'s, so\', "say \\"x\\""]', ["The ", "it's, so", 'say "x"']),
        ("[it's #1, no, 010]", ["it's #1", "no", "010"]),
        ("[books/[a-c]*.txt]", ["books/[a-c]*.txt"]),
    ],
)
def test_the_items_of_a_list_are_texts(given, items):
    assert load_config(None, [f"evaluate.prompts={given}"]).evaluate.prompts == items


def test_numbers_switches_and_ranges_are_read_as_people_write_them():
    config = load_config(
        None,
        ["train.steps=20_000", " seed = 010 ", "train.compile=Yes", "optimizer.beta1=.5", "train.num_workers=[2,4]"],
    )
    assert (config.train.steps, config.seed, config.train.compile, config.optimizer.beta1) == (20000, 10, True, 0.5)
    assert config.train.num_workers == [2, 4]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"- a list", "It is not a YAML mapping of settings"),
        (b"train: {steps: [", "It is not valid YAML in line 1, column 17: while parsing a flow node expected"),
        (b"name: x\ntrain:\n\tsteps: 3", "It is not valid YAML in line 3, column 1: while scanning for the next token"),
        (b"name: a\0b", "It is not valid YAML: unacceptable character #x0000"),
        (b"train:\n  ? [steps, run]\n  : 3", "The key in line 2 is no text"),
        (b"train.steps: 3\ntrain: {steps: 4}", "'train.steps' stands there twice"),
        (b"train:\n  stepz: 3", "Did you mean 'train.steps'?"),
        (b"train:\n  steps: [3]", "train.steps is ['3']; it takes a whole number"),
        (b"train:\n  steps: 3\nname: x\ntrain:\n  run: x", "'train' stands there twice, again in line 4"),
        (b"train:\n  steps: 3\n  steps: 4", "'steps' stands there twice, again in line 3"),
        (b"evaluate:\n  prompts: [He said: hi]", "it takes a list of texts; put each into quotes"),
        ("name: x # \u00e9".encode("latin-1"), "It is not UTF-8 text (byte 10)"),
        ("name: x".encode("utf-16"), "It is not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_bad_preset_is_one_sentence_that_names_the_file(tmp_path, content, sentence):
    preset = tmp_path / "preset.yaml"
    preset.write_bytes(content)
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(preset)
    assert str(caught.value).startswith(f"{preset}: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_section_with_nothing_in_it_changes_nothing(tmp_path):
    assert load_config(write_preset(tmp_path, "train:\nname: x\n")) == load_config(None, ["name=x"])


def test_a_byte_order_mark_is_no_part_of_a_preset(tmp_path):
    (tmp_path / "preset.yaml").write_bytes("name: x".encode("utf-8-sig"))
    assert load_config(tmp_path / "preset.yaml").name == "x"


def test_a_preset_goes_by_its_path_or_by_its_name(tmp_path, monkeypatch):
    by_path = load_config("jobs/presets/demo.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config("demo") == by_path


def test_a_missing_preset_names_those_there_are():
    with pytest.raises(
        ValueError, match=r"no preset 'nowhere.yaml'.*one of books, demo, demo-chat, gpt-100m, gpt-53m,"
    ):
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


@pytest.mark.parametrize(
    ("mix", "sentence"),
    [
        ([], "go together"),
        (["files a.txt"], "write WEIGHT KIND"),
        (["1"], "write WEIGHT KIND"),
        (["1 'files a.txt"], "write WEIGHT KIND"),
        (["nan files a.txt"], "above 0"),
        (["-1 files a.txt"], "above 0"),
        (["1 mix a.txt"], "its kind can be"),
        (["1 files"], "source.kind=files needs source.paths"),
        (["1 files a.txt split_text=lines"], "source.split_text can be"),
        (["1 files a.txt name=a/b"], "a name has up to"),
        (["1 files x/a.txt", "1 files y/a.txt"], "several sources named 'a'"),
        (["1 files a.txt", "5000 files b.txt"], "less than 0.1%"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(mix: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        SourceConfig(kind="mix", mix=mix)


def test_a_mix_names_its_sources_by_their_paths_and_they_share_its_settings() -> None:
    items = [
        "2 files 'some books/*.txt.zst' split_text=files",
        "1 files s3://bucket/date=2024/",
        "1 conversations hf://datasets/me/talks@v1/*.parquet",
        "0.5 python-docs",
        "0.5 files x.jsonl name=base text_column=body",
    ]
    parts = SourceConfig(kind="mix", mix=items, split_text="blank-lines").parts()
    assert [part.name for part in parts] == ["somebooks", "date2024", "talks", "python-docs", "base"]
    assert [part.weight for part in parts] == [2, 1, 1, 0.5, 0.5]
    assert parts[0].source == SourceConfig(kind="files", paths=["some books/*.txt.zst"])
    assert parts[4].source == SourceConfig(
        kind="files", paths=["x.jsonl"], text_column="body", split_text="blank-lines"
    )
