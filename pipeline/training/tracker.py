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

from pipeline.tracking import first_line, prepare_client

logger = logging.getLogger(__name__)

METRICS_PER_REQUEST = 900  # MLflow takes 1,000 at most
LONGEST_WAIT_SECONDS = 15.0


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

        prepare_client(uri)
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
