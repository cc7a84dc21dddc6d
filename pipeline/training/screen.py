"""What a person at the driver sees of a training: a bar on a terminal, and elsewhere a line for each logged step."""

import sys
from types import TracebackType
from typing import IO

from pipeline.corpus.progress import Progress


class Screen:
    """Prints what the workers say; steps move the bar where there is a terminal.

    A job's log gets each step's line whole: there `train.log_every_steps` says how many there are. None: nobody knows
    yet how many steps there will be.
    """

    def __init__(self, steps: int | None, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        self._steps = steps
        self._shown = 0
        self._bar: Progress | None = None

    def say(self, words: str) -> None:
        if self._bar is None:
            print(words, file=self._stream, flush=True)
        else:
            self._bar.say(words)

    def show_step(self, step: int, figures: str, left: str) -> None:
        """Show one logged step; after a restart it may be one that was shown before."""
        if not self._stream.isatty():
            number = f"{step:>6}" if self._steps is None else f"{step:>{len(str(self._steps))}}/{self._steps}"
            self.say(f"step {number}   {figures}   {left} left")
            return
        if self._bar is None:
            self._bar = Progress("train", total=self._steps, unit="", done=step, stream=self._stream)
            self._shown = step
        self._bar.add(max(0, step - self._shown), note=figures.replace("   ", ", "))
        self._shown = max(self._shown, step)

    def __enter__(self) -> "Screen":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, traceback)
            self._bar = None
