"""The held-out text as a training scores it, for its own evaluations and for the stage that evaluates it afterwards."""

from model.config import ModelConfig
from pipeline.artifacts import Artifact
from pipeline.config import StreamConfig, TrainConfig
from pipeline.corpus.packing import ConversationValidation, open_validation_stream
from pipeline.corpus.stream import ValidationStream


def open_validation(
    shards: Artifact,
    model: ModelConfig,
    train: TrainConfig,
    stream: StreamConfig,
    *,
    batch_sequences: int,
    max_tokens: int,
) -> ValidationStream | ConversationValidation:
    """Open the val split: cut, bounded and cached as the training's settings say."""
    return open_validation_stream(
        shards,
        context_length=model.context_length,
        batch_sequences=batch_sequences,
        max_tokens=max_tokens,
        cache_folder=stream.cache_folder or None,
        cache_gigabytes=stream.cache_gigabytes,
        document_boundaries=train.document_boundaries,
    )
