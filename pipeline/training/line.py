"""The line between the driver of a training and its workers; light to import, for the processes that only hold it."""

import logging
from dataclasses import dataclass
from typing import Any

from ray.train import UserCallback

MOST_FAILED_STARTS = 5  # from one checkpoint


@dataclass(frozen=True)
class News:
    """Something that a worker says; with a step, the figures of that step."""

    words: str
    step: int = 0
    left: str = ""


class Line:
    """The line between driver and workers: what to print one way, the wish to stop the other way."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._scores: list[tuple[int, float]] = []
        self._failures: list[str] = []
        self._failed_starts: list[int] = []  # the step of each start since one got further than the one before
        self._fatal: str | None = None
        self._stopping = False
        self._asked_saves = 0  # wishes for a checkpoint, counted
        self._saved = 0  # the last wish that is fulfilled
        self._stopped = False

    def say(self, words: str) -> None:
        self._news.append(News(words))

    def say_step(self, step: int, figures: str, left: str) -> None:
        """Tell of a logged step: its figures, and how long the rest will take."""
        self._news.append(News(figures, step, left))

    def note_score(self, step: int, bits_per_byte: float) -> None:
        """Note an evaluation on held-out text, for whoever watches the training."""
        self._scores.append((step, bits_per_byte))

    def scores(self) -> list[tuple[int, float]]:
        return self._scores

    def listen(self) -> list["News"]:
        """Return what was said since the last time."""
        news, self._news = self._news, []
        return news

    def stop(self) -> None:
        self._stopping = True

    def wishes(self) -> tuple[bool, int]:
        """Return whether to stop, and the number of the wish for a checkpoint that is still open, or 0."""
        return self._stopping, self._asked_saves if self._asked_saves > self._saved else 0

    def ask_to_save(self, workers: int) -> int:
        """Wish for a checkpoint before the training goes on with so many workers; returns the wish's number."""
        self.say(f"going on with {workers} worker{'s' * (workers > 1)} soon: writing a checkpoint first")
        self._asked_saves += 1
        return self._asked_saves

    def note_saved(self, wish: int) -> None:
        """Note that a checkpoint is written whose making began after that wish."""
        self._saved = max(self._saved, wish)

    def saved(self) -> int:
        return self._saved

    def note_stopped(self) -> None:
        """Say that all that the wish to stop asked for is done: the driver need not wait for the workers' end."""
        self._stopped = True

    def has_stopped(self) -> bool:
        return self._stopped

    def note_failure(self, reason: str) -> None:
        self._failures.append(reason)
        if self._fatal is None:
            self.say(f"a worker failed ({reason}); going on from the last checkpoint")

    def begin(self, step: int) -> str:
        """Note from which step workers start; returns what ended the ones before them."""
        self._saved = self._asked_saves  # nobody waits for these workers to save
        if self._failed_starts and self._failed_starts[-1] != step:
            self._failed_starts = []
        if self._failures:
            self._failed_starts.append(step)
        if len(self._failed_starts) >= MOST_FAILED_STARTS:
            self.give_up(
                f"Training failed {MOST_FAILED_STARTS} times in a row after step {step}, and no start got as far as"
                f" its next checkpoint. The last failure: {self._failures[-1]}"
            )
        why = self._failures[-1] if self._failures else "started again, or resized"
        self._failures = []
        return why

    def give_up(self, sentence: str) -> None:
        """Say what no restart would mend."""
        self._fatal = self._fatal or sentence

    def fatal(self) -> str | None:
        return self._fatal


class FailureNotes(UserCallback):
    """Tells the driver, and the next workers, why the last ones died."""

    def __init__(self, line: Any) -> None:
        self._line = line

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = min(worker_exceptions.items())
        words = " ".join(str(error).split())[:300]
        self._line.note_failure.remote(f"rank {rank}: {type(error).__name__}: {words}")


class LineHandler(logging.Handler):
    """Sends a worker's warnings to the driver's screen."""

    def __init__(self, line: Any) -> None:
        super().__init__(logging.WARNING)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line.say.remote(f"{record.levelname.lower()}: {record.getMessage()}")
