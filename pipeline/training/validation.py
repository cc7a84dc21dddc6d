"""The held-out text as a training scores it, for its own evaluations and for the stage that evaluates it afterwards.

    held_out = open_validation(shards, model, train, stream, batch_sequences=16, max_tokens=1_000_000)
    validation = score_held_out(module, held_out, tokenizer.byte_lengths, precision=torch.float32)

Of a mix each source is scored by itself. What counts, for the best checkpoint and as the headline, are the answers
where there are conversations, else all sources together. Beside the answers the base text is scored, which shows what
a fine-tuning forgets: what `train.base_text` names, else the sources of the mix that are text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.config import ModelConfig
from model.scoring import Score, score_batches
from pipeline.artifacts import Artifact, resolve_storage
from pipeline.config import StreamConfig, TrainConfig
from pipeline.corpus.members import MIX, members_of
from pipeline.corpus.packing import ConversationValidation, open_validation_stream
from pipeline.corpus.stream import ValidationStream


@dataclass(frozen=True)
class HeldOut:
    """The val split of one source."""

    name: str  # empty if it is the only source
    stream: ValidationStream | ConversationValidation
    is_base: bool = False  # the start's own text, which the training does not read

    @property
    def holds_answers(self) -> bool:
        return isinstance(self.stream, ConversationValidation)


@dataclass(frozen=True)
class Validation:
    """The score of what counts, those of the sources of a mix, and that of the text that answers may make forgotten."""

    score: Score
    sources: dict[str, Score]
    base: Score | None = None


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

    A mix shares out `max_tokens` as it does the tokens of the training. `train.base_text` comes last.
    """

    def open_part(part: Artifact, share: float) -> ValidationStream | ConversationValidation:
        return open_validation_stream(
            part,
            context_length=model.context_length,
            batch_sequences=batch_sequences,
            max_tokens=max_tokens and max(1, round(share * max_tokens)),
            cache_folder=stream.cache_folder or None,
            cache_gigabytes=stream.cache_gigabytes,
            document_boundaries=train.document_boundaries,
        )

    found = [HeldOut(member.name, open_part(member.shards, member.share)) for member in members_of(shards)]
    if train.base_text:
        found.append(HeldOut("", open_part(open_base_text(train.base_text), 1.0), is_base=True))
    return found


def open_base_text(url: str, tokenizer_digest: str = "") -> Artifact:
    """Open the shards that `train.base_text` names; raises `ValueError` where they are no text of this tokenizer."""
    artifact = Artifact(resolve_storage(url), "prepare", "")
    manifest = artifact.any_manifest()
    if manifest is None or "val" not in manifest.counts or MIX in manifest.counts:
        raise ValueError(f"train.base_text={url} holds no token shards; name a folder that prepare made of one source.")
    if tokenizer_digest not in ("", manifest.counts["tokenizer_digest"]):
        raise ValueError(f"train.base_text={url} was made with another tokenizer; prepare it with this one.")
    return Artifact(artifact.url, "prepare", manifest.fingerprint)


def score_held_out(
    module: torch.nn.Module,
    held_out: Sequence[HeldOut],
    byte_lengths: np.ndarray,
    *,
    precision: torch.dtype,
    rank: int = 0,
    world_size: int = 1,
    as_trained: bool = False,
) -> Validation:
    """Score each rank's part of every source and add them up; every rank returns the same.

    `as_trained` as for `score_batches`.
    """
    scores = [
        score_batches(
            module,
            each.stream.batches(rank, world_size),
            byte_lengths,
            precision=precision,
            over_ranks=world_size > 1,
            as_trained=as_trained,
        )
        for each in held_out
    ]
    pairs = [(each, score) for each, score in zip(held_out, scores, strict=True) if not each.is_base]
    bases = [score for each, score in zip(held_out, scores, strict=True) if each.is_base]
    answers = [score for each, score in pairs if each.holds_answers]
    texts = [score for each, score in pairs if not each.holds_answers]
    if answers and not bases:
        bases = texts
    return Validation(
        score=_add(answers or texts),
        sources={each.name: score for each, score in pairs if each.name},
        base=_add(bases) if bases else None,
    )


def _add(scores: Sequence[Score]) -> Score:
    return Score(
        sum(score.nats for score in scores),
        sum(score.tokens for score in scores),
        sum(score.num_bytes for score in scores),
    )


def find_questions(held_out: Sequence[HeldOut], most: int, room: int) -> list[list[int]]:
    """Return the tokens of `most` held-out questions at most, from all sources of conversations."""
    streams = [each.stream for each in held_out if isinstance(each.stream, ConversationValidation)]
    share = -(-most // max(len(streams), 1))
    return [question for stream in streams for question in stream.questions(share, room)][:most]
