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
    for preset in ("presets/demo.yaml", "demo"):
        assert submit.relative_preset(preset) == "jobs/presets/demo.yaml"
    (tmp_path / "own.yaml").write_text("name: own")
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
    monkeypatch.setattr(submit, "connect", lambda address, verbose: None)
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
    monkeypatch.setattr(submit, "connect", lambda address, verbose: None)
    assert submit.main(["jobs/presets/demo.yaml", "storage=s3://x/y", *words]) == 2
    assert "--prompt TEXT" in capsys.readouterr().err


def test_make_submit_takes_a_name_or_a_path() -> None:
    for preset in ("demo", "jobs/presets/demo.yaml"):
        command = ["make", "--dry-run", "submit", f"PRESET={preset}", "SET=storage=s3://gpt/x seed=2", "JOB=prepare"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f"-m jobs.submit {preset} storage=s3://gpt/x seed=2 --job prepare" in shown


def test_what_ray_says_before_the_job_is_left_out_of_its_log() -> None:
    log = (
        "2026-11-27 04:04:55,913\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
        "Running entrypoint for job novel-1127: python -m jobs.pipeline demo\n"
        "tokenizer …\nRunning out of words\n"
    )
    assert submit.RAYS_OWN_LINES.sub("", log) == "tokenizer …\nRunning out of words\n"


TOLD_BY_RAY = """
import os, sys
from jobs import submit
from jobs.command import Command

def show(config, options):
    assert "ray" not in sys.modules, "it reads how to authenticate when it is imported"
    import ray
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    print(get_auth_headers_if_auth_enabled({}))

submit.ROOT, submit.run = submit.Path(sys.argv[1]), show
sys.exit(submit.main(["name=x"]))
"""


@pytest.mark.parametrize("kept", ["cluster", "variable", "home"])
def test_in_a_bare_shell_the_token_reaches_ray(tmp_path: Path, kept: str) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    token = "0123456789abcdef" * 4
    if kept == "cluster":
        (tmp_path / "artifacts/cluster").mkdir(parents=True)
        (tmp_path / "token").write_text(token)
        lines = "export RAY_API_SERVER_ADDRESS=http://127.0.0.2:5\nexport RAY_AUTH_MODE=token\n"
        lines += f"export RAY_AUTH_TOKEN_PATH={tmp_path}/token\n"
        (tmp_path / "artifacts/cluster/environment").write_text(lines)
    elif kept == "variable":
        environment["RAY_AUTH_TOKEN"] = token
    else:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text(token)
    done = subprocess.run(
        [sys.executable, "-c", TOLD_BY_RAY, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert token in done.stdout


def test_a_job_that_nobody_knows_is_one_sentence() -> None:
    class Client:
        def get_job_status(self, job: str) -> str:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")

    with pytest.raises(ValueError, match=r"There is no job 'nope' at http://head:8265; `ray job list --address"):
        submit.follow(Client(), "nope", "http://head:8265")  # type: ignore[arg-type]


def test_a_cluster_that_goes_away_while_its_log_is_followed_is_one_sentence() -> None:
    import requests

    class Client:
        def get_job_status(self, job: str) -> str:
            raise requests.exceptions.ConnectionError(f"HTTPConnectionPool(host='head'): no {job}")

    with pytest.raises(ValueError, match=r"no longer answers.*--follow mine` goes on.*submit the same again") as told:
        submit.follow(Client(), "mine", "http://head:8265")  # type: ignore[arg-type]
    assert "HTTPConnectionPool" not in str(told.value)
