"""How long a training is: so many steps, or so many minutes of work."""

from collections.abc import Mapping

from pipeline.config import TrainConfig

WORK = ("compute", "data_wait", "evaluation", "tasks", "checkpoint")  # starts and restarts take none of the minutes


class Length:
    """When a training ends; of minutes that have passed, rank 0's clock decides for all."""

    def __init__(self, options: TrainConfig) -> None:
        self._steps, self._seconds = options.steps, 60 * options.minutes

    @property
    def is_timed(self) -> bool:
        return self._seconds > 0

    def share_passed(self, seconds: Mapping[str, float]) -> float:
        """Return the share of the minutes that has passed, after so many seconds of each activity; 0 without any."""
        return work_seconds(seconds) / self._seconds if self.is_timed else 0.0

    def is_over(self, step: int, share_passed: float) -> bool:
        return share_passed >= 1 if self.is_timed else step >= self._steps

    def count_steps(self, step: int, share_passed: float) -> float:
        """Return how many steps the training has; of a timed one what the time until now lets expect.

        `step` over that is the share that has passed, so a schedule that goes by it goes by the clock.
        """
        if not self.is_timed:
            return self._steps
        return max(step / share_passed, step + 1) if share_passed else step + 1

    def seconds_left(self, seconds: Mapping[str, float]) -> float:
        """Return how much of the minutes is left."""
        return max(0.0, self._seconds - work_seconds(seconds))


def work_seconds(seconds: Mapping[str, float]) -> float:
    """Return how long a training has worked, of all the seconds that it took."""
    return sum(seconds[name] for name in WORK)
