"""The one place where a loss becomes a score: any batches to nats, tokens, bytes and bits per byte.

score = score_batches(LossModule(model), batches, tokenizer.byte_lengths, precision=torch.bfloat16)
score.bits_per_byte, score.nats_per_token
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from model.documents import find_documents
from model.training import MicroBatch, autocast


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text: what it paid, for how many tokens, that spell how many bytes."""

    nats: float
    tokens: int
    num_bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats, self.num_bytes)


def score_batches(
    module: nn.Module,
    batches: Iterable[MicroBatch],
    byte_lengths: np.ndarray,
    *,
    precision: torch.dtype = torch.float32,
    over_ranks: bool = False,
    as_trained: bool = False,
) -> Score:
    """Score every target that is not masked; `module` returns the nats of a batch, as `LossModule` does.

    `byte_lengths` holds each token's bytes. Products are computed in `precision`. With `over_ranks` every rank calls
    this with its own batches and gets the score of all. The module is left in the mode in which it was.

    A compiled module without gradients is other code, which takes its time to compile. `as_trained` runs that of a
    training step instead: it computes some gradients that nobody asked for, and takes as much memory as a step. There
    must be no dropout.
    """
    device = next(module.parameters()).device
    lengths = torch.from_numpy(byte_lengths).to(device)
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    was_training = module.training
    if not as_trained:
        module.eval()
    try:
        with torch.set_grad_enabled(as_trained), autocast(device, precision):
            for batch in batches:
                targets = batch.targets.to(device)
                documents = None if batch.document_ids is None else find_documents(batch.document_ids).to(device)
                totals[0] += module(batch.tokens.to(device), targets, documents).detach()
                scored = targets[targets >= 0]
                totals[1] += scored.numel()
                totals[2] += lengths[scored].sum()
    finally:
        module.train(was_training)
    if over_ranks:
        dist.all_reduce(totals)
    nats, tokens, num_bytes = totals.tolist()
    return Score(nats, int(tokens), int(num_bytes))


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """The headline metric: nats summed over tokens, per byte of the text they spell; any tokenizer compares.

    Raises `ValueError` where there is no text.
    """
    if num_bytes <= 0:
        raise ValueError("Bits per byte needs a text of at least one byte.")
    return nats / math.log(2) / num_bytes
