"""The registry's side of serving: which version a name means now, its files, and whether it is what it says.

A version is read as files (safetensors and JSON), never unpickled.
"""

import logging
import math
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from model.chat import ChatTemplate, load_template
from model.checkpoint import load_model
from model.gpt import GPT
from model.scoring import score_batches
from model.tokenizer import Tokenizer, load_tokenizer
from model.training import LossModule

logger = logging.getLogger("ray.serve")

CURVES = {  # what the card calls it -> the metric of the training's run
    "training loss": "train/loss",
    "validation loss": "validation/loss",
    "bits per byte": "validation/bits_per_byte",
}
# MLflow's pages open as those of generative AI, whatever the experiment's kind, unless the address says otherwise.
AS_TRAINING = "?workflowType=machine_learning"
PROBE_TAG = "probe_text_bits_per_byte"
GATE_TAG = "gate_reason"  # of a version: why it took the alias, or did not
REFUSED_TAG = "refused_challenger"  # of the version that kept the alias: what was refused last, and why
# Plain English and a little code, for any model to be surprised by: what matters is that the surprise is the same.
PROBE_TEXT = """\
The river rose in the night, and by morning the lower road was under water. Nobody in the village was
surprised; the old people had said so in August, when the swallows left early and the wells ran clear.
Return a new list containing all items from the iterable in ascending order. A custom key function can be
supplied to customize the sort order, and the reverse flag can be set to request the result in descending order.
for name, value in sorted(counts.items()):
    print(f"{name}: {value}")
In 1687 he had written that every body continues in its state of rest, unless it is compelled to change it.
"""


@dataclass(frozen=True)
class VersionRecord:
    """What the registry says of one version."""

    name: str
    version: str
    run_id: str
    created: int  # seconds since 1970
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def data_digest(self) -> str:
        return self.tags.get("data_digest", "")

    @property
    def bits_per_byte(self) -> float | None:
        return _number(self.tags.get("bits_per_byte"))

    @property
    def gate_reason(self) -> str:
        return self.tags.get(GATE_TAG, "")

    @property
    def refused_challenger(self) -> str:
        return self.tags.get(REFUSED_TAG, "")

    @property
    def probe_bits_per_byte(self) -> float | None:
        return _number(self.tags.get(PROBE_TAG))


@dataclass(frozen=True)
class LoadedVersion:
    """What is known of a version that was loaded; its weights belong to the backend, which may repack them."""

    record: VersionRecord
    tokenizer: Tokenizer
    context_length: int
    num_parameters: int
    chat_template: ChatTemplate | None = None  # None: it was not trained on conversations


class VersionRefused(ValueError):
    """A version is not what the registry says, or gives no answer: loading it again would find the same."""


