import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.config import TrainConfig
from pipeline.training import launch
from pipeline.training.line import Line
from pipeline.training.screen import Screen


def test_workers_on_cpus_share_a_heap_and_wait_for_each_other_asleep(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(launch, "TorchTrainer", lambda *_, **settings: asked.append(settings["run_config"]))
    monkeypatch.setattr(launch, "attend", lambda *_: {})
    plan = SimpleNamespace(train=TrainConfig(num_workers=1), output=SimpleNamespace(url="here"))
    for uses_gpu in (False, True):
        monkeypatch.setattr(launch, "wants_gpu", lambda options, found=uses_gpu: found)
        launch.launch(plan)  # type: ignore[arg-type]
    on_cpu, on_gpu = asked
    assert on_cpu.worker_runtime_env["env_vars"] == {"MALLOC_ARENA_MAX": "1", "GOMP_SPINCOUNT": "1000"}
    assert not on_gpu.worker_runtime_env


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
