"""A worker's temporary folders on its node, and what killed workers of the same run left of theirs."""

import os
import shutil
import tempfile
from pathlib import Path

import psutil


def make_scratch(run: str, purpose: str) -> Path:
    """Make a folder that names its run and its process; whoever makes it removes it."""
    return Path(tempfile.mkdtemp(prefix=f"{_prefix(run)}{os.getpid()}-{purpose}-"))


def remove_abandoned(run: str) -> None:
    """Remove the folders of this run's processes that no longer live: kill -9 leaves them no time to."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix(run)}*"):
        process = folder.name.removeprefix(_prefix(run)).partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _prefix(run: str) -> str:
    return f"training-{run}-"
