import subprocess
import sys

import pytest
from botocore.exceptions import EndpointConnectionError

from jobs.command import Command, explain


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


def test_s3_that_cannot_be_reached_is_said_in_one_sentence():
    error = EndpointConnectionError(endpoint_url="http://127.0.0.1:9/")
    assert explain(error) == 'S3 cannot be used: Could not connect to the endpoint URL: "http://127.0.0.1:9/"'
