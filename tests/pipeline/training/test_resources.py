import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config import TrainConfig
from pipeline.training import resources
from pipeline.training.resources import Cluster, choose_device
from tests.infra.manifests import ROOT

HEAD = {"CPU": 4.0, "GPU": 0.0}
ONE = {"CPU": 8.0, "GPU": 1.0}
EIGHT = {"CPU": 88.0, "GPU": 8.0}
HALF = {"CPU": 8.0, "GPU": 0.5}

# nodes, whether more may come, fewest workers, device -> GPUs (None: an error), words of what is said
CASES = [
    ("laptop", [HEAD], False, 2, "auto", False, ""),
    ("laptop told cpu", [ONE], False, 1, "cpu", False, ""),
    ("laptop told gpu", [HEAD], False, 1, "gpu", None, "room for 0 × 1 GPU and 1 CPU, and 1 worker is"),
    ("one GPU, one worker", [ONE], False, 1, "auto", True, ""),
    ("one GPU, two workers", [ONE], False, 2, "auto", False, "train.num_workers=1 takes the GPUs"),
    ("one GPU, two workers, told gpu", [ONE], False, 2, "gpu", None, "set train.num_workers=1 or train.device=auto"),
    ("a box of eight", [EIGHT], False, 8, "auto", True, ""),
    ("a box of eight, nine workers", [EIGHT], False, 9, "auto", False, "room for 8 × 1 GPU"),
    ("eight nodes", [HEAD, *[ONE] * 8], False, 8, "gpu", True, ""),
    ("no GPU node up yet", [HEAD], True, 1, "auto", False, "train.device=gpu waits for one"),
    ("no GPU node up yet, told gpu", [HEAD], True, 8, "gpu", True, "waiting for GPU nodes: there is room for 0"),
    ("some GPU nodes up", [HEAD, ONE], True, 2, "gpu", True, "waiting for GPU nodes: there is room for 1"),
    ("some GPU nodes up, auto", [HEAD, ONE], True, 2, "auto", False, "train.num_workers=1 takes the GPUs"),
    ("two halves are no GPU", [HALF, HALF], False, 1, "auto", False, "each of them on one node"),
    ("one and a half", [{"CPU": 8.0, "GPU": 1.5}], False, 1, "auto", True, ""),
    ("GPUs without CPUs", [{"CPU": 0.0, "GPU": 8.0}], False, 1, "auto", False, "lower train.cpus_per_worker"),
]


