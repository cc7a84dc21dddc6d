import io
import time
from types import SimpleNamespace

import pytest
import ray

from pipeline.training import launch
from pipeline.training.line import Line
from pipeline.training.screen import Screen


def test_workers_that_do_not_come_are_told_of(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SILENT_SECONDS", 0.5)
    line, stream = ray.remote(num_cpus=0)(Line).remote(), io.StringIO()

    def fit() -> SimpleNamespace:
        deadline = time.monotonic() + 60
        while "still waiting" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.1)
        ray.get(line.say.remote("training on 1 worker"))
        while "training on" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.1)
        told = stream.getvalue()
        time.sleep(1.5)  # silent, but the workers are there
        assert stream.getvalue() == told
        return SimpleNamespace(return_value={"steps": 1})

    assert launch.attend(SimpleNamespace(fit=fit), line, Screen(1, stream)) == {"steps": 1}  # type: ignore[arg-type]
    waits = [words for words in stream.getvalue().splitlines() if words.startswith("still waiting for the workers")]
    assert waits
    assert "free on the cluster are" in waits[0]
    assert " CPU and 0 GPU" in waits[0]
