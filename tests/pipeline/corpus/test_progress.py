"""Progress is one line that says what, how much, how fast and how long still, on a terminal and in a log."""

import io
import re

import pytest

from pipeline.corpus import progress
from pipeline.corpus.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_log_each_line_is_whole_and_says_label_amount_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    log = io.StringIO()
    with Progress("prepare", 8e6, stream=log) as shown:
        shown.add(2e6, "1,204 documents")
        shown.add(6e6, "4,816 documents")
    first, *_, last = log.getvalue().splitlines()
    assert re.fullmatch(r"prepare   2\.00MB of 8\.00MB, [\d.]+[kMG]?B/s, \d\d:\d\d left, 1,204 documents", first)
    assert last.startswith("prepare   8.00MB of 8.00MB")
    assert "\r" not in log.getvalue()


def test_a_log_is_not_flooded_and_ends_with_the_last_line() -> None:
    log = io.StringIO()
    with Progress("prepare", 1000, " files", stream=log) as shown:
        for _ in range(1000):
            shown.add(1)
    [line] = log.getvalue().splitlines()
    assert line.startswith("prepare   1000 files of 1000 files")


def test_a_terminal_gets_one_line_that_is_rewritten() -> None:
    terminal = Terminal()
    with Progress("train", 10, " steps", stream=terminal) as shown:
        shown.add(10)
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().rstrip().rpartition("\r")[2].startswith("train     100%")


def test_an_estimate_that_was_wrong_ends_as_what_was_done() -> None:
    for done in (3, 30):
        log = io.StringIO()
        with Progress("prepare", 10, " files", stream=log) as shown:
            shown.add(done)
        assert f"{done} files of {done} files" in log.getvalue()


def test_what_failed_is_left_as_far_as_it_came() -> None:
    log = io.StringIO()

    def fail() -> None:
        with Progress("train", 100, " steps", done=20, stream=log) as shown:
            shown.add(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "23 steps of 100 steps" in log.getvalue()


def test_without_a_total_there_is_no_time_left_to_tell() -> None:
    log = io.StringIO()
    with Progress("listing", None, " files", stream=log) as shown:
        shown.add(7)
    assert re.fullmatch(r"listing   7 files, .* files/s\n", log.getvalue())


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_is_done_at_once_can_be_silent(stream: io.StringIO) -> None:
    with Progress("listing", None, " files", silent_seconds=5, stream=stream) as shown:
        shown.add(7)
    assert stream.getvalue() == ""
