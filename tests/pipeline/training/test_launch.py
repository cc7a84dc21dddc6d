"""A plan is all that a training needs: no stage, no config file, no MLflow."""

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import WEIGHTS, save_model
from model.gpt import GPT
from model.tokenizer import load_tokenizer
from pipeline.artifacts import artifact_at
from pipeline.training.history import History
from pipeline.training.launch import launch
from pipeline.training.plan import plan_training
from tests.pipeline.tiny_training import last_history, tiny_config, tiny_inputs


def test_a_plan_alone_trains_from_weights_that_are_given(ray_session: None, storage: str, tmp_path: Path) -> None:
    config = tiny_config(storage, "train.steps=3", "train.num_workers=1", "train.evaluate_every_steps=3")
    inputs = tiny_inputs(config)
    tokenizer = load_tokenizer(Path(inputs["tokenizer"].url))
    torch.manual_seed(5)
    model = GPT(config.model, tokenizer.vocab_size)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    save_model(tmp_path / "start", model, tokenizer)
    assert (tmp_path / "start" / WEIGHTS).is_file()

    def first_losses(start: str) -> History:
        output = artifact_at(storage, "trial", "train", ("1" if start else "0") * 20)
        plan = plan_training(config, inputs, output, tracking_uri="", mlflow_run_id="", started=time.time())
        plan = replace(plan, start=start)
        assert launch(plan)["unsent"] == []
        return last_history(config, output)

    uniform = math.log(tokenizer.vocab_size)
    assert first_losses("").validation[0][1] == pytest.approx(uniform, abs=0.1)
    started = first_losses(str(tmp_path / "start"))
    assert started.validation[0][1] > uniform + 0.2
    assert (started.step, started.precision) == (3, "float32")
