"""What can be known of a start, and of a run to extend, is said before Ray starts."""

from pathlib import Path

import pytest

from jobs import pipeline, plan
from jobs.command import run_stage
from tests.pipeline.tiny_registry import tiny_tokenizer
from tests.pipeline.tiny_start import PADDING, write_start


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", refuse)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start"), "gpt2", tiny_tokenizer())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["start.model=nowhere"], "start.model=nowhere is not there; name a Hugging Face folder."),
        (["start.model=hf://nobody/nothing"], "The hub has no answer for 'nobody/nothing'"),
        (["start.model=models:/x@y"], "there is no registry at sqlite:///"),
        (["start.model={start}", "model.width=64"], "model.width=64 contradicts start.model="),
        (["start.model={start}", "train.batch_tokens=100"], "not a multiple of model.context_length, 64"),
        (["tokenizer.kind=start"], "start.model, which is empty"),
        (["train.steps=20", "--extend"], "--extend goes on from a finished run, and"),
    ],
)
def test_it_is_one_sentence_and_exit_status_2(
    words: list[str],
    sentence: str,
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    words = [f"storage={tmp_path}", "name=tiny", *(word.format(start=start) for word in words)]
    assert pipeline.main(words) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert "hf_secret" not in said.out + said.err
    if "--extend" in words:
        assert run_stage("train", "", words) == 2


def test_a_plan_counts_the_starts_parameters(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["train.batch_tokens=512", "train.sample_tokens=4", "evaluate.sample_tokens=4", f"storage={tmp_path}"]
    assert plan.main([f"start.model={start}", "name=tiny", *settings]) == 0
    said = capsys.readouterr().out
    assert f"vocabulary {tiny_tokenizer().vocab_size + PADDING:,}\n" in said
    assert "tiny: classic, 2 layers, width 48" in said
    assert not list(tmp_path.iterdir()), "it only calculates"


def test_a_plan_of_a_start_that_cannot_be_read_goes_by_the_presets_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["gpt-53m-chat", f"storage={tmp_path}"]) == 0
    assert "What follows is calculated from the model.* settings" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
