import dataclasses
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import boto3
import pytest
import torch

from pipeline import preflight
from pipeline.config import Config, load_config
from tests.infra.manifests import ROOT
from tests.mlflow_store import point_mlflow_at
from tests.s3_server import s3_server

SMALL = [
    "model.num_layers=1",
    "model.width=32",
    "model.num_heads=2",
    "model.context_length=32",
    "train.batch_tokens=64",
]
SMALL += ["tokenizer.vocabulary_size=300", "train.device=cpu", "stream.window_tokens=100000"]
SMALL += ["train.sample_tokens=8", "evaluate.sample_tokens=8"]


@pytest.fixture
def config(storage: str) -> Config:
    return load_config(None, [*SMALL, f"storage={storage}", "train.num_workers=2"])


def checks(config: Config, **options: float) -> dict[str, preflight.Check]:
    return {check.subject: check for check in preflight.run(config, report=lambda line: None, **options)}


def test_a_cluster_that_is_fit_passes_every_check_and_nothing_is_left_behind(config: Config, ray_session: None) -> None:
    import mlflow

    found = checks(config)
    assert [str(check) for check in found.values() if not check.ok] == []
    assert list(found) == ["authentication", "workers", "versions", "storage", "disk", "all-reduce", "mlflow"]
    assert "gradients over gloo" in found["all-reduce"].sentence
    assert list((Path(config.storage) / config.name).iterdir()) == []
    assert mlflow.search_runs(experiment_names=[config.name]).empty


def test_too_many_workers_are_told_with_what_there_is(config: Config, ray_session: None) -> None:
    train = dataclasses.replace(config.train, num_workers=[50, 60], batch_tokens=60 * config.model.context_length)
    found = checks(dataclasses.replace(config, train=train), wait_seconds=0.5)
    assert not found["workers"].ok
    assert "asks for 50 × 1 CPU" in found["workers"].sentence
    assert not found["all-reduce"].ok
    assert found["storage"].ok


def test_gpus_that_are_not_there_are_told(config: Config, ray_session: None) -> None:
    train = dataclasses.replace(config.train, device="gpu")
    workers = checks(dataclasses.replace(config, train=train), wait_seconds=0.5)["workers"]
    if workers.ok:
        pytest.skip("this machine has two GPUs")
    assert "room for 0 × 1 GPU and 1 CPU" in workers.sentence
    assert "this cluster does not grow by itself" in workers.sentence


def test_storage_that_cannot_be_written_is_told(config: Config, ray_session: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(preflight.Failed, match="all nodes share"):
        preflight.check_storage(dataclasses.replace(config, storage=str(tmp_path / "file/storage")))


def test_a_bucket_that_is_not_there_is_told_and_not_made(config: Config) -> None:
    with s3_server():
        with pytest.raises(preflight.Failed, match=r"list, read, write and delete s3://mistyped/x: .*bucket"):
            preflight.check_storage(dataclasses.replace(config, storage="s3://mistyped/x"))
        assert boto3.client("s3").list_buckets()["Buckets"] == []


def test_storage_that_is_another_on_each_node_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be one place for all nodes"):
        preflight.probe_storage(str(tmp_path / "elsewhere"), b"what the driver wrote")


def test_an_mlflow_that_is_away_is_told(
    config: Config, ray_session: None, monkeypatch: pytest.MonkeyPatch, mlflow_uri_kept: None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:planted-password@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(preflight.Failed, match="mend MLFLOW_TRACKING_URI") as told:
        preflight.check_mlflow(config)
    assert "planted" not in str(told.value)


@pytest.fixture
def mlflow_uri_kept():
    import mlflow

    before = mlflow.get_tracking_uri()
    yield
    point_mlflow_at(before)


def test_a_disk_that_is_too_small_is_told(config: Config, ray_session: None) -> None:
    stream = dataclasses.replace(config.stream, window_tokens=10**15, cache_gigabytes=1e9)
    train = dataclasses.replace(config.train, steps=10**13)
    with pytest.raises(preflight.Failed, match=r"free at .* and needs .*: give it a larger disk"):
        preflight.check_disk(dataclasses.replace(config, stream=stream, train=train))


def test_nodes_with_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"a": {"python": "3.11.9", "ray": "2.60.0"}, "b": {"python": "3.11.9", "ray": "2.59.0"}}
    monkeypatch.setattr(preflight, "on_every_node", lambda function: answers)
    with pytest.raises(preflight.Failed, match=r"same image: ray is 2\.60\.0 on a; 2\.59\.0 on b"):
        preflight.check_versions()


@pytest.mark.parametrize(
    ("status", "words", "fails"),
    [
        (401, "Unauthorized: Missing authentication token", False),
        (403, "Forbidden: Invalid authentication token", False),
        (403, "You are behind a proxy.", True),
        (401, "", True),
        (200, "[]", True),
        (500, "", True),
    ],
)
def test_a_dashboard_that_lets_strangers_in_is_told(
    status: int, words: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(words.encode())

        def log_message(self, *words: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("ray._private.worker.get_dashboard_url", lambda: f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(preflight, "nodes", lambda: {"1": "head", "2": "worker"})
    if fails:
        with pytest.raises(preflight.Failed):
            preflight.check_authentication()
    else:
        assert "refuses strangers" in preflight.check_authentication()
    server.shutdown()


@pytest.mark.slow
def test_the_command_exits_1_when_a_check_fails(storage: str) -> None:
    asked = [f"storage={storage}", "train.num_workers=[90,91]", "train.batch_tokens=3200"]
    command = [sys.executable, "-m", "jobs.preflight", *SMALL, *asked]
    done = subprocess.run(
        [*command, "--wait", "1"], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "FAIL  workers" in done.stdout
    assert "2 of 7 checks failed." in done.stdout


@pytest.mark.slow
def test_every_gpu_is_tried_and_what_is_wrong_with_it_is_told(storage: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    asked = [*SMALL, "train.batch_tokens=256", "train.device=gpu", "train.num_workers=[1,8]", f"storage={storage}"]
    environment = os.environ | {"RAY_OVERRIDE_RESOURCES": '{"CPU": 4, "GPU": 2}'}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.preflight", *asked], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert any(line.startswith("ok    workers        2 × 1 CPU and 1 GPU") for line in lines), done.stdout
    assert any(
        re.match(r"FAIL  gpus           Node \S+: (torch .* is a build for CPUs|no NVIDIA)", line) for line in lines
    )
    assert any(line.startswith("FAIL  all-reduce     Not tried: it needs the GPUs above.") for line in lines)
    assert done.returncode == 1
