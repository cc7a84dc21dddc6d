"""With --log-format json all that a job prints or logs is one JSON object a line."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import logging, sys, warnings
from jobs.command import Command

def run(config, options):
    print("prepare   …")
    print("two", "words", end=" ")
    print("and a third\\n\\nover lines")
    print("", flush=True)
    logging.getLogger("pipeline.x").warning("MLflow %s", "away")
    print('{"asctime": "now", "message": "Ray said it"}')
    warnings.warn("old")
    assert not sys.stdout.isatty()
    raise ZeroDivisionError("impossible")

sys.exit(Command("x").main(run, ["train.steps=5", "--log-format", "json"]))
"""


def test_every_line_is_an_object_and_an_error_is_one_of_them() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["message"] for each in said] == ["prepare   …", "two words and a third\n\nover lines", "Ray said it"]
    assert said[0]["level"] == "info"
    complained = [json.loads(line) for line in done.stderr.splitlines()]
    assert [each["level"] for each in complained] == ["warning", "warning", "error", "error"]
    assert complained[0]["logger"] == "pipeline.x"
    assert complained[0]["message"] == "MLflow away"
    assert complained[2]["message"].startswith("Traceback (most recent call last):\n")
    assert complained[3]["message"] == "error: ZeroDivisionError: impossible"
