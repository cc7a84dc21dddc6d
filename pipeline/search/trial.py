"""One trial: a training's artifact like any other, run inside Ray Tune, and the record of how far it came.

A record lies beside the search's results, written at each evaluation and once more when the trial is over. So what is
over is never run again: its figures are told again. What is not over goes on from its last checkpoint.
"""

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import mlflow
import ray
from ray import tune

from pipeline import orchestrator, tracking
from pipeline.artifacts import Artifact
from pipeline.config import Config
from pipeline.search.space import Point
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.history import FILE, History
from pipeline.training.plan import TrainingPlan

RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"
POLL_SECONDS = 0.25
# A stopped trial's workers write a checkpoint; after this they are killed with their trial.
STOP_SECONDS = 25.0
PARENT_TAG = "mlflow.parentRunId"
SEARCH_TAG = "search"


@dataclass
class Record:
    """How far a trial came; plain values."""

    state: str = RUNNING
    point: Point = field(default_factory=dict)
    points: list[list[float]] = field(default_factory=list)  # (steps, tokens, bits per byte) of each evaluation
    reason: str = ""  # why it was stopped, or failed
    mlflow_run_id: str = ""
    seconds: float = 0.0  # that a training took, restarts included; 0 where that is not known

    @property
    def is_over(self) -> bool:
        return self.state != RUNNING

    @property
    def tokens(self) -> int:
        return int(self.points[-1][1]) if self.points else 0

    @property
    def bits_per_byte(self) -> float:
        """The best evaluation's, as the training keeps that checkpoint; infinite where there is none."""
        return min((bits for _, _, bits in self.points), default=math.inf)


@dataclass(frozen=True)
class Trial:
    """A training that a search asks for."""

    number: int
    point: Point
    config: Config
    inputs: dict[str, Artifact]
    output: Artifact
    search: Artifact
    parent_run_id: str = ""

    @property
    def file(self) -> str:
        return f"trials/{self.output.fingerprint}.json"

    def read_record(self) -> Record:
        if not self.search.exists(self.file):
            return Record(point=dict(self.point))
        return Record(**json.loads(self.search.read_text(self.file)))

    def write_record(self, record: Record) -> None:
        self.search.write_text(self.file, json.dumps(asdict(record)))


class Finder(Protocol):
    """Knows which trial Tune means."""

    def find(self, asked: Mapping[str, Any]) -> Trial: ...


@dataclass(frozen=True)
class Listed:
    """Trials that were chosen beforehand, by their numbers."""

    trials: tuple[Trial, ...]

    def find(self, asked: Mapping[str, Any]) -> Trial:
        return next(trial for trial in self.trials if trial.number == asked["number"])


