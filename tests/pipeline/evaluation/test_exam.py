"""What a training asks as it goes, without a training; tests/pipeline/test_train_restarts.py asks in one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.gpt import GPT, ModelConfig
from pipeline.config import load_config
from pipeline.evaluation import exam as room
from pipeline.evaluation.answers import answer
from pipeline.evaluation.exam import TaskExam, choose_exam
from pipeline.evaluation.report import describe, name_metrics
from tests.pipeline.tiny_registry import tiny_tokenizer


@pytest.fixture
def exam(tmp_path: Path) -> TaskExam:
    rows: dict[str, list[dict[str, Any]]] = {
        "pairs": [{"good": f"Return {n} items.", "bad": f"Returns {n} item."} for n in range(9)],
        "choices": [{"context": f"{n} is", "choices": ["odd", "even", "big"], "gold": n % 2} for n in range(5)],
    }
    for name, each in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    found = choose_exam([f"{tmp_path}/pairs.jsonl", f"{tmp_path}/choices.jsonl"], items=7)
    assert found is not None
    return found


def test_so_many_items_are_asked_of_each_task(exam: TaskExam) -> None:
    assert [(task.name, len(task.items)) for task in exam.tasks] == [("pairs", 7), ("choices", 5)]
    assert choose_exam([], items=7) is None


def test_any_number_of_ranks_finds_what_one_finds(exam: TaskExam, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    model = GPT(ModelConfig(num_layers=1, width=16, num_heads=2, context_length=32), tokenizer.vocab_size)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    alone, lines = exam.ask(model, tokenizer, torch.float32, rank=0, world_size=1)
    task = exam.tasks[0]
    whole = name_metrics({task.name: describe(task, answer(model, tokenizer, task.items))})
    assert {name: alone[name] for name in whole} == pytest.approx(whole)
    assert lines[0].startswith("pairs acc ")
    assert model.training, "it is left in the mode in which it was"

    for world_size in (2, 3, 20):  # of 20 some have nothing to ask
        tables: list[torch.Tensor] = []
        monkeypatch.setattr(room.dist, "get_backend", lambda: "gloo")
        monkeypatch.setattr(room.dist, "all_reduce", lambda table, kept=tables: kept.append(table.clone()))
        for rank in range(world_size):
            exam.ask(model, tokenizer, torch.float32, rank, world_size)
        total = torch.stack(tables).sum(dim=0)
        monkeypatch.setattr(room.dist, "all_reduce", lambda table, total=total: table.copy_(total))
        together, _ = exam.ask(model, tokenizer, torch.float32, 0, world_size)
        assert together == pytest.approx(alone, rel=1e-5)


def test_a_model_that_is_shared_out_is_refused_with_the_settings() -> None:
    with pytest.raises(ValueError, match=r"train\.evaluate_tasks needs train\.sharding=ddp"):
        load_config(None, ["train.sharding=fsdp", "train.evaluate_tasks=[blimp]"])
