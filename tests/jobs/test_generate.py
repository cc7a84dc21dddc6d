"""`python -m jobs.generate`: an answer in the terminal, without a server."""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import generate
from tests.infra.manifests import ROOT
from tests.pipeline.tiny_registry import TinyRegistry, make_registry

PROMPT = "Return a new"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    found = make_registry(tmp_path_factory.mktemp("registry"))
    found.add_version(seed=1, alias="champion")
    found.add_version(seed=2, alias="other")
    return found


@pytest.fixture
def settings(registry: TinyRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    preset = tmp_path / "tiny.yaml"
    preset.write_text("name: tiny\n")
    return [f"--preset={preset}"]


class Asked:
    """Runs the command and gives what it printed."""

    def __init__(self, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        self._settings = settings
        self._capsys = capsys

    def __call__(self, *words: str, prompt: str = PROMPT) -> str:
        assert generate.main([prompt, *self._settings, "--max-tokens", "12", *words]) == 0
        return self._capsys.readouterr().out


@pytest.fixture
def ask(settings: list[str], capsys: pytest.CaptureFixture[str]) -> Asked:
    return Asked(settings, capsys)


def test_answers_the_same_with_a_seed(ask: Asked) -> None:
    first = ask("--seed", "1")
    assert first.startswith(PROMPT)
    assert len(first) > len(f"{PROMPT}\n")
    assert ask("--seed", "1", "--no-echo") == first.removeprefix(PROMPT)
    assert len({ask("--seed", str(seed)) for seed in range(1, 5)}) > 1


def test_each_option_reaches_the_sampling(ask: Asked) -> None:
    """Temperature 0, the likeliest token alone and the smallest share of probability are all one greedy answer."""
    greedy = ask("--temperature", "0")
    assert ask("--top-k", "1", "--seed", "3") == greedy
    assert ask("--top-k", "0", "--top-p", "0.000001", "--seed", "3") == greedy
    hot = {ask("--temperature", "3", "--top-k", "0", "--seed", str(seed)) for seed in range(3)}
    assert len(hot) == 3
    assert greedy not in hot


def test_max_tokens_and_stop_end_the_answer(ask: Asked) -> None:
    seeds = (("--seed", str(seed), "--temperature", "1") for seed in range(50))
    seed = next(seed for seed in seeds if len(ask(*seed)) > len(PROMPT) + 12)  # one whose answer does not end early
    whole, shorter = (ask(*seed, *more).removesuffix("\n") for more in ((), ("--max-tokens", "4")))
    assert len(shorter) < len(whole)
    assert whole.startswith(shorter)
    answer = whole.removeprefix(PROMPT)
    first, second = answer[5], answer[3]
    stopped = ask(*seed, "--stop", first, "--stop", second).removesuffix("\n")
    assert stopped == PROMPT + answer[: min(answer.index(first), answer.index(second))]


def test_a_version_is_chosen_by_number_and_by_alias(ask: Asked) -> None:
    champion, other = ask("--temperature", "0"), ask("--temperature", "0", "--version", "2")
    assert champion != other
    assert ask("--temperature", "0", "--version", "other") == other
    assert ask("--temperature", "0", "--version", "1") == champion


def test_the_prompt_may_come_from_standard_input(ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert ask("--temperature", "0", prompt="-") == ask("--temperature", "0")


def test_settings_name_another_model(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([PROMPT, *settings, "register.model_name=tiny", "name=another", "--max-tokens", "2"]) == 0
    capsys.readouterr()
    assert generate.main([PROMPT, *settings, "name=another"]) == 2
    said = capsys.readouterr().err
    assert "has no model 'another'" in said
    assert "It has tiny: give name=NAME" in said


def test_the_readmes_lines_are_about_one_model() -> None:
    """Who follows them in order trains `mine`, serves it and asks it."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    # Later ones start from other weights, under names of their own.
    trained, *_ = [line for line in lines if line.startswith("python -m jobs.pipeline") and "name=" in line]
    [served] = [line for line in lines if line.startswith("python -m jobs.serve")]
    asked, batch = [line for line in lines if line.startswith("python -m jobs.generate")]
    for line in (trained, served, asked, batch):
        assert re.findall(r"name=(\S+)", line.partition("#")[0]) == ["mine"], line
    options = generate.build_parser().parse_intermixed_args(shlex.split(asked, comments=True)[3:])
    assert options.settings == ["name=mine"]


def test_bad_input_is_one_sentence(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for extra, says in [
        (["--version", "9"], "has no version '9'"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--max-tokens", "5000"], "context"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--stop", ""], "empty"),
        (["serve.prot=1"], "serve.port"),
        (["--input", "nowhere.jsonl", "--output", "answers.jsonl"], "'x' is not a setting"),
    ]:
        assert generate.main(["x", *settings, *extra]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert says in captured.err
        assert captured.err.count("\n") == 1


def test_a_batch_that_cannot_begin_is_one_sentence(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    for given, output, says in [
        (tmp_path / "none.jsonl", "answers.jsonl", "nothing at"),
        (prompts, "answers.csv", ".jsonl or .parquet"),
        (prompts, "prompts.jsonl", "there already"),
    ]:
        assert generate.main([*settings, f"--input={given}", f"--output={tmp_path / output}"]) == 2
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    with pytest.raises(SystemExit):
        generate.main([*settings, f"--input={prompts}"])
    with pytest.raises(SystemExit):
        generate.main(settings)


def test_help_says_what_there_is() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "jobs.generate", "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    assert "--temperature" in result.stdout
