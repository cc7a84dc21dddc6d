"""Batches of prompts: rows as the endpoint would answer them, each once, whatever ends the work between."""

import asyncio
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from model.chat import CHAT_TEMPLATE
from pipeline import registry
from pipeline.artifacts import Artifact, filesystem_of
from pipeline.config import Config, load_config
from pipeline.serving import batch
from pipeline.serving.batch import Batch, Places, RowAnswerer, answer_batch, finished_counts, plan_batch
from pipeline.serving.live_engine import engine_starter
from tests.pipeline.tiny_registry import TinyRegistry, make_registry
from tests.s3_server import s3_server

ENGINE = ("serve.threads=1", "serve.weights=float32", "serve.max_batch_size=4", "serve.cpus_per_replica=0.5")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    """A registry whose model holds conversations; its second version is not the champion yet."""
    found = make_registry(tmp_path_factory.mktemp("registry"))
    found.add_version(seed=1, alias="champion", chat_template=CHAT_TEMPLATE)
    found.add_version(seed=2, chat_template=CHAT_TEMPLATE)
    return found


@pytest.fixture
def config(chatty: TinyRegistry) -> Config:
    chatty.current()
    return load_config(None, ["name=tiny", *ENGINE])


def answer_rows(config: Config, rows: list[Any], **defaults: Any) -> list[dict[str, Any]]:
    """What the rows become, without Ray or files."""

    async def work() -> list[dict[str, Any]]:
        loaded, model = registry.load(registry.resolve("tiny", "champion"), torch.device("cpu"))
        backend = await engine_starter(config.serve)(Path(), model, loaded.tokenizer)
        answerer = RowAnswerer(loaded, backend, defaults, 0, 8)
        try:
            return await asyncio.gather(*(answerer.answer(number, row) for number, row in enumerate(rows)))
        finally:
            await backend.close(1)

    return asyncio.run(work())


def test_each_row_has_its_own_settings(config: Config) -> None:
    rows = [
        {"prompt": "Return a", "temperature": 0, "max_tokens": 6, "id": "first"},
        {"prompt": "Return a", "temperature": 0, "max_tokens": 3, "custom_id": 7},
        {"prompt": "Return a", "temperature": 2.0, "seed": 1, "n": 2, "max_tokens": 6},
        {"prompt": "Return a", "temperature": 2.0, "seed": 1, "max_tokens": 6, "top_k": None},
        {"prompt": [10, 11, 12], "temperature": 0},
        {"custom_id": "openai", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 1}},
    ]
    found = answer_rows(config, rows, max_tokens=5, temperature=1.0)
    assert [answer["error"] for answer in found] == [None] * 6
    assert [answer["id"] for answer in found] == ["first", "7", None, None, None, "openai"]
    assert found[0]["text"].startswith(found[1]["text"])
    assert found[1]["finish_reason"] == "length"
    assert found[1]["completion_tokens"] == 3
    assert len(found[2]["more_choices"]) == 1
    assert found[2]["text"] == found[3]["text"] != found[2]["more_choices"][0]["text"]
    assert found[4]["prompt_tokens"] == 3
    assert {answer["version"] for answer in found} == {"1"}
    # Among other rows, later, or alone: the same.
    again = answer_rows(config, [None, *reversed(rows)][1:], max_tokens=5, temperature=1.0)
    assert [answer["text"] for answer in again[2:]] == [answer["text"] for answer in reversed(found[:4])]


def test_a_conversation_is_answered_as_the_template_says(config: Config) -> None:
    messages = [{"role": "user", "content": "Sort the list."}]
    loaded, _ = registry.load(registry.resolve("tiny", "champion"), torch.device("cpu"))
    assert loaded.chat_template is not None
    prompt = loaded.chat_template.render(messages, ask=True).text
    rows: list[Any] = [{"messages": messages, "max_completion_tokens": 4}, {"prompt": prompt, "max_tokens": 4}]
    first, second = answer_rows(config, rows, temperature=0.0)
    assert first["error"] is None
    assert first["text"] == second["text"]
    assert first["prompt_tokens"] == second["prompt_tokens"]


