"""What a training asks its model as it goes: some items of each task, always the same, shared out over its ranks.

exam = choose_exam(["blimp", "arc_easy"], items=200)
figures, lines = exam.ask(model, tokenizer, torch.float32, rank=0, world_size=1)
figures["blimp/acc"], figures["blimp/acc_standard_error"]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from model.gpt import GPT
from model.tokenizer import Tokenizer
from pipeline.evaluation.answers import answer
from pipeline.evaluation.evaluators import ItemAnswer
from pipeline.evaluation.report import describe, name_metrics, say
from pipeline.evaluation.tasks import Task, load_task, parse_entries, subset


@dataclass(frozen=True)
class TaskExam:
    """Tasks, cut to what is asked of them."""

    tasks: tuple[Task, ...]

    def ask(
        self, model: GPT, tokenizer: Tokenizer, precision: torch.dtype, rank: int, world_size: int
    ) -> tuple[dict[str, float], list[str]]:
        """Ask on all ranks together; every rank gets all figures, by task and metric, and a line for each task."""
        items = [item for task in self.tasks for item in task.items]
        # Each length of a text would be compiled anew, and thrown away after it.
        with torch.compiler.set_stance("force_eager"):
            mine = answer(model, tokenizer, items[rank::world_size], precision=precision)
        said = _exchange(items_of=[len(item.endings) for item in items], mine=mine, rank=rank, world_size=world_size)
        described, start = {}, 0
        for task in self.tasks:
            described[task.name] = describe(task, said[start : start + len(task.items)])
            start += len(task.items)
        return name_metrics(described), [" ".join(say(name, each).split()) for name, each in described.items()]


def _exchange(items_of: Sequence[int], mine: Sequence[ItemAnswer], rank: int, world_size: int) -> list[ItemAnswer]:
    """Give every rank all answers: each writes its own into a table of zeros, and the tables are added up."""
    starts = np.cumsum([0, *items_of])
    table = torch.zeros(int(starts[-1]), 2, dtype=torch.float64)
    for number, said in zip(range(rank, len(items_of), world_size), mine, strict=True):
        rows = slice(int(starts[number]), int(starts[number + 1]))
        table[rows, 0] = torch.tensor(said.nats, dtype=torch.float64)
        table[rows, 1] = torch.tensor(said.greedy, dtype=torch.float64)
    if world_size > 1:
        shared = table.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(shared)
        table = shared.cpu()
    return [
        ItemAnswer(tuple(table[start:end, 0].tolist()), tuple(value > 0.5 for value in table[start:end, 1].tolist()))
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]


def choose_exam(entries: Sequence[str], items: int) -> TaskExam | None:
    """Read the tasks that entries name, and choose so many items of each by a hash; None without entries.

    Raises `ValueError` with one sentence for what cannot be read.
    """
    parse_entries(entries)
    tasks = [load_task(entry) for entry in entries]
    return TaskExam(tuple(replace(task, items=tuple(subset(task.items, items))) for task in tasks)) if tasks else None
