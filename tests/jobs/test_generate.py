"""`python -m jobs.generate`: an answer in the terminal, without a server."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs import generate
from tests.pipeline.tiny_registry import TinyRegistry, make_registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    found = make_registry(tmp_path_factory.mktemp("registry"))
    found.add_version(seed=1, alias="champion")
    return found


@pytest.fixture
def settings(registry: TinyRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    preset = tmp_path / "tiny.yaml"
    preset.write_text("name: tiny\n")
    return [f"--preset={preset}"]


def test_answers_the_same_with_a_seed(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["Return a new", *settings, "--seed", "1", "--max-tokens", "12"]
    assert generate.main(command) == 0
    first = capsys.readouterr().out
    assert first.startswith("Return a new")
    assert len(first) > len("Return a new\n")
    assert generate.main([*command, "--no-echo"]) == 0
    assert "Return a new" + capsys.readouterr().out == first


def test_bad_input_is_one_sentence(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for extra, says in [
        (["--version", "9"], "has no version '9'"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--max-tokens", "5000"], "context"),
        (["serve.prot=1"], "serve.port"),
    ]:
        assert generate.main(["x", *settings, *extra]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert says in captured.err
        assert captured.err.count("\n") == 1


def test_help_says_what_there_is() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "jobs.generate", "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    assert "--temperature" in result.stdout