class Attempt(tune.Trainable):
    """A trial as Tune sees it: each step is one evaluation on held-out text, told from a record or as it comes."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        # Its workers ask for CPUs and GPUs themselves: any that it held, they would wait for in vain.
        return tune.PlacementGroupFactory([{"memory": 1}])

    def setup(self, config: dict[str, Any], finder: Finder) -> None:  # type: ignore[override]
        self._finder = finder
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Be the next trial: a new process would take seconds to start."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, asked: Mapping[str, Any]) -> None:
        self._trial = self._finder.find(asked)
        self._record = self._trial.read_record()
        self._told = 0
        self._line: Any = None
        self._error: BaseException | None = None
        self._training: threading.Thread | None = None
        if self._record.is_over:
            return
        tracking.connect(self._trial.config)
        if not self._trial.output.is_done:
            self._record.points = points_so_far(self._trial)
            self._training = threading.Thread(target=self._train, name="training", daemon=True)
            self._training.start()
        else:
            self._finish()

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation, or the end."""
        record = self._record
        while not (record.is_over or self._has_news()):
            self._listen()
        self._told = min(self._told + 1, len(record.points))
        is_last = record.is_over and self._told == len(record.points)
        steps, tokens, bits = record.points[self._told - 1] if record.points else (0, 0, math.inf)
        if is_last and record.state == FAILED:
            bits = math.inf
        figures = {"bits_per_byte": bits, "tokens": tokens, "steps": steps}
        return figures | {"training": self._trial.output.fingerprint, "done": is_last}

    def _has_news(self) -> bool:
        """Whether there is an evaluation to tell: the last one only when the training is over, and all is written."""
        points = self._record.points
        return self._told < len(points) and points[self._told][0] < self._trial.config.train.steps

    def cleanup(self) -> None:
        """Let the workers write a checkpoint and go; Tune has stopped the trial, or it is over."""
        if self._training is not None and self._training.is_alive():
            if self._line is not None:
                self._line.stop.remote()
            self._training.join(STOP_SECONDS)

    def _train(self) -> None:
        trial = self._trial
        train: Any = orchestrator.module_of("train")
        try:
            train.run(trial.config, trial.inputs, trial.output, watch=self._watch)
        except BaseException as error:
            self._error = error

    def _watch(self, plan: TrainingPlan, line: Any) -> None:
        self._record.mlflow_run_id = plan.mlflow_run_id
        tag_run(self._trial, plan.mlflow_run_id)
        self._trial.write_record(self._record)
        self._line = line

    def _listen(self) -> None:
        """Wait a little, and note what the training has told, or how it ended."""
        assert self._training is not None
        self._training.join(POLL_SECONDS)
        ended = not self._training.is_alive()
        if self._line is not None:
            known, batch_tokens = len(self._record.points), self._trial.config.train.batch_tokens
            for steps, bits in ray.get(self._line.scores.remote()):
                # After a restart of the workers some are told again.
                if steps > (self._record.points[-1][0] if self._record.points else 0):
                    self._record.points.append([steps, steps * batch_tokens, bits])
            if len(self._record.points) > known:
                self._trial.write_record(self._record)
        if not ended:
            return
        if isinstance(self._error, ValueError) and not isinstance(self._error, tracking.MlflowAway):
            # A sentence for a person: another start now would meet the same.
            self._record.state, self._record.reason = FAILED, str(self._error)
            self._trial.write_record(self._record)
        elif self._error is not None:
            raise self._error
        else:
            self._finish()

    def _finish(self) -> None:
        """Complete the record of a training that is done; it may have been done before the search began."""
        manifest = self._trial.output.manifest()
        assert manifest is not None
        counts, record = manifest.counts, self._record
        points = {
            int(steps): [steps, tokens, bits] for steps, tokens, bits in [*points_so_far(self._trial), *record.points]
        }
        if counts["steps"] not in points:
            points[counts["steps"]] = [counts["steps"], counts["tokens"], counts["bits_per_byte"]]
        record.points = [points[steps] for steps in sorted(points)]
        record.state, record.mlflow_run_id = DONE, str(counts["mlflow_run_id"])
        record.seconds = sum(counts.get("seconds", {}).values())
        tag_run(self._trial, record.mlflow_run_id)
        self._trial.write_record(record)


def points_so_far(trial: Trial) -> list[list[float]]:
    """Read the evaluations that a training's newest checkpoint knows of, that of the untrained model apart."""
    store = CheckpointStore(trial.output, keep=1)
    name = next((name for name, _ in store.whole()), None)
    if name is None:
        return []
    history = History(**json.loads(store.at(name).read_text(FILE)))
    batch_tokens = trial.config.train.batch_tokens
    return [[steps, steps * batch_tokens, bits] for steps, _, bits in history.validation if steps > 0]


def tag_run(trial: Trial, run_id: str) -> None:
    """Make a training's MLflow run a child of the search's; figures of a run that MLflow lost are told all the same."""
    if not (run_id and trial.parent_run_id):
        return
    try:
        client = mlflow.MlflowClient()
        client.set_tag(run_id, PARENT_TAG, trial.parent_run_id)
        client.set_tag(run_id, SEARCH_TAG, trial.search.fingerprint)
        client.set_tag(run_id, "search.point", json.dumps(trial.point))
    except mlflow.exceptions.MlflowException as error:
        print(f"search    MLflow does not know the run of trial {trial.number}: {tracking.first_line(error)}")