def test_what_is_wrong_with_a_row_stays_with_it(config: Config) -> None:
    wrong: list[tuple[Any, str]] = [
        ("The line is not JSON.", "not JSON"),
        ({}, "no prompt and no messages"),
        ({"prompt": "a", "messages": []}, "one of them"),
        ({"prompt": ["a", "b"]}, "one prompt"),
        ({"prompt": []}, "empty"),
        ({"prompt": [400_000]}, "token 400000"),
        ({"prompt": "a", "temprature": 1}, "temprature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "max_tokens": 1000}, "context"),
        ({"prompt": "a " * 1000}, "context"),
        ({"prompt": "a", "stream": True}, "stream"),
        ({"prompt": "a", "n": 16}, "sequences"),
        ({"prompt": "a", "model": "other"}, "other"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"messages": [{"role": "poet", "content": "a"}]}, "poet"),
        ({"messages": "Hello"}, "messages"),
        ({"prompt": "a", "seed": 2**80}, "seed"),
    ]
    good = {"prompt": "Return a", "max_tokens": 3}
    found = answer_rows(config, [*(row for row, _ in wrong), good], temperature=0.0)
    for (row, says), answer in zip(wrong, found, strict=False):
        assert answer["error"] is not None, row
        assert says in answer["error"], row
        assert answer["text"] is None
        assert answer["completion_tokens"] == 0
    assert found[-1]["error"] is None
    assert found[-1]["completion_tokens"] == 3


def test_the_commands_length_is_a_bound_and_a_rows_own_a_wish(config: Config) -> None:
    long_prompt = [5] * 120  # of 128 that the context has
    bounded, wished = answer_rows(config, [{"prompt": long_prompt}, {"prompt": long_prompt, "max_tokens": 50}],
                                  max_tokens=50)  # fmt: skip
    assert bounded["error"] is None
    assert bounded["completion_tokens"] <= 8
    assert "room for 8" in wished["error"]


def test_who_comes_first_is_let_in_first() -> None:
    async def work() -> list[str]:
        places, order = Places(3), []

        async def enter(name: str, wanted: int) -> None:
            await places.take(wanted)
            order.append(name)
            await asyncio.sleep(0)
            places.give(wanted)

        await asyncio.gather(enter("a", 2), enter("b", 3), enter("c", 1), enter("d", 1))
        return order

    assert asyncio.run(work()) == ["a", "b", "c", "d"]


# The whole of it, on Ray ------------------------------------------------------------------------------------------


