"""What the loop decides: when to give up skipping, in which precision to go on; and that it reads a plan alone."""

import ast
import logging
from pathlib import Path

import pytest
import torch

from model.gpt import GPT, ModelConfig
from model.optimizer import Optimizer, OptimizerConfig, build_optimizer
from model.training import StepMeasures
from pipeline.training.history import History
from pipeline.training.report import BadLoss
from pipeline.training.worker import MOST_SKIPPED_IN_A_ROW, keep_precision, read_measures

ROOM = Path(__file__).parents[3] / "pipeline/training"


@pytest.fixture
def optimizer() -> Optimizer:
    return build_optimizer(GPT(ModelConfig(num_layers=1, width=8, num_heads=1), 64), OptimizerConfig(), 100)


def measures(*, skipped: bool) -> StepMeasures:
    loss = float("nan") if skipped else 2.0
    return StepMeasures(torch.tensor(loss), torch.tensor(1.0), skipped)


def test_bad_batches_here_and_there_are_skipped(optimizer: Optimizer) -> None:
    history = History()
    for step in range(1, 10 * MOST_SKIPPED_IN_A_ROW):
        read_measures((step, measures(skipped=step % MOST_SKIPPED_IN_A_ROW > 0)), optimizer, history, None)
    assert len(history.skipped_steps) == 10 * (MOST_SKIPPED_IN_A_ROW - 1)


def test_skipping_gives_up_when_no_step_helps_any_more(optimizer: Optimizer) -> None:
    history, last = History(), 4 + MOST_SKIPPED_IN_A_ROW
    for step in range(1, last):
        read_measures((step, measures(skipped=step > 4)), optimizer, history, None)
    words = f"The loss of step {last} is nan, .* the {MOST_SKIPPED_IN_A_ROW} steps up to it had to be skipped in a row"
    with pytest.raises(BadLoss, match=words):
        read_measures((last, measures(skipped=True)), optimizer, history, None)


def test_a_training_goes_on_in_the_precision_in_which_it_began(caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    with caplog.at_level(logging.WARNING):
        assert keep_precision("", "float32", cpu) == "float32"
        assert keep_precision("bfloat16", "bfloat16", cpu) == "bfloat16"
        assert not caplog.records
        for began, other in (("bfloat16", "float32"), ("float32", "bfloat16")):
            # As `auto` would come to on a machine of another kind.
            assert keep_precision(began, other, cpu) == began
            assert f"began in {began} and goes on in it" in caplog.records[-1].getMessage()
            assert caplog.records[-1].getMessage().endswith(f"would take {other}.")


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.stem)
def test_only_the_plan_knows_the_whole_config(path: Path) -> None:
    names = {
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline.config"
        for alias in node.names
    }
    assert names <= (
        {"Config", "StreamConfig", "TrainConfig"} if path.stem == "plan" else {"StreamConfig", "TrainConfig"}
    )
