"""A training moves a bar on a terminal, and leaves whole lines in a log."""

import io

import pytest

from pipeline.training.line import Line
from pipeline.training.screen import Screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO) -> str:
    with Screen(200, stream) as screen:
        screen.say("training on 2 workers (cpu, float32)")
        for step in (10, 20, 15, 200):  # a restart goes back
            screen.show_step(step, f"loss {step / 100:.4f}   1.234 bits per byte", "3 min 5 s")
        screen.say("step 200: 1.2 bits per byte on held-out text")
    return stream.getvalue()


def test_a_log_has_a_line_for_each_logged_step() -> None:
    assert show(io.StringIO()).splitlines() == [
        "training on 2 workers (cpu, float32)",
        "step  10/200   loss 0.1000   1.234 bits per byte   3 min 5 s left",
        "step  20/200   loss 0.2000   1.234 bits per byte   3 min 5 s left",
        "step  15/200   loss 0.1500   1.234 bits per byte   3 min 5 s left",
        "step 200/200   loss 2.0000   1.234 bits per byte   3 min 5 s left",
        "step 200: 1.2 bits per byte on held-out text",
    ]


def test_a_terminal_has_a_bar_below_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = show(Terminal())
    assert "training on 2 workers (cpu, float32)\n" in shown
    assert "step 200: 1.2 bits per byte on held-out text\n" in shown
    assert "step  20/200" not in shown
    last = shown.rstrip().splitlines()[-1].rpartition("\r")[2]
    assert last.startswith("train")
    assert "200 of 200," in last
    assert "loss 2.0000, 1.234 bits per byte" in last


@pytest.mark.parametrize("is_fatal", [False, True])
def test_what_cannot_be_mended_is_not_told_as_a_restart(is_fatal: bool) -> None:
    line = Line()
    if is_fatal:
        line.give_up("No space left.")
    line.note_failure("rank 0: OSError")
    assert [news.words for news in line.listen()] == (
        [] if is_fatal else ["a worker failed (rank 0: OSError); going on from the last checkpoint"]
    )
    assert line.fatal() == ("No space left." if is_fatal else None)


def test_the_driver_learns_when_a_stop_is_done() -> None:
    line = Line()
    line.stop()
    assert line.wishes() == (True, 0)
    assert not line.has_stopped()
    line.note_stopped()
    assert line.has_stopped()
