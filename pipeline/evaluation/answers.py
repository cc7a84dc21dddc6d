"""What a model says to the items of a task."""

from collections.abc import Sequence

import torch

from model.gpt import GPT
from model.likelihood import encode_requests, score
from model.tokenizer import Tokenizer
from pipeline.evaluation.evaluators import Item, ItemAnswer


def answer(
    model: GPT, tokenizer: Tokenizer, items: Sequence[Item], *, precision: torch.dtype = torch.float32
) -> list[ItemAnswer]:
    """Let a model answer the items, all of their endings in one go."""
    requests = encode_requests(tokenizer, [(item.context, ending) for item in items for ending in item.endings])
    scores = score(model, requests, precision=precision)
    answers, start = [], 0
    for item in items:
        end = start + len(item.endings)
        answers.append(ItemAnswer(tuple(scores.nats[start:end].tolist()), tuple(scores.greedy[start:end].tolist())))
        start = end
    return answers