def write_prompts(file: Path, count: int = 200) -> None:
    chance = random.Random(0)
    rows: list[Mapping[str, Any]] = [
        {"prompt": "Return a new list " * chance.randint(1, 4), "max_tokens": chance.randint(1, 12), "id": f"n{number}"}
        for number in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": 5}\n')


def planned(config: Config, folder: Path, name: str, selector: str = "champion", **options: Any) -> Batch:
    return plan_batch(config, selector, str(folder / "prompts.jsonl"), str(folder / name), options, seed=3)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_every_row_is_answered_once_and_again_with_the_same_bytes(
    config: Config, chatty: TinyRegistry, tmp_path: Path
) -> None:
    write_prompts(tmp_path / "prompts.jsonl")
    whole = planned(config, tmp_path, "whole.jsonl")
    begun: list[tuple[int, int]] = []
    told: list[batch.PartDone] = []
    start = engine_starter(config.serve)
    counts = answer_batch(whole, start, lambda *found: begun.append(found), told.append)
    answers = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert [answer["row"] for answer in answers] == list(range(201))
    assert [answer["id"] for answer in answers[:-1]] == [f"n{number}" for number in range(200)]
    assert (counts.rows, counts.failed) == (201, 1)
    assert counts.completion_tokens == sum(part.tokens for part in told) > 200
    assert begun == [(201, 0)]
    assert not (tmp_path / "whole.jsonl.run/parts").exists()
    assert finished_counts(planned(config, tmp_path, "whole.jsonl")) == counts

    # Ended in the middle, with the alias moved meanwhile: the version that it began with goes on.
    ended = planned(config, tmp_path, "ended.jsonl")
    seen: list[int] = []

    def stop_after_two(part: batch.PartDone) -> None:
        seen.append(part.number)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_batch(ended, start, told=stop_after_two)
    chatty.move_alias("champion", "2")
    try:
        begun.clear()
        ended = planned(config, tmp_path, "ended.jsonl")
        assert answer_batch(ended, start, lambda *found: begun.append(found)) == counts
        assert begun[0][1] >= 64  # of rows that were not answered again
        assert (tmp_path / "ended.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    finally:
        chatty.move_alias("champion", "1")

    # As Parquet, from two actors: the same answers.
    two = dataclasses.replace(config, serve=dataclasses.replace(config.serve, replicas=2))
    answer_batch(planned(two, tmp_path, "two.parquet"), engine_starter(two.serve))
    assert pq.read_table(tmp_path / "two.parquet").to_pylist() == answers


def test_another_batch_is_not_gone_on_with(config: Config, tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl", 2)
    planned(config, tmp_path, "out.jsonl")
    with pytest.raises(ValueError, match="defaults was"):
        planned(config, tmp_path, "out.jsonl", temperature=0.5)
    with pytest.raises(ValueError, match="version was"):
        planned(config, tmp_path, "out.jsonl", selector="2")
    write_prompts(tmp_path / "prompts.jsonl", 3)
    with pytest.raises(ValueError, match="input was"):
        planned(config, tmp_path, "out.jsonl")
    (tmp_path / "mine.jsonl").write_text("precious\n")
    with pytest.raises(ValueError, match="not made by this command"):
        planned(config, tmp_path, "mine.jsonl")
    (tmp_path / "out.jsonl.run/plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json is damaged"):
        planned(config, tmp_path, "out.jsonl")


@pytest.mark.slow
def test_killed_anywhere_the_same_command_goes_on(chatty: TinyRegistry, tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl", 1500)
    (tmp_path / "tiny.yaml").write_text("name: tiny\n")

    def command(output: str) -> list[str]:
        files = (f"--input={tmp_path}/prompts.jsonl", f"--output={tmp_path}/{output}")
        return [sys.executable, "-m", "jobs.generate", f"--preset={tmp_path}/tiny.yaml", *files, *ENGINE]

    environment = os.environ | {"MLFLOW_TRACKING_URI": chatty.tracking_uri, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command("whole.jsonl"), env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "1,500 of 1,501 rows answered" in done.stdout
    assert "tokens/s" in done.stdout
    for most_parts in (2, 9):
        running = subprocess.Popen(
            command("killed.jsonl"), env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        parts = tmp_path / "killed.jsonl.run/parts"
        while running.poll() is None and len(list(parts.glob("0*"))) < most_parts:
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    done = subprocess.run(command("killed.jsonl"), env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    before = (tmp_path / "killed.jsonl").stat().st_mtime_ns
    done = subprocess.run(command("killed.jsonl"), env=environment, capture_output=True, text=True, timeout=200)
    assert "1,500 of 1,501 rows answered" in done.stdout
    assert (tmp_path / "killed.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_command_reads_and_writes_s3(chatty: TinyRegistry, tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl", 20)
    (tmp_path / "tiny.yaml").write_text("name: tiny\n")
    with s3_server() as of_s3:
        bucket = Artifact("s3://prompts", "generate", "f")
        bucket.filesystem.mkdir("prompts")
        bucket.write_bytes("in.jsonl", (tmp_path / "prompts.jsonl").read_bytes())
        command = [sys.executable, "-m", "jobs.generate", f"--preset={tmp_path}/tiny.yaml", *ENGINE]
        command += ["--input=s3://prompts/*.jsonl", "--output=s3://prompts/out.parquet"]
        environment = os.environ | of_s3 | {"MLFLOW_TRACKING_URI": chatty.tracking_uri, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert "20 of 21 rows answered" in done.stdout
        filesystem, path = filesystem_of("s3://prompts/out.parquet")
        with filesystem.open(path) as stream:
            rows = pq.read_table(stream).to_pylist()
    assert [row["id"] for row in rows] == [*(f"n{number}" for number in range(20)), None]