@pytest.mark.parametrize(
    ("nodes", "grows", "workers", "device", "on_gpu", "words"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_gpus_are_taken_where_the_fewest_workers_fit(
    nodes: list[dict[str, float]], grows: bool, workers: int, device: str, on_gpu: bool | None, words: str
) -> None:
    options = TrainConfig(device=device)
    if on_gpu is None:
        with pytest.raises(ValueError, match="does not grow by itself") as told:
            choose_device(options, Cluster(tuple(nodes), grows), workers)
        assert words in str(told.value)
        return
    decided, note = choose_device(options, Cluster(tuple(nodes), grows), workers)
    assert decided == on_gpu
    assert words in note if words else note == ""


def test_workers_that_want_more_cpus_fit_fewer_times() -> None:
    assert Cluster((EIGHT,), False).count_gpu_workers(cpus_per_worker=1.0) == 8
    assert Cluster((EIGHT,), False).count_gpu_workers(cpus_per_worker=16.0) == 5
    assert Cluster((ONE, ONE), False).count_gpu_workers(cpus_per_worker=0.5) == 2


@pytest.mark.parametrize(
    ("grows", "had_gpu", "device", "on_gpu"),
    [
        (True, True, "auto", True),
        (True, False, "auto", False),
        (True, True, "cpu", False),
        (False, True, "auto", False),
    ],
)
def test_what_was_trained_on_a_gpu_waits_for_one_that_can_be_started(
    grows: bool, had_gpu: bool, device: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "find_cluster", lambda: Cluster((HEAD,), grows))
    said: list[str] = []
    options = TrainConfig(device=device, num_workers=8)
    assert resources.wants_gpu(options, workers=1, had_gpu=had_gpu, say=said.append) == on_gpu
    assert bool(said) == (grows and device == "auto")


def test_compiling_keeps_to_the_cores_that_a_pod_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setattr(resources, "count_cores", lambda: 12)
    monkeypatch.setattr(inductor, "compile_threads", 32)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "32")
    resources.set_compile_threads(workers_here=8)
    assert inductor.compile_threads == 32, "somebody has said so"
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    resources.set_compile_threads(workers_here=3)
    assert inductor.compile_threads == 4
    resources.set_compile_threads(workers_here=100)
    assert inductor.compile_threads == 1


SHOWN = """
import sys
from jobs.command import ENVIRONMENT
import os
os.environ.update(ENVIRONMENT)
import ray
ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
from pipeline.config import load_config
from pipeline.training.resources import wants_gpu
for settings in sys.argv[1:]:
    try:
        print(wants_gpu(load_config(None, settings.split()).train))
    except ValueError as error:
        print(error)
"""


def test_a_machine_with_one_gpu_does_not_wait_for_a_second() -> None:
    environment = os.environ | {"RAY_OVERRIDE_RESOURCES": '{"CPU": 2, "GPU": 1}'}
    asked = ["train.num_workers=2", "train.num_workers=1", "train.num_workers=[1,8]", "train.device=gpu"]
    done = subprocess.run(
        [sys.executable, "-c", SHOWN, *asked], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "on CPUs, because there is room for 1 × 1 GPU and 1 CPU, and 2 workers are asked for: train.num_workers=1"
        " takes the GPUs",
        "False",
        "True",
        "True",
        "train.device=gpu, but there is room for 1 × 1 GPU and 1 CPU, and 2 workers are asked for; this cluster does"
        " not grow by itself: add nodes, or set train.num_workers=1 or train.device=auto.",
    ]


def test_a_cluster_without_an_autoscaler_does_not_grow(ray_session: None) -> None:
    assert not resources.can_grow()


def test_an_autoscaler_is_known_by_its_node_types(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(types: dict[str, str]) -> Any:
        return lambda key: json.dumps({"autoscaler_report": {"node_type_mapping": types}}).encode()

    # As Ray 2.60 writes it: with `ray start --head --autoscaling-config`, and without.
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", told({"fff0": "ray.head.default"}))
    assert resources.can_grow()
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", told({"fff0": "node_fff0"}))
    assert not resources.can_grow()


@pytest.mark.parametrize(
    ("kind", "version", "grows"), [("gpu", "0", True), ("node_a1", "7", True), ("node_a1", "0", False)]
)
def test_kuberays_autoscaler_is_known_by_either_of_its_signs(
    kind: str, version: str, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = SimpleNamespace(ray_node_type_name=kind, node_id="a1")
    status = SimpleNamespace(active_nodes=[node], idle_nodes=[], stats=SimpleNamespace(autoscaler_version=version))
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", lambda key: None)
    monkeypatch.setattr("ray.autoscaler.v2.sdk.get_cluster_status", lambda address: status)
    monkeypatch.setattr(resources.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=""))
    assert resources.can_grow() == grows


def test_what_compiling_needs_on_a_cpu_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config as inductor

    cpu = torch.device("cpu")
    assert resources.find_missing_for_compile(torch.device("cuda")) == ""
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "no-such-compiler"))
    assert resources.find_missing_for_compile(cpu) == "a C++ compiler (g++)"
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "true"))
    monkeypatch.setattr(resources.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h: the package python3-dev" in resources.find_missing_for_compile(cpu)
    (tmp_path / "Python.h").touch()
    assert resources.find_missing_for_compile(cpu) == ""
