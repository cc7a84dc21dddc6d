"""A failure that the next start would meet again is told in one sentence; one that may pass is not given up."""

import errno
from pathlib import Path

import pytest
import torch

from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.failures import TRACEBACK_FILE, explain_lasting_failure
from pipeline.training.plan import TrainingPlan, plan_training
from tests.pipeline.tiny_training import tiny_config, tiny_inputs, tiny_output


@pytest.fixture
def plan(storage: str) -> TrainingPlan:
    config = tiny_config(storage)
    inputs = tiny_inputs(config, documents=60)
    output = tiny_output(config, inputs)
    return plan_training(config, inputs, output, tracking_uri="", mlflow_run_id="", started=0)


def explain(error: BaseException, plan: TrainingPlan) -> str | None:
    return explain_lasting_failure(error, plan, torch.device("cpu"), 1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("The shard x is damaged."), "The shard x is damaged."),
        (torch.OutOfMemoryError("CUDA out of memory."), "Out of memory: CUDA out of memory. The estimate"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "Out of memory: "),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "No space left on the device of /data/x: make"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x"), "No space left on the device of /data/x: make"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on a disk of "),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "may not use /data/x (Permission denied)"),
        (ModuleNotFoundError("No module named 'xyz'"), "(ModuleNotFoundError: No module named 'xyz')"),
        (KeyError("optimizer"), "(KeyError: 'optimizer')"),
        (TypeError("unhashable type"), "failed as it would again at each start (TypeError: unhashable type)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_must_recur_is_told_in_one_sentence(error: BaseException, words: str, plan: TrainingPlan) -> None:
    sentence = explain(error, plan)
    assert sentence is not None
    assert words in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer [10.0.0.2]:4711"),
        RuntimeError("NCCL error: unhandled system error"),
        ConnectionResetError("Connection reset by peer"),
        OSError(errno.EIO, "Input/output error"),
        TimeoutError("timed out"),
    ],
    ids=str,
)
def test_what_may_pass_is_not_given_up(error: BaseException, plan: TrainingPlan) -> None:
    assert explain(error, plan) is None


def test_the_traceback_of_a_fault_is_kept(plan: TrainingPlan) -> None:
    try:
        {}["nothing"]
    except KeyError as error:
        sentence = explain(error, plan)
    assert f"{plan.output.url}/{TRACEBACK_FILE}" in str(sentence)
    assert "test_failures.py" in plan.output.read_text(TRACEBACK_FILE)


def test_a_checkpoint_on_a_full_disk_gives_its_space_back_and_names_the_place(plan: TrainingPlan) -> None:
    store = CheckpointStore(plan.output, keep=2)

    def fill(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(1000))
        with open("/dev/full", "w") as full:
            full.write("x")

    with pytest.raises(OSError, match="No space left") as raised:
        store.write(1, {}, fill)
    assert store.names() == []
    assert f"the device of {plan.output.url}/checkpoints: make room" in str(explain(raised.value, plan))
