"""The next worker of a run removes what killed ones left in their node's temporary folder, and no more than that."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.training.scratch import make_scratch, remove_abandoned

RUN = "0" * 20


def test_only_what_dead_processes_of_this_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = (
        f"import tempfile; tempfile.tempdir = {str(tmp_path)!r};"
        f"from pipeline.training.scratch import make_scratch; make_scratch({RUN!r}, 'checkpoint')"
    )
    subprocess.run([sys.executable, "-c", made], check=True)
    [abandoned] = tmp_path.iterdir()
    mine, other = make_scratch(RUN, "worker"), tmp_path / "training-of-somebody"
    other.mkdir()
    remove_abandoned("1" * 20)
    assert abandoned.exists()
    remove_abandoned(RUN)
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, other.name}