def resolve(name: str, selector: str) -> VersionRecord:
    """Ask the registry which version `selector` (an alias or a number) means now.

    Raises `ValueError` naming what there is, where there is no such model or version.
    """
    client = mlflow.MlflowClient()
    try:
        if selector.isdigit():
            found = client.get_model_version(name, selector)
        else:
            found = client.get_model_version_by_alias(name, selector)
    except MlflowException as error:
        if error.error_code not in (ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
            raise
        raise ValueError(_nothing_found(client, name, selector)) from None
    run_id = found.tags.get("mlflow_run_id") or found.run_id or ""
    return VersionRecord(name, str(found.version), run_id, int(found.creation_timestamp) // 1000, dict(found.tags))


def load(record: VersionRecord, device: torch.device) -> tuple[LoadedVersion, GPT]:
    """Download a version's checkpoint and load it; the files are removed again."""
    with tempfile.TemporaryDirectory(prefix="model-version-") as folder:
        return read(record, download(record, Path(folder)), device)


def download(record: VersionRecord, folder: Path) -> Path:
    """Copy a version's files into a folder and return the Hugging Face folder among them."""
    artifacts = mlflow.artifacts.download_artifacts(
        artifact_uri=f"models:/{record.name}/{record.version}", dst_path=str(folder)
    )
    return find_checkpoint(Path(artifacts), record)


def read(record: VersionRecord, checkpoint: Path, device: torch.device) -> tuple[LoadedVersion, GPT]:
    """Load a downloaded version onto a device."""
    model = load_model(checkpoint, device=device).eval()
    tokenizer = load_tokenizer(checkpoint)
    size, context_length = model.num_parameters(), model.config.context_length
    return LoadedVersion(record, tokenizer, context_length, size, load_template(checkpoint)), model


def find_checkpoint(artifacts: Path, record: VersionRecord) -> Path:
    """Find the Hugging Face folder among a version's files."""
    for folder in (artifacts / "artifacts" / "checkpoint", artifacts / "checkpoint", artifacts):
        if (folder / "model.safetensors").is_file():
            return folder
    raise ValueError(f"Version {record.version} of {record.name} holds no checkpoint; register it again.")


@dataclass
class ProbeBatch:
    """One window of the probe text, as the scorer takes it."""

    tokens: torch.Tensor  # [1, T]
    targets: torch.Tensor  # [1, T], the next tokens
    document_ids: torch.Tensor | None = None


def measure_probe(model: GPT, tokenizer: Tokenizer) -> float:
    """Bits per byte of the probe text: the number that says whether weights and tokenizer are the ones registered.

    Always in the weights' own precision, so that a machine of another kind finds the same number.
    """
    windows = probe_windows(tokenizer, model.config.context_length)
    rows = (torch.tensor(window)[None] for window in windows)
    batches = (ProbeBatch(row[:, :-1], row[:, 1:]) for row in rows)
    return score_batches(LossModule(model), batches, tokenizer.byte_lengths).bits_per_byte


def probe_windows(tokenizer: Tokenizer, context_length: int) -> Iterator[list[int]]:
    """The probe text's tokens in parts that overlap by one, each leaving the context room for an answer of one."""
    ids = [tokenizer.begin_of_text, *tokenizer.encode(PROBE_TEXT).tolist()]
    for start in range(0, len(ids) - 1, context_length - 2):
        yield ids[start : start + context_length - 1]


def check_probe(record: VersionRecord, measured: float, tolerance: float) -> None:
    """Raise `VersionRefused` where the measured bits per byte are not near what the registry says."""
    if not math.isfinite(measured):
        raise VersionRefused(f"version {record.version} gives {measured} bits per byte on the probe text")
    expected = record.probe_bits_per_byte
    if expected is not None and abs(measured - expected) > tolerance * expected:
        raise VersionRefused(
            f"version {record.version} gives {measured:.3f} bits per byte on the probe text,"
            f" the registry says {expected:.3f}"
        )


def read_card(record: VersionRecord, mlflow_pages: str = "") -> dict[str, Any]:
    """What the page shows beside the figures: the curves of the training, and where to read more."""
    return {"loss_curves": read_loss_curves(record.run_id), **link_run(record.run_id, mlflow_pages)}


def read_loss_curves(run_id: str, points: int = 200) -> dict[str, list[tuple[int, float]]]:
    """The training and validation curves of a run, thinned; empty where the tracking store cannot be asked."""
    curves: dict[str, list[tuple[int, float]]] = {}
    if not run_id:
        return curves
    try:
        client = mlflow.MlflowClient()
        known = client.get_run(run_id).data.metrics
        for label, key in CURVES.items():
            if key not in known:
                continue
            history = sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))
            every = max(1, len(history) // points)
            curves[label] = [*history[:-1:every], *history[-1:]]
    except MlflowException as error:
        logger.warning("No loss curve for run %s: %s", run_id, error)
    return curves


def link_run(run_id: str, mlflow_pages: str = "") -> dict[str, str]:
    """Return a run's page in MLflow as `run_url`, and as `run_command` what to start first where nothing shows it yet.

    `mlflow_pages` is where MLflow's pages are, where that is another address than the tracking server's.
    """
    uri = mlflow.get_tracking_uri()
    found = {"run_url": "", "run_command": ""}
    if not run_id:
        return found
    try:
        place = place_of_run(run_id)
    except MlflowException:
        return found
    if not mlflow_pages and uri.startswith("sqlite:"):  # a store of this machine's
        found["run_command"] = f"python -m mlflow server --backend-store-uri {shlex.quote(uri)}"
        mlflow_pages = "http://127.0.0.1:5000"
    pages = mlflow_pages or uri
    if pages.startswith(("http://", "https://")):
        scheme, _, rest = pages.partition("://")
        host = rest.rpartition("@")[2].rstrip("/")  # a password in the address is not for the page
        found["run_url"] = f"{scheme}://{host}/{place}"
    return found


def place_of_run(run_id: str) -> str:
    """The path of a run's page on any server that shows this store."""
    return f"#/experiments/{mlflow.MlflowClient().get_run(run_id).info.experiment_id}/runs/{run_id}{AS_TRAINING}"


def place_of_version(name: str, version: str) -> str:
    """The path of a registered version's page."""
    return f"#/models/{name}/versions/{version}{AS_TRAINING}"


def _nothing_found(client: mlflow.MlflowClient, name: str, selector: str) -> str:
    versions = sorted(int(version.version) for version in client.search_model_versions(f"name = '{name}'"))
    if not versions:
        others = sorted(model.name for model in client.search_registered_models(max_results=20))
        there = f" It has {', '.join(others)}: give name=NAME of the one you mean." if others else ""
        return f"The registry has no model {name!r}; run the register stage first.{there}"
    aliases = client.get_registered_model(name).aliases
    there = ", ".join(map(str, versions)) + (f"; aliases: {', '.join(sorted(aliases))}" if aliases else "")
    kind = "version" if selector.isdigit() else "alias"
    return f"The model {name!r} has no {kind} {selector!r}; its versions are {there}."


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
