import json
import math
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import load_model
from model.tokenizer import load_tokenizer
from pipeline.evaluation.answers import answer
from pipeline.evaluation.evaluators import summarise
from pipeline.evaluation.tasks import TASKS, load_task
from tests.pipeline.evaluation.lm_eval_reference import FAMILIES, ITEMS, TABLE, ask_lm_eval, make_checkpoint

TOLD = json.loads(TABLE.read_text())


def assert_equal(checkpoint: Path, name: str, path: Path, told: dict[str, Any]) -> None:
    """Each ending's log-probability and greediness, and every figure that lm-eval has."""
    task = load_task(f"{name}={path}")
    answers = answer(load_model(checkpoint), load_tokenizer(checkpoint), task.items)
    assert len(answers) == len(told["answers"])
    for ours, theirs in zip(answers, told["answers"], strict=True):
        assert ours.nats == pytest.approx([nats for nats, _ in theirs], rel=1e-5, abs=1e-4)
        assert all(greedy in (None, ours.greedy[number]) for number, (_, greedy) in enumerate(theirs))
    figures = summarise(task.shape, task.items, answers)
    for metric, (value, error) in told["figures"].items():
        assert figures[metric].value == pytest.approx(value, rel=1e-4)
        if metric.startswith("acc"):  # perplexities' errors are lm-eval's draws; of quotients it has none
            assert figures[metric].standard_error == pytest.approx(error, rel=1e-6)
        else:
            assert error is None or metric == "perplexity"


def test_the_table_holds_every_task_and_family():
    assert set(TOLD) == set(FAMILIES)
    for told in TOLD.values():
        assert set(told) == set(TASKS) == set(ITEMS)
        outcomes = [row["figures"]["acc"][0] for row in told.values() if "acc" in row["figures"]]
        assert any(0 < value < 1 for value in outcomes)  # waves are right sometimes and wrong sometimes


@pytest.mark.parametrize("family", FAMILIES)
def test_our_figures_equal_those_that_lm_eval_gave(family, tmp_path):
    checkpoint = make_checkpoint(tmp_path, family)
    for name, path in ITEMS.items():
        assert_equal(checkpoint, name, path, TOLD[family][name])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_our_figures_equal_what_lm_eval_gives_now(family, tmp_path):
    pytest.importorskip("lm_eval", reason="the peer lm-eval is not installed: pip install -e '.[peers-evaluate]'")
    checkpoint = make_checkpoint(tmp_path, family)
    told = ask_lm_eval(checkpoint, ITEMS)
    for name, path in ITEMS.items():
        assert_equal(checkpoint, name, path, told[name])
        for metric, (value, _) in TOLD[family][name]["figures"].items():
            assert told[name]["figures"][metric][0] == pytest.approx(value, rel=1e-4)
    assert not any(math.isnan(value) for row in told.values() for value, _ in row["figures"].values())
