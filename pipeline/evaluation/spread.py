"""What is asked of a model on workers: tasks in parts, each a Ray task, and documents for a comparison."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import ray
import torch

from model.checkpoint import load_model
from model.cores import count_cores
from model.gpt import GPT
from model.likelihood import encode_requests, score
from model.tokenizer import Tokenizer, load_tokenizer
from model.training import choose_precision
from pipeline import registry
from pipeline.artifacts import Artifact, Manifest
from pipeline.config import TrainConfig
from pipeline.evaluation.answers import answer
from pipeline.evaluation.evaluators import Item, ItemAnswer
from pipeline.evaluation.tasks import Task

FEWEST_ITEMS = 200  # of a part: loading a model costs as much as some hundred answers


@dataclass(frozen=True)
class Place:
    """On what a worker computes, and what it reserves in Ray."""

    device: str
    precision: str
    cpus: float
    gpus: float
    threads: int = 0  # 0 shares out the cores of a node among the workers there

    @classmethod
    def of(cls, trained: Manifest, options: TrainConfig, use_gpu: bool, resources: Mapping[str, float]) -> "Place":
        """Compute as a training did; which precision `auto` came to, checkpoints of earlier code do not say."""
        device = "cuda" if use_gpu else "cpu"
        return cls(
            device,
            trained.counts.get("precision") or options.precision,
            resources["CPU"],
            resources.get("GPU", 0.0),
            options.threads_per_worker,
        )

    def workers(self) -> int:
        """How many of them run at once on this cluster."""
        there = ray.cluster_resources()
        by_cpu = there.get("CPU", 1.0) / max(self.cpus, 0.01)
        return max(1, int(min(by_cpu, there.get("GPU", 0.0) / self.gpus) if self.gpus else by_cpu))

    def set_threads(self) -> None:
        if self.threads or not self.gpus:
            torch.set_num_threads(self.threads or max(1, min(count_cores(), math.ceil(self.cpus))))


@dataclass(frozen=True)
class Version:
    """A registered version, and the address at which MLflow has it."""

    record: registry.VersionRecord
    tracking_uri: str


def load(source: Artifact | Version, device: str) -> tuple[GPT, Tokenizer]:
    """Load what a training made, or a registered version."""
    if isinstance(source, Version):
        mlflow.set_tracking_uri(source.tracking_uri)
        loaded, model = registry.load(source.record, torch.device(device))
        return model, loaded.tokenizer
    manifest = source.manifest()
    assert manifest is not None
    with tempfile.TemporaryDirectory() as folder:
        records = {name: record for name, record in manifest.files.items() if name.startswith("checkpoint/")}
        checkpoint = source.download(Path(folder), records) / "checkpoint"
        return load_model(checkpoint, device=device).eval(), load_tokenizer(checkpoint)


def ask(source: Artifact | Version, tasks: Sequence[Task], place: Place) -> list[list[ItemAnswer]]:
    """Let a model answer every item of some tasks, on as many workers as find room."""
    remote = ray.remote(answer_part).options(num_cpus=place.cpus, num_gpus=place.gpus)
    parts: list[tuple[int, list[int]]] = []  # a task's number, and the places of some of its items
    for number, task in enumerate(tasks):
        # Neighbours in order of their text begin alike, and what a part's texts share is read once.
        order = sorted(range(len(task.items)), key=lambda at, task=task: _text(task.items[at]))  # type: ignore[misc]
        size = max(FEWEST_ITEMS, math.ceil(len(order) / place.workers()))
        parts += [(number, order[start : start + size]) for start in range(0, len(order), size)]
    waiting = [remote.remote(source, [tasks[number].items[at] for at in places], place) for number, places in parts]
    answers: list[dict[int, ItemAnswer]] = [{} for _ in tasks]
    for (number, places), said in zip(parts, ray.get(waiting), strict=True):
        answers[number] |= dict(zip(places, said, strict=True))
    return [[found[at] for at in range(len(found))] for found in answers]


def _text(item: Item) -> tuple[str, ...]:
    return (item.context, *item.endings)


def answer_part(source: Artifact | Version, items: Sequence[Item], place: Place) -> list[ItemAnswer]:
    place.set_threads()
    model, tokenizer = load(source, place.device)
    return answer(model, tokenizer, items, precision=choose_precision(place.precision, place.device))


def score_documents(sources: Sequence[Artifact | Version], texts: Sequence[str], place: Place) -> list[list[float]]:
    """Return the nats of each text under each model, each text from its beginning, on as many workers as find room."""
    remote = ray.remote(score_texts).options(num_cpus=place.cpus, num_gpus=place.gpus)
    shared: ray.ObjectRef[Sequence[str]] = ray.put(list(texts))
    return ray.get([remote.remote(source, shared, place) for source in sources])


def score_texts(source: Artifact | Version, texts: Sequence[str], place: Place) -> list[float]:
    place.set_threads()
    model, tokenizer = load(source, place.device)
    requests = encode_requests(tokenizer, [("", text) for text in texts])
    scores = score(model, requests, precision=choose_precision(place.precision, place.device))
    return (-scores.nats).tolist()
