"""How far a long piece of work is, in one look: label, amount, rate, time left.

    with Progress("prepare", total=78e6, unit="B") as progress:
        progress.add(4e6, note="1,204 documents")

    prepare   56.0MB of 78.0MB, 3.20MB/s, 00:07 left, 1,204 documents

On a terminal it is a bar that is rewritten; elsewhere (a file, a cluster's log) it is a line every ten seconds and a
last one.
"""

import shutil
import sys
from types import TracebackType
from typing import IO, Any

from tqdm import tqdm

BAR = (
    "{desc}{percentage:3.0f}% {bar:12} {n_fmt}{unit} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"
)
LINE = "{desc}{n_fmt}{unit} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"
OPEN_LINE = "{desc}{n_fmt}{unit}, {rate_noinv_fmt}{postfix}"  # without a total there is no time left
BAR_SECONDS, LINE_SECONDS = 0.2, 10.0


class Progress:
    """Shows how much of `total` is done, in `unit` ("B", " files", " steps"); `done` was finished before it began.

    A total may be an estimate: it grows where more is done, and a `finish` makes it what was done. None: unknown.
    What is finished within `silent_seconds` shows nothing at all.
    """

    def __init__(
        self,
        label: str,
        total: float | None,
        unit: str = "B",
        *,
        done: float = 0,
        silent_seconds: float = 0,
        stream: IO[str] | None = None,
    ) -> None:
        stream = stream or sys.stderr
        is_terminal = stream.isatty()
        self._bar = (_TerminalBar if is_terminal else _PlainLines)(
            desc=f"{label:<9} ",
            total=total,
            initial=done,
            unit=unit,
            unit_scale=unit == "B",
            file=stream,
            ncols=shutil.get_terminal_size().columns if is_terminal else None,
            nrows=2,  # one line is shown; a terminal that claims to have no rows would get none
            bar_format=OPEN_LINE if total is None else BAR if is_terminal else LINE,
            mininterval=BAR_SECONDS if is_terminal else LINE_SECONDS,
            delay=silent_seconds or (0 if is_terminal else 1e-9),  # without a delay tqdm shows that nothing is done yet
            miniters=1,  # look at the clock at every call: amounts differ too much to guess when a line is due
        )

    def add(self, amount: float, note: str = "") -> None:
        """Say that `amount` more is done; `note` stands at the line's end until the next one."""
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        if self._bar.total is not None:
            self._bar.total = max(self._bar.total, self._bar.n + amount)
        self._bar.update(amount)

    def say(self, words: str) -> None:
        """Print words above the bar."""
        self._bar.write(words, file=self._bar.fp)

    def finish(self) -> None:
        """Print the last line: what was done is all there was."""
        if self._bar.total is not None:
            self._bar.total = self._bar.n
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._bar.close()  # as far as it came


class _TerminalBar(tqdm):
    disable: bool
    monitor_interval = 0  # no thread of tqdm's own


class _PlainLines(_TerminalBar):
    """tqdm where nothing can be rewritten: whole lines, and none for having begun."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        print(str(self).rstrip().replace(",  ", ", "), file=self.fp, flush=True)
        return True

    def close(self) -> None:
        if not self.disable:
            if self._time() - self.start_t >= self.delay:
                self.display()
            self.disable = True
            self._decr_instances(self)

    @staticmethod
    def status_printer(file: Any) -> Any:
        return lambda text: None
