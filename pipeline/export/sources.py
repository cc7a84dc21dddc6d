"""What is to be exported, by any of its names, as a Hugging Face folder on this machine.

with open_source(config, "models:/demo@champion") as source:
    source.folder       # config.json, model.safetensors, tokenizer.json, README.md, …
"""

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

from pipeline import registry
from pipeline.artifacts import Artifact, expand_home
from pipeline.config import Config

REGISTERED = re.compile(r"models:/([^/@]+)(?:@([\w.-]+)|/(\d+))")
RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Source:
    """A model's folder, and what a person calls it."""

    name: str
    folder: Path


@contextmanager
def open_source(config: Config, name: str) -> Iterator[Source]:
    """Open a version (models:/name@alias, models:/name/3, or a number or alias of the config's model), a training's run
    in MLflow by its id, or the folder of a training or of a checkpoint.

    Raises `ValueError` where it is none of them.
    """
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        found = REGISTERED.fullmatch(name)
        if found is None and name.startswith("models:"):
            raise ValueError(f"{name!r} is no version; write models:/name@alias or models:/name/3.")
        if found is not None:
            yield _open_version(found[1], found[2] or found[3], Path(scratch))
        elif "/" in name or expand_home(name).is_dir():
            yield _open_folder(name, Path(scratch))
        elif RUN_ID.fullmatch(name):
            yield _open_run(name, Path(scratch))
        else:
            yield _open_version(config.registered_name, name, Path(scratch))


def _open_version(name: str, selector: str, scratch: Path) -> Source:
    record = registry.resolve(name, selector)
    return Source(f"{record.name}-v{record.version}", registry.download(record, scratch))


def _open_run(run_id: str, scratch: Path) -> Source:
    try:
        url = mlflow.MlflowClient().get_run(run_id).data.params.get("artifact")
    except MlflowException:
        url = None
    if url is None:
        raise ValueError(f"MLflow has no run {run_id} of a training here.")
    return _open_folder(url, scratch)


def _open_folder(name: str, scratch: Path) -> Source:
    where = name if "://" in name else str(expand_home(name).resolve())
    if "://" not in where and (Path(where) / "config.json").is_file():
        return Source(Path(where).name, Path(where))
    trained = Artifact(where, "train", "")
    manifest = trained.any_manifest()
    if manifest is None:
        raise ValueError(f"{name} is no checkpoint's folder and no training's: it has no config.json, no manifest.")
    records = {each: record for each, record in manifest.files.items() if each.startswith("checkpoint/")}
    if not records:
        raise ValueError(f"{name} is a {manifest.stage}'s folder, which holds no checkpoint; name a training's.")
    trained = dataclasses.replace(trained, fingerprint=manifest.fingerprint)
    return Source(where.rstrip("/").rpartition("/")[2], trained.download(scratch, records) / "checkpoint")
