"""The held-out text as a training scores it, for its own evaluations and for the stage that evaluates it afterwards.

    held_out = open_validation(shards, model, train, stream, batch_sequences=16, max_tokens=1_000_000)
    validation = score_held_out(module, held_out, tokenizer.byte_lengths, precision=torch.float32)

Of a mix each source is scored by itself. What counts, for the best checkpoint and as the headline, are the answers
where there are conversations, else all sources together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.config import ModelConfig
from model.scoring import Score, score_batches
from pipeline.artifacts import Artifact
from pipeline.config import StreamConfig, TrainConfig
from pipeline.corpus.mixing import members_of
from pipeline.corpus.packing import ConversationValidation, open_validation_stream
from pipeline.corpus.stream import ValidationStream


@dataclass(frozen=True)
class HeldOut:
    """The val split of one source."""

    name: str  # empty if it is the only source
    stream: ValidationStream | ConversationValidation

    @property
    def holds_answers(self) -> bool:
        return isinstance(self.stream, ConversationValidation)


@dataclass(frozen=True)
class Validation:
    """The score of what counts, and those of the sources of a mix."""

    score: Score
    sources: dict[str, Score]


def open_validation(
    shards: Artifact,
    model: ModelConfig,
    train: TrainConfig,
    stream: StreamConfig,
    *,
    batch_sequences: int,
    max_tokens: int,
) -> list[HeldOut]:
    """Open each source's val split: cut, bounded and cached as the training's settings say.

    A mix shares out `max_tokens` as it does the tokens of the training.
    """
    return [
        HeldOut(
            member.name,
            open_validation_stream(
                member.shards,
                context_length=model.context_length,
                batch_sequences=batch_sequences,
                max_tokens=max_tokens and max(1, round(member.share * max_tokens)),
                cache_folder=stream.cache_folder or None,
                cache_gigabytes=stream.cache_gigabytes,
                document_boundaries=train.document_boundaries,
            ),
        )
        for member in members_of(shards)
    ]


def score_held_out(
    module: torch.nn.Module,
    held_out: Sequence[HeldOut],
    byte_lengths: np.ndarray,
    *,
    precision: torch.dtype,
    rank: int = 0,
    world_size: int = 1,
) -> Validation:
    """Score each rank's part of every source and add them up; every rank returns the same."""
    scores = [
        score_batches(
            module,
            each.stream.batches(rank, world_size),
            byte_lengths,
            precision=precision,
            over_ranks=world_size > 1,
        )
        for each in held_out
    ]
    has_answers = any(each.holds_answers for each in held_out)
    counting = [score for each, score in zip(held_out, scores, strict=True) if each.holds_answers or not has_answers]
    total = Score(
        sum(score.nats for score in counting),
        sum(score.tokens for score in counting),
        sum(score.num_bytes for score in counting),
    )
    return Validation(total, {each.name: score for each, score in zip(held_out, scores, strict=True) if each.name})
