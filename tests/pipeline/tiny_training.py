"""A corpus, a tokenizer and a config so small that a training takes seconds; made without the stages before it."""

import os
import random
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train

from model.tokenizer import Tokenizer, train_bpe
from pipeline import orchestrator, train
from pipeline.artifacts import Artifact, Manifest, artifact_at
from pipeline.config import Config, load_config
from pipeline.training import worker
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.history import History
from tests.mlflow_store import point_mlflow_at

WORDS = (
    *("the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "tree", "house", "and", "then"),
    *("it", "was", "very", "big", "small", "red"),
)

SETTINGS = (
    "name=tiny",
    "seed=7",
    "model.num_layers=2",
    "model.width=32",
    "model.num_heads=2",
    "model.context_length=32",
    "train.steps=12",
    "train.batch_tokens=256",
    "train.micro_batch_sequences=2",
    "train.evaluate_every_steps=6",
    "train.evaluation_tokens=512",
    "train.checkpoint_every_steps=4",
    "train.log_every_steps=1",
    "train.sample_tokens=4",
    "evaluate.sample_tokens=4",
    "train.threads_per_worker=1",
    "train.cpus_per_worker=1",
    "train.precision=float32",
)


def tiny_config(storage: str, *settings: str) -> Config:
    """The smallest training that uses everything, with `settings` over it."""
    return load_config(None, [f"storage={storage}", *SETTINGS, *settings])


def tiny_inputs(config: Config, *, documents: int = 400, vocabulary_size: int = 300) -> dict[str, Artifact]:
    """Write a tokenizer and shards as their stages would."""
    random_words = random.Random(3)
    texts = [" ".join(random_words.choices(WORDS, k=random_words.randint(5, 40))) + "." for _ in range(documents)]
    tokenizer = train_bpe(texts[:50], vocabulary_size)
    made = artifact_at(config.storage, config.name, "tokenizer", "1" * 20)
    return {"tokenizer": write_tokenizer(made, tokenizer), "prepare": write_shards(config, tokenizer, texts)}


def write_tokenizer(artifact: Artifact, tokenizer: Tokenizer) -> Artifact:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        files = artifact.upload(Path(folder))
    artifact.commit({}, files)
    return artifact


def write_shards(config: Config, tokenizer: Tokenizer, texts: list[str]) -> Artifact:
    """Write one Parquet shard per split, each document ended by the end of text, and the manifest."""
    artifact = artifact_at(config.storage, config.name, "prepare", f"{len(texts):020}")
    counts: dict[str, object] = {
        "tokenizer_digest": tokenizer.digest,
        "vocabulary_size": tokenizer.vocab_size,
    }
    files = {}
    held_out = max(1, len(texts) // 10)
    for split, chosen in (("val", texts[:held_out]), ("train", texts[held_out:])):
        rows = [[*tokenizer.encode(text).tolist(), tokenizer.end_of_text] for text in chosen]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"tokens": pa.array(rows, pa.list_(pa.uint16()))}), sink)
        files[f"{split}/00000.parquet"] = artifact.write_bytes(f"{split}/00000.parquet", sink.getvalue().to_pybytes())
        counts[split] = {
            "documents": len(rows),
            "tokens": sum(len(row) for row in rows),
            "bytes": sum(len(text.encode()) for text in chosen),
        }
    artifact.commit(counts, files)
    return artifact


def tiny_output(config: Config, inputs: dict[str, Artifact]) -> Artifact:
    """Name the training's artifact as the orchestrator does."""
    return orchestrator.name_output("train", config, inputs)


@dataclass(frozen=True)
class Training:
    """A training that is over, and what the tests ask of it."""

    config: Config
    inputs: dict[str, Artifact]
    output: Artifact
    manifest: Manifest

    def history(self) -> History:
        return last_history(self.config, self.output)

    def losses(self) -> dict[int, float]:
        return {int(step): loss for step, loss in self.history().training}

    def weights_digest(self) -> str:
        return last_checkpoint(self.config, self.output).files["model.safetensors"].sha256

    def mlflow_run(self) -> Any:
        point_mlflow_at(f"sqlite:///{self.config.storage}/mlflow.db")
        return mlflow.MlflowClient().get_run(self.manifest.counts["mlflow_run_id"])

    def metric_history(self) -> Callable[[str], list[Any]]:
        point_mlflow_at(f"sqlite:///{self.config.storage}/mlflow.db")
        client = mlflow.MlflowClient()
        return lambda name: client.get_metric_history(self.manifest.counts["mlflow_run_id"], name)


def start_training(storage: str, *settings: str, config: Config | None = None) -> Training:
    """Run the train stage as the orchestrator would."""
    config = config or tiny_config(storage, *settings)
    inputs = tiny_inputs(config)
    output = tiny_output(config, inputs)
    return Training(config, inputs, output, train.run(config, inputs, output))


def last_checkpoint(config: Config, output: Artifact) -> Manifest:
    return next(CheckpointStore(output, config.train.keep_checkpoints).whole())[1]


def last_history(config: Config, output: Artifact) -> History:
    name, _ = next(CheckpointStore(output, config.train.keep_checkpoints).whole())
    return History.load(Path(output.file(f"checkpoints/{name}")))


def dying_worker(folder: Path, *deaths: tuple[int, int, str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The training worker, but rank r dies by kill -9 at step s, once: (r, s, where).

    Where is `step` (before it), `accumulation` (after its first micro-batch) or `checkpoint` (the weights are
    written, the rest is not). `poison` makes that step's loss NaN instead.
    """

    def doomed_worker(told: dict[str, Any]) -> dict[str, Any]:
        rank = ray.train.get_context().get_world_rank()
        step_for_real, save_for_real = worker.train_step, worker.save_training_state

        def happens(step: int, where: str) -> bool:
            marker = folder / f"{rank}-{step}-{where}"
            if (rank, step, where) not in deaths or marker.exists():
                return False
            marker.touch()
            return True

        def die(step: int, where: str) -> None:
            if happens(step, where):
                os.kill(os.getpid(), signal.SIGKILL)

        def accumulate(batches: Any, step: int) -> Any:
            for number, batch in enumerate(batches):
                if number == 1:
                    die(step, "accumulation")
                yield batch

        def step_or_die(module: Any, optimizer: Any, batches: Any, *, step: int, **rest: Any) -> Any:
            die(step, "step")
            poisoned = happens(step, "poison")
            weight = next(module.parameters()).data
            before = weight.clone()
            if poisoned:
                weight.fill_(float("nan"))
            measures = step_for_real(module, optimizer, accumulate(batches, step), step=step, **rest)
            if poisoned:
                weight.copy_(before)
            return measures

        def save_or_die(into: Path, state: Any) -> None:
            die(int(into.name.split("-")[1]), "checkpoint")
            save_for_real(into, state)

        worker.train_step, worker.save_training_state = step_or_die, save_or_die  # type: ignore[assignment]
        return worker.train_worker(told)

    return doomed_worker
