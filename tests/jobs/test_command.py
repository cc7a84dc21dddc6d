import argparse
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from botocore.exceptions import EndpointConnectionError

from jobs import command
from jobs.command import Command, check_cluster_answers, explain, name_command, where_mlflow_shows
from pipeline.config import load_config
from tests.mlflow_store import point_mlflow_at


def run(*arguments: str, action=lambda config, options: 0) -> int:
    return Command("Try things.").main(action, list(arguments))


def test_settings_reach_the_config():
    seen = []
    assert run("train.steps=5", action=lambda config, options: seen.append(config.train.steps)) == 0
    assert seen == [5]


@pytest.mark.parametrize("arguments", [["train.stepz=5"], ["no/such.yaml"], ["train.steps=x"]])
def test_a_mistake_is_one_line_and_status_2(arguments, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_our_own_mistake_keeps_its_traceback_and_is_status_1(capsys):
    def fail(config, options):
        raise AssertionError("impossible")

    assert run("train.steps=5", action=fail) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_sentence_is_found_inside_the_wrappers():
    class Wrapper(Exception):
        pass

    inner = ValueError("The corpus is empty.")
    middle = Wrapper("worker died")
    middle.__cause__ = inner
    outer = Wrapper("training failed")
    outer.worker_failures = {0: middle}  # as Ray Train's error has it
    assert explain(outer) == "The corpus is empty."


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert "train.batch_tokens" in text
    assert "tokens per optimizer step" in text


def test_a_command_without_words_says_what_it_wants(capsys):
    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == 2
    assert "error: say what to run: a preset" in capsys.readouterr().err
    assert Command("Try things.", may_be_bare=True).main(lambda config, options: 0, []) == 0


def test_an_unknown_option_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "jobs.prepare", "x.yaml", "--turbo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--turbo" in done.stderr


@pytest.mark.parametrize(
    "words", [["train.steps", "=", "20"], ["train.steps", "=20"], ["x=1", "train.steps", "=", "20"]]
)
def test_spaces_around_the_equals_sign_are_named(words, capsys):
    assert run(*words) == 2
    assert "error: Write train.steps=20 without spaces around the equals sign." in capsys.readouterr().err


def in_a_pipe(program: str, reader: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of Python's whose output goes to a reader; returns what the reader has read, and both's errors."""
    command = f"{sys.executable} -c {shlex.quote(program)} | {reader}; echo ${{PIPESTATUS[0]}} >&2"
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize("lines", [3, 100_000])
def test_a_reader_that_leaves_early_is_no_error(lines):
    code = "import sys; from jobs.command import Command;"
    code += f"run = lambda config, options: [print(n) for n in range({lines})] and 0;"
    done = in_a_pipe(code + "sys.exit(Command('Count.').main(run, ['train.steps=5']))", "true")
    assert done.stderr.strip() in ("0", "141")
    assert (done.stderr.strip() == "141") or lines == 3


def test_a_broken_connection_is_not_taken_for_a_reader_that_left(capsys):
    def fail(config, options):
        raise BrokenPipeError(32, "Broken pipe")

    assert run("train.steps=5", action=fail) == 2
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_without_our_characters_gets_question_marks(encoding):
    code = "import sys; from jobs.command import Command;"
    code += "sys.exit(Command('x').main(lambda config, options: print('prepare \\u2026'), ['train.steps=5']))"
    done = in_a_pipe(code, "cat", PYTHONIOENCODING=encoding)
    assert (done.stdout, done.stderr.strip()) == ("prepare ?\n", "0")


def test_a_wrong_cluster_address_is_said_within_seconds(ray_session):
    import ray

    check_cluster_answers(ray.get_runtime_context().gcs_address)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and never speaks
        silent = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"No Ray cluster answers at RAY_ADDRESS={silent}\. Start it"):
            check_cluster_answers(silent, seconds=0.5)
    with pytest.raises(ValueError, match="No Ray cluster answers"):
        check_cluster_answers(silent, seconds=0.5)
    with pytest.raises(ValueError, match="write HOST:6379"):
        check_cluster_answers("http://127.0.0.1:8265")


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "ray://head"])
def test_a_cluster_address_without_a_port_is_told_which_to_write(address):
    with pytest.raises(ValueError, match=rf"RAY_ADDRESS={address} names no port: write HOST:6379"):
        check_cluster_answers(address)


def test_an_impossible_address_of_mlflow_is_said_before_ray_starts(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started first"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "localhost:5000")
    with pytest.raises(ValueError, match="lacks its scheme"), command.ray_session():
        pass


def test_a_machine_on_which_the_dashboard_starts_late_gets_a_second_try(monkeypatch):
    import ray

    tries = []

    def init(**arguments):
        tries.append(arguments)
        if len(tries) == 1:
            raise RuntimeError("Failed to start the dashboard, return code 0")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with command.ray_session():
        assert len(tries) == 2


def test_after_a_run_the_terminal_names_the_next_command(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    options = argparse.Namespace(words=["demo", "evaluate.prompts=[He said: hi]"])
    assert name_command("serve", options) == "python -m jobs.serve demo 'evaluate.prompts=[He said: hi]'"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert name_command("serve", options).startswith("python -m jobs.submit --job serve demo ")


def test_after_a_run_the_terminal_says_where_mlflow_shows_it(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load_config(None, [f"storage={tmp_path}/a b", "name=tiny"])
    Path(config.storage).mkdir()
    point_mlflow_at(f"sqlite:///{config.storage}/mlflow.db")
    with mlflow.start_run(experiment_id="0") as active:  # another test may have chosen one
        run_id = active.info.run_id
    told = where_mlflow_shows(config, run_id)
    assert f"/#/experiments/0/runs/{run_id}?workflowType=machine_learning once this runs:" in told
    command_line = shlex.split(told.splitlines()[1])
    assert command_line == [
        "python",
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{config.storage}/mlflow.db",
    ]
    assert where_mlflow_shows(config, "0" * 32) == f"sqlite:///{config.storage}/mlflow.db"


def test_s3_that_cannot_be_reached_is_said_in_one_sentence():
    error = EndpointConnectionError(endpoint_url="http://127.0.0.1:9/")
    assert explain(error) == 'S3 cannot be used: Could not connect to the endpoint URL: "http://127.0.0.1:9/"'


def test_a_flag_stands_for_a_setting_and_is_in_the_help(capsys):
    seen = []
    command = Command("Try things.")
    command.add_flag("--force", "register.force=true", "take the alias")
    assert command.main(lambda config, options: seen.append(config.register.force), ["demo", "--force"]) == 0
    assert seen == [True]
    assert "register.force=true" in shlex.join(command.parser.parse_args(["--force"]).flags)
    with pytest.raises(SystemExit):
        command.main(lambda config, options: None, ["--help"])
    assert "--force" in capsys.readouterr().out
