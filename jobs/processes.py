"""Ends processes that a job has started, with all that they have started themselves, and no others."""

import contextlib
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil


def end_processes(processes: Iterable[psutil.Process], how: signal.Signals = signal.SIGTERM) -> None:
    """Signal these processes; after a grace, kill what is left of them and of all that they had started."""
    roots = list(processes)
    family = list(roots)
    for root in roots:
        try:
            family += root.children(recursive=True)
        except psutil.NoSuchProcess:
            continue
    for process in roots if how != signal.SIGKILL else family:
        _signal(process, how)
    _, left = psutil.wait_procs(family, timeout=15)
    for process in left:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)


def _signal(process: psutil.Process, how: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(how)


def processes_below(folder: Path) -> list[psutil.Process]:
    """Find what outlived its parent: processes that work in this cluster's own folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found
