"""What happens before a training gets more workers: its progress is saved, because all of them start anew."""

import time
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

PATIENCE_SECONDS = 60.0  # how long a resize waits for the checkpoint


class SaveBeforeResize(ControllerCallback, WorkerGroupCallback):
    """Asks the workers for a checkpoint before Ray Train replaces them by more or fewer, and waits until it is written.

    After a failure there is nobody to ask. A node that is announced to go away asks by itself (`is_preempted`).
    """

    def __init__(self, line: Any, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._line = line
        self._patience_seconds = patience_seconds
        self._are_training = False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._are_training = True

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        self._are_training = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        if not self._are_training:
            return
        self._are_training = False
        until = time.monotonic() + self._patience_seconds
        try:
            wish = ray.get(self._line.ask_to_save.remote(resize_decision.num_workers))
            while time.monotonic() < until and ray.get(self._line.saved.remote()) < wish:
                time.sleep(0.2)
        except ray.exceptions.RayError:
            return  # the driver is gone, and Ray ends this training
