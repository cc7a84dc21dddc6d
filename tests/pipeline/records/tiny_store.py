"""A storage root with a chain of artifacts of a few bytes, as the stages leave them."""

import os
import time
from pathlib import Path

from pipeline.artifacts import Artifact, Recipe, artifact_at


def put(
    storage: str,
    pipeline: str,
    stage: str,
    fingerprint: str,
    inputs: dict[str, str] | None = None,
    *,
    done: bool = True,
    days_old: float = 0.0,
) -> Artifact:
    artifact = artifact_at(storage, pipeline, stage, fingerprint, recipe=Recipe(1, {"train.steps": 3}, inputs or {}))
    files = {}
    if stage == "train":
        files["checkpoint/model.safetensors"] = artifact.write_bytes("checkpoint/model.safetensors", b"w" * 1000)
        artifact.write_bytes("checkpoints/step-00000003-aa/training_state.pt", b"s" * 2000)
    files["data"] = artifact.write_bytes("data", stage.encode())
    if done:
        artifact.commit({"mlflow_run_id": "a" * 32} if stage == "train" else {}, files)
    if days_old:
        then = time.time() - 86_400 * days_old
        for path in Path(artifact.path).rglob("*"):
            os.utime(path, (then, then))
    return artifact


def fill_store(storage: str, pipeline: str = "novel", mark: str = "1", days_old: float = 0.0) -> dict[str, Artifact]:
    """A tokenizer, shards, a training and its evaluation, each made from those before it."""
    made: dict[str, Artifact] = {}
    for stage, inputs in (
        ("tokenizer", ()),
        ("prepare", ("tokenizer",)),
        ("train", ("tokenizer", "prepare")),
        ("evaluate", ("tokenizer", "prepare", "train")),
    ):
        fingerprint = (stage[:2].encode().hex() + mark).ljust(20, mark)
        given = {name: made[name].fingerprint for name in inputs}
        made[stage] = put(storage, pipeline, stage, fingerprint, given, days_old=days_old)
    return made
