"""What one training is: made from the whole config by one function, and all that the workers' loop reads.

plan = plan_training(config, inputs, output, tracking_uri=..., mlflow_run_id=..., started=...)
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from model.chat import TEMPLATE_FILE
from model.config import ModelConfig, OptimizerConfig
from model.gpt import GPT
from model.tokenizer import Tokenizer
from pipeline.artifacts import Artifact
from pipeline.config import Config, StreamConfig, TrainConfig
from pipeline.corpus.members import bytes_per_target, members_of


class Exam(Protocol):
    """What a training asks its model as it goes; which tasks those are, it does not know."""

    def ask(
        self, model: GPT, tokenizer: Tokenizer, precision: torch.dtype, rank: int, world_size: int
    ) -> tuple[dict[str, float], list[str]]:
        """Ask on all ranks together; return figures by their names, and the lines that say them."""


@dataclass(frozen=True)
class TrainingPlan:
    """What every worker is told: the same loop runs for the stage, a search's trial, a benchmark or a test."""

    name: str
    seed: int
    model: ModelConfig
    optimizer: OptimizerConfig
    stream: StreamConfig
    train: TrainConfig
    shards: Artifact
    tokenizer: Artifact
    output: Artifact
    vocab_size: int  # rows of the embedding; the tokenizer of a start may have fewer tokens
    bytes_per_token: float  # of what is learnt of the training split: turns nats per token into bits per byte
    chat_template: str = ""  # of shards that hold conversations; checkpoints carry it
    start: Artifact | None = None  # a Hugging Face folder with the first weights; None: random ones
    exam: Exam | None = None
    base: str = ""  # what the start was called, for whoever reads an adapter
    tracking_uri: str = ""
    mlflow_run_id: str = ""  # empty: nothing goes to MLflow
    started: float = field(default_factory=time.time)  # Unix time of the run's first start, restarts included


def plan_training(
    config: Config,
    inputs: Mapping[str, Artifact],
    output: Artifact,
    *,
    tracking_uri: str,
    mlflow_run_id: str,
    started: float,
    exam: Exam | None = None,
) -> TrainingPlan:
    """Plan the training that a config describes, on the shards and with the tokenizer among `inputs`."""
    shards = inputs["prepare"].manifest()
    assert shards is not None
    start = None if "start" not in inputs else inputs["start"].manifest()
    return TrainingPlan(
        name=config.name,
        seed=config.seed,
        model=config.model,
        optimizer=config.optimizer,
        stream=config.stream,
        train=config.train,
        shards=inputs["prepare"],
        tokenizer=inputs["tokenizer"],
        output=output,
        vocab_size=(start or shards).counts["vocabulary_size"],
        bytes_per_token=bytes_per_target(members_of(inputs["prepare"])),
        start=inputs.get("start"),
        base=config.start.resolved,
        chat_template=inputs["prepare"].read_text(TEMPLATE_FILE) if TEMPLATE_FILE in shards.files else "",
        exam=exam,
        tracking_uri=tracking_uri,
        mlflow_run_id=mlflow_run_id,
        started=started,
    )
