"""What the loop decides: when to give up skipping, in which precision to go on; and that it reads a plan alone."""

import ast
import inspect
import logging
from pathlib import Path

import pytest
import torch

from model.gpt import GPT, ModelConfig
from model.optimizer import Optimizer, OptimizerConfig, build_optimizer
from model.training import StepMeasures
from pipeline.config import Config
from pipeline.training import worker
from pipeline.training.history import History
from pipeline.training.report import BadLoss
from pipeline.training.worker import MOST_SKIPPED_IN_A_ROW, keep_precision, read_measures

# On the driver, before there is a plan: what the start says, whether a finished run goes on, and the plan itself.
MAKE_THE_PLAN = {"plan", "start", "origins", "extend"}
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
def test_only_who_makes_the_plan_knows_the_whole_config(path: Path) -> None:
    if path.stem in MAKE_THE_PLAN:
        return
    names = {
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline.config"
        for alias in node.names
    }
    assert names <= {"StreamConfig", "TrainConfig"}


def test_what_the_loop_takes_from_them_reads_no_config() -> None:
    names = {"Config", "pipeline.config.Config"}
    for module in MAKE_THE_PLAN:
        for function in vars(worker).values():
            if inspect.isfunction(function) and function.__module__ == f"pipeline.training.{module}":
                assert not names & {str(each) for each in inspect.get_annotations(function).values()}, function
                assert Config not in inspect.get_annotations(function).values(), function
