"""MLflow: where it is, whether it answers, and one run per training.

tracking.connect(config)                       # on the driver, before any worker
run_id = tracking.open_run(config, ...)        # a new run, or the old one of a resumed training
"""

import dataclasses
import logging
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import addresses
from pipeline.artifacts import Artifact, resolve_storage
from pipeline.config import Config

logger = logging.getLogger(__name__)

LONGEST_PARAMETER = 6000  # characters; MLflow refuses more


_answered: set[str] = set()  # addresses that have answered this process once


class MlflowAway(ValueError):
    """Nothing answers at MLflow's address."""


def connect(config: Config) -> str:
    """Point MLflow at its store, make the experiment if it is new, and return the tracking URI.

    The driver calls this before any worker starts: several processes that open a fresh SQLite store at once
    break it for good.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = address(config)
    artifact_root = None
    is_ours = not os.environ.get("MLFLOW_TRACKING_URI")
    if is_ours:
        storage = resolve_storage(config.storage)
        Path(storage).mkdir(parents=True, exist_ok=True)
        artifact_root = f"{storage}/mlflow"
    prepare_client(uri)
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
        logging.getLogger(name).setLevel(logging.WARNING)  # else a page of migrations at the first use
    mlflow.set_tracking_uri(uri)
    if is_ours:
        # MLflow also writes it into the environment, where the next `connect` would take it for the user's wish.
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    client = mlflow.MlflowClient(tracking_uri=uri)
    try:
        experiment = client.get_experiment_by_name(config.name)
        if experiment is None:
            try:
                client.create_experiment(config.name, artifact_location=artifact_root)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # somebody else was first
                    raise
        elif experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        mlflow.set_experiment(config.name)
    except MlflowException as error:
        raise MlflowAway(f"MLflow at {without_password(uri)} does not answer: {first_line(error)}") from None
    _answered.add(uri)
    return uri


def is_outage(error: BaseException | None) -> bool:
    """Whether an error means that the MLflow server, which had answered before, did not; not that it refused."""
    import requests
    from mlflow.exceptions import MlflowException, RestException

    if not _answered:
        return False
    while error is not None:
        if isinstance(error, (MlflowAway, requests.ConnectionError, requests.Timeout)):
            return True
        # The client's words for no connection, and for a gateway's answer in place of the server's.
        if isinstance(error, MlflowException) and not isinstance(error, RestException):
            return str(error).startswith("API request to")
        error = error.__cause__ or error.__context__
    return False


def wait_for_answer(config: Config, deadline: float) -> bool:
    """Wait until MLflow answers; returns False if it does not before `deadline`, a time of time.monotonic()."""
    while time.monotonic() < deadline:
        time.sleep(min(5.0, max(0.0, deadline - time.monotonic())))
        try:
            connect(config)
        except MlflowAway:
            continue
        return True
    return False


def address(config: Config) -> str:
    """Return the tracking URI: MLFLOW_TRACKING_URI, else an SQLite file under a local storage root."""
    storage = resolve_storage(config.storage)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri and "://" in storage:
        raise ValueError(
            f"With storage at {storage} MLflow needs a server: set MLFLOW_TRACKING_URI"
            " (for a try: `mlflow server --artifacts-destination s3://bucket/mlflow`)."
        )
    return uri or f"sqlite:///{storage}/mlflow.db"


def prepare_client(uri: str) -> None:
    """Have MLflow's HTTP client give up in seconds, not in the quarter of an hour that is its default, and go past
    any proxy where the server is our own."""
    addresses.go_direct(uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def without_password(uri: str) -> str:
    """Return the address as it may appear in a log."""
    return re.sub(r"//[^/@]*@", "//…@", uri)


def first_line(error: BaseException) -> str:
    return without_password((str(error).strip() or type(error).__name__).splitlines()[0])


def open_run(
    config: Config, run_id: str | None, *, name: str, data: Mapping[str, Artifact], facts: Mapping[str, Any]
) -> str:
    """Return the MLflow run of this training: `run_id` if MLflow still has it, else a new one.

    A new run gets its parameters, git commit and data digests here; a resumed one has them already.
    """
    import mlflow
    from mlflow.entities import Dataset, DatasetInput, Param
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    if run_id is not None:
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if run.info.lifecycle_stage == "deleted":
                client.restore_run(run_id)
            client.update_run(run_id, status="RUNNING")
            return run_id
    experiment = client.get_experiment_by_name(config.name)
    assert experiment is not None, "connect() makes it"
    tags = {"mlflow.source.name": "jobs.train", "mlflow.source.type": "JOB"} | git_tags()
    run = client.create_run(experiment.experiment_id, run_name=name, tags=tags)
    settings = flatten(dataclasses.asdict(config)) | dict(facts)
    params = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in settings.items()]
    for start in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[start : start + 100])
    client.log_inputs(
        run.info.run_id,
        datasets=[
            DatasetInput(Dataset(name=stage, digest=artifact.fingerprint, source_type="url", source=artifact.url))
            for stage, artifact in data.items()
        ],
    )
    return str(run.info.run_id)


def close_run(run_id: str, status: str) -> None:
    """Say in MLflow how the run ended; a server that is away does not change how it ended."""
    import mlflow

    try:
        mlflow.MlflowClient().set_terminated(run_id, status)
    except Exception as error:
        logger.warning("MLflow was not told that the run is %s: %s", status, first_line(error))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name each leaf by its dotted path."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def git_tags() -> dict[str, str]:
    """Name the commit of this code, and whether files differ from it; GIT_COMMIT where there is no git."""
    commit = git_commit(Path(__file__).parent) or os.environ.get("GIT_COMMIT", "")
    if not commit:
        return {}
    return {"mlflow.source.git.commit": commit.rstrip("+"), "git_files_changed": str(commit.endswith("+")).lower()}


def git_commit(folder: Path) -> str:
    """The commit that is checked out, with a plus sign where files differ from it; empty outside of git."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
