"""Logs a training to its MLflow run from a background thread; no outage of the server stops the training.

with Tracker(uri, run_id) as tracker:
    tracker.log_metrics({"train/loss": 3.2}, step=10)   # returns at once
"""

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import is_disk_full
from pipeline.tracking import explain_trouble, first_line, prepare_client

logger = logging.getLogger(__name__)

METRICS_PER_REQUEST = 900  # MLflow takes 1,000 at most
LONGEST_WAIT_SECONDS = 15.0
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # the server's answer would be the same the next time


class Tracker:
    """Logs to one MLflow run; nothing is lost while the server is away. Without a run id it logs nothing.

    Every record is kept until the server has taken it or refused it. `unsent()` gives what is still here, so that a
    checkpoint can carry it over a crash: the next Tracker starts with it. A step that the server already has under a
    name is not sent again, so a training that repeats steps after a restart leaves one continuous curve.
    """

    def __init__(
        self, uri: str, run_id: str, *, unsent: Sequence[Mapping[str, Any]] = (), resumed: bool = False
    ) -> None:
        import mlflow

        prepare_client(uri)
        self._uri = uri
        self._run_id = run_id
        self._resumed = resumed  # the run may hold steps already: ask before sending
        self._known_steps: dict[str, set[int]] = {}
        self._records: list[dict[str, Any]] = [dict(record) for record in unsent] if run_id else []
        self._drawings: dict[str, Callable[[], bytes]] = {}
        self._refused: set[str] = set()  # the names of what has been dropped
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._warned = False
        self._disk_full = False
        if run_id:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            threading.Thread(target=self._send_all, name="mlflow-tracker", daemon=True).start()

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
        if not self._run_id:
            return
        with self._changed:
            self._drawings[path] = draw
            self._changed.notify_all()

    def unsent(self) -> list[dict[str, Any]]:
        """Return the records that MLflow has not taken yet, as plain values."""
        with self._changed:
            return [dict(record) for record in self._records]

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything has been taken; returns False if that took too long, or the store's disk is full."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_idle() or self._disk_full, timeout_seconds)
            return self._is_idle()

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
        if not self._run_id:
            return
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
                self._deliver(batch)
                for path in list(drawings):
                    self._deliver_drawing(path, drawings[path])
                    del drawings[path]
            except Exception as error:  # whatever the network does, training goes on
                wait = self._back_off(error, drawings, wait)
                continue
            if self._warned:
                logger.warning("MLflow answers again; everything logged meanwhile is being sent.")
            wait, self._warned, self._disk_full = 1.0, False, False
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

    def _deliver(self, batch: Sequence[Mapping[str, Any]]) -> None:
        """Send a batch; where MLflow refuses it, send its parts, and drop only what is refused by itself."""
        try:
            self._send(batch)
        except Exception as error:
            if getattr(error, "error_code", "") not in REFUSALS:
                raise
            parts = _halves(batch)
            if not parts:
                self._drop(_name_record(batch[0]), error)
            for part in parts:
                self._deliver(part)

    def _deliver_drawing(self, path: str, draw: Callable[[], bytes]) -> None:
        try:
            picture = draw()
        except Exception as error:  # a picture is not worth the figures behind it
            self._drop(path, error)
            return
        self._deliver([{"path": path, "picture": picture}])

    def _drop(self, name: str, error: Exception) -> None:
        if name not in self._refused:
            logger.warning("MLflow did not take %s, which is dropped: %s", name, first_line(error))
        self._refused.add(name)

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
            if "path" in record:
                content = record["text"].encode() if "text" in record else record["picture"]
                self._send_file(record["path"], content)

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
            logger.warning("%s Training goes on, and what it logs is kept.", explain_trouble(error, self._uri))
            self._warned = True
        with self._changed:
            self._drawings = drawings | self._drawings
            self._busy = False
            self._disk_full = is_disk_full(error)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closing, wait)
        return min(2 * wait, LONGEST_WAIT_SECONDS)


def _halves(batch: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Divide a batch in two, or the figures of its only record; empty where nothing is left to divide."""
    middle = len(batch) // 2
    if middle:
        return [list(batch[:middle]), list(batch[middle:])]
    [record] = batch
    for kind in ("metrics", "tags"):
        entries = list(record.get(kind, {}).items())
        if len(entries) > 1:
            middle = len(entries) // 2
            return [[{**record, kind: dict(part)}] for part in (entries[:middle], entries[middle:])]
    return []


def _name_record(record: Mapping[str, Any]) -> str:
    return str(record.get("path") or next(iter({**record.get("metrics", {}), **record.get("tags", {})}), "a record"))
