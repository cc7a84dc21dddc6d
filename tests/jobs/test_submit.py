import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import submit
from tests.infra.manifests import ROOT


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.submit", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_what_is_sent_is_small_and_holds_the_code_alone(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(package)], capture_output=True, text=True, check=True
    ).stdout
    assert package.stat().st_size < 5_000_000
    for needed in ("jobs/pipeline.py", "pipeline/train.py", "model/gpt.py", "jobs/presets/gpt-53m.yaml"):
        assert needed in listed
    for unwanted in (".git/", ".venv/", "artifacts/", "tests/", "infra/", ".env", "__pycache__", ".db "):
        assert f" {unwanted}" not in f" {listed}".replace("\n", "\n "), unwanted


def test_without_a_cluster_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="make cluster"):
        submit.cluster_address()
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ValueError, match=r"dashboard of the head.*RAY_API_SERVER_ADDRESS=http://HEAD:8265"):
        submit.cluster_address()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    assert submit.cluster_address() == "http://head:8265"


def test_a_cluster_that_does_not_answer_is_one_sentence() -> None:
    done = run("jobs/presets/demo.yaml", "storage=s3://x/y", RAY_API_SERVER_ADDRESS="http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: No Ray cluster answers at http://127.0.0.1:9")
    assert done.stderr.count("\n") == 1


def test_the_cluster_of_this_machine_is_found_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    lines = "export RAY_API_SERVER_ADDRESS='http://127.0.0.2:5'\nexport RAY_AUTH_MODE=token\n"
    (tmp_path / "environment").write_text(lines + "export AWS_SECRET_ACCESS_KEY=x\n")
    submit.use_local_cluster(tmp_path / "environment")
    assert submit.cluster_address() == "http://127.0.0.2:5"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ, "keys are the cluster's own"


def test_a_cluster_that_the_shell_names_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://mine:8265")
    (tmp_path / "environment").write_text("export RAY_API_SERVER_ADDRESS=http://other:8265\n")
    submit.use_local_cluster(tmp_path / "environment")
    assert submit.cluster_address() == "http://mine:8265"


def test_presets_are_named_as_the_cluster_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "jobs")
    assert submit.relative_preset("presets/demo.yaml") == "jobs/presets/demo.yaml"
    with pytest.raises(ValueError, match="copy it in there"):
        submit.relative_preset(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        (["--job", "prepare"], ["prepare", "jobs/presets/demo.yaml", "storage=s3://x/y"]),
        (
            ["--job", "generate", "--prompt", "Once upon"],
            ["generate", "Once upon", "--preset", "jobs/presets/demo.yaml", "storage=s3://x/y"],
        ),
        (["--serve"], ["pipeline", "jobs/presets/demo.yaml", "storage=s3://x/y", "--serve"]),
    ],
)
def test_each_job_gets_its_words_as_it_reads_them(
    monkeypatch: pytest.MonkeyPatch, words: list[str], sent: list[str]
) -> None:
    from jobs import generate

    submitted: list[list[str]] = []

    def note(client: object, config: object, job: str, arguments: list[str]) -> str:
        submitted.append([job, *arguments])
        return "job-1"

    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    monkeypatch.setattr(submit, "connect", lambda address: None)
    monkeypatch.setattr(submit, "submit", note)
    common = ["jobs/presets/demo.yaml", "storage=s3://x/y", "--skip-preflight", "--detach"]
    assert submit.main([*common, *words]) == 0
    assert submitted == [sent]
    if sent[0] == "generate":
        options = generate.build_parser().parse_intermixed_args(sent[1:])
        assert (options.prompt, options.preset, options.settings) == ("Once upon", sent[3], ["storage=s3://x/y"])


@pytest.mark.parametrize("words", [["--job", "generate"], ["--prompt", "x"], ["--job", "prepare", "--prompt", "x"]])
def test_a_prompt_is_generates_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    monkeypatch.setattr(submit, "connect", lambda address: None)
    assert submit.main(["jobs/presets/demo.yaml", "storage=s3://x/y", *words]) == 2
    assert "--prompt TEXT" in capsys.readouterr().err


def test_make_submit_takes_a_name_or_a_path() -> None:
    for preset in ("demo", "jobs/presets/demo.yaml"):
        command = ["make", "--dry-run", "submit", f"PRESET={preset}", "SET=storage=s3://gpt/x seed=2", "JOB=prepare"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "-m jobs.submit jobs/presets/demo.yaml storage=s3://gpt/x seed=2 --job prepare" in shown
