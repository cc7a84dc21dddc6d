"""MLflow: where it is, one run per training, and a Tracker that no outage of the server stops.

tracking.connect(config)                       # on the driver, before any worker
run_id = tracking.open_run(config, ...)        # a new run, or the old one of a resumed training
with Tracker(uri, run_id) as tracker:          # on rank 0
    tracker.log_metrics({"train/loss": 3.2}, step=10)   # returns at once
"""

import dataclasses
import logging
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, resolve_storage
from pipeline.config import Config

logger = logging.getLogger(__name__)

METRICS_PER_REQUEST = 900  # MLflow takes 1,000 at most
LONGEST_WAIT_SECONDS = 15.0
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
    fail_soon()
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


def fail_soon() -> None:
    """Have MLflow's HTTP client give up in seconds, not in the quarter of an hour that is its default."""
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
    """Name the commit of this code, and whether files were changed since; GIT_COMMIT where there is no git."""
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        commit_name = os.environ.get("GIT_COMMIT", "")
        return {"mlflow.source.git.commit": commit_name} if commit_name else {}
    return {
        "mlflow.source.git.commit": commit.stdout.strip(),
        "git_changed_files": str(len(status.stdout.splitlines())),
    }


class Tracker:
    """Logs to one MLflow run from a background thread; nothing is lost while the server is away.

    Every record is kept until the server has taken it. `unsent()` gives what is still here, so that a checkpoint
    can carry it over a crash: the next Tracker starts with it. A step that the server already has under a name is
    not sent again, so a training that repeats steps after a restart leaves one continuous curve.
    """

    def __init__(
        self, uri: str, run_id: str, *, unsent: Sequence[Mapping[str, Any]] = (), resumed: bool = False
    ) -> None:
        import mlflow

        fail_soon()
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._run_id = run_id
        self._resumed = resumed  # the run may hold steps already: ask before sending
        self._known_steps: dict[str, set[int]] = {}
        self._records: list[dict[str, Any]] = [dict(record) for record in unsent]
        self._drawings: dict[str, Callable[[], bytes]] = {}
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._warned = False
        self._thread = threading.Thread(target=self._send_all, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close(timeout_seconds=0)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._add({"metrics": values, "step": step, "time": int(time.time() * 1000)})

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self._add({"tags": dict(tags)})

    def log_text(self, path: str, text: str) -> None:
        self._add({"path": path, "text": text})

    def log_drawing(self, path: str, draw: Callable[[], bytes]) -> None:
        """Draw in the background and log the picture; only the newest one of a path is sent."""
        with self._changed:
            self._drawings[path] = draw
            self._changed.notify_all()

    def unsent(self) -> list[dict[str, Any]]:
        """Return the records that MLflow has not taken yet, as plain values."""
        with self._changed:
            return [dict(record) for record in self._records]

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything has been taken; returns False if that took too long."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout_seconds)

    def close(self, timeout_seconds: float) -> list[dict[str, Any]]:
        """Wait for a while, stop the thread, and return what MLflow did not take."""
        self.flush(timeout_seconds)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        return self.unsent()

    def _is_idle(self) -> bool:
        return not self._records and not self._drawings and not self._busy

    def _add(self, record: dict[str, Any]) -> None:
        with self._changed:
            self._records.append(record)
            self._changed.notify_all()

    def _send_all(self) -> None:
        wait = 1.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._records or self._drawings)
                if self._closing:
                    return
                batch = self._next_batch()
                drawings, self._drawings = self._drawings, {}
                self._busy = True
            try:
                self._send(batch)
                for path, draw in drawings.items():
                    self._send_file(path, draw())
                wait = 1.0
                if self._warned:
                    logger.warning("MLflow answers again; everything logged meanwhile is being sent.")
                    self._warned = False
            except Exception as error:  # whatever the network does, training goes on
                if getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE":
                    wait = self._back_off(error, drawings, wait)
                    continue
                logger.warning("MLflow refused a record, it is dropped: %s", first_line(error))
            with self._changed:
                del self._records[: len(batch)]
                self._busy = False
                self._changed.notify_all()

    def _next_batch(self) -> list[dict[str, Any]]:
        batch: list[dict[str, Any]] = []
        num_metrics = 0
        for record in self._records:
            num_metrics += len(record.get("metrics", ()))
            if batch and num_metrics > METRICS_PER_REQUEST:
                break
            batch.append(record)
        return batch

    def _send(self, batch: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics: dict[tuple[str, int], Metric] = {}
        tags: dict[str, str] = {}
        for record in batch:
            for name, value in record.get("metrics", {}).items():
                if record["step"] not in self._steps_of(name):
                    metrics.setdefault((name, record["step"]), Metric(name, value, record["time"], record["step"]))
            tags.update(record.get("tags", {}))
        if metrics or tags:
            self._client.log_batch(
                self._run_id,
                metrics=[*metrics.values()],
                tags=[RunTag(name, str(value)) for name, value in tags.items()],
            )
        for name, step in metrics:
            self._known_steps[name].add(step)
        for record in batch:
            if "text" in record:
                self._send_file(record["path"], record["text"].encode())

    def _steps_of(self, name: str) -> set[int]:
        if name not in self._known_steps:
            history = self._client.get_metric_history(self._run_id, name) if self._resumed else []
            self._known_steps[name] = {metric.step for metric in history}
        return self._known_steps[name]

    def _send_file(self, path: str, content: bytes) -> None:
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary) / name
            local.write_bytes(content)
            self._client.log_artifact(self._run_id, str(local), folder or None)

    def _back_off(self, error: Exception, drawings: dict[str, Callable[[], bytes]], wait: float) -> float:
        if not self._warned:
            logger.warning("MLflow is away (%s); training goes on, and what it logs is kept.", first_line(error))
            self._warned = True
        with self._changed:
            self._drawings = drawings | self._drawings
            self._busy = False
            self._changed.wait_for(lambda: self._closing, wait)
        return min(2 * wait, LONGEST_WAIT_SECONDS)
