"""A checkpoint is whole or not there; the damaged one is passed over; the newest and the best are kept."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline.artifacts import Artifact
from pipeline.training.checkpoints import BackgroundWriter, CheckpointStore

FINGERPRINT = "0" * 20


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Artifact(str(tmp_path / "run"), "train", FINGERPRINT), keep=2)


def add(store: CheckpointStore, step: int, bits_per_byte: float | None = None) -> str:
    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_bytes(bytes([step]) * 1000)
        (folder / "progress").write_text(str(step))

    return store.write(step, {"bits_per_byte": bits_per_byte}, save)


def steps(store: CheckpointStore) -> list[int]:
    return [manifest.counts["step"] for _, manifest in store.whole()]


def test_newest_ones_and_the_best_are_kept(store: CheckpointStore) -> None:
    for step, bits_per_byte in ((1, 3.0), (2, 1.5), (3, None), (4, 2.0), (5, None), (6, None)):
        add(store, step, bits_per_byte)
    assert steps(store) == [6, 5, 2]
    best = store.best()
    assert best is not None
    assert best.startswith("step-00000002-")
    assert len(store.names()) == 3


def test_damaged_checkpoint_is_passed_over_with_a_warning(
    store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(store, 1)
    newest = add(store, 2)
    weights = tmp_path / "run/checkpoints" / newest / "weights"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with caplog.at_level(logging.WARNING):
        found = store.newest(tmp_path)
    assert found is not None
    assert found.startswith("step-00000001-")
    assert newest in caplog.text
    assert "damaged" in caplog.text
    assert "the one before it is used" in caplog.text


@pytest.mark.parametrize("damage", ["missing file", "broken manifest", "empty manifest"])
def test_any_damage_is_noticed(store: CheckpointStore, tmp_path: Path, damage: str) -> None:
    kept = add(store, 1)
    folder = tmp_path / "run/checkpoints" / add(store, 2)
    if damage == "missing file":
        (folder / "progress").unlink()
    else:
        (folder / "manifest.json").write_text("{" if damage == "broken manifest" else "")
    assert store.newest(tmp_path) == kept


def test_no_checkpoint_at_all(store: CheckpointStore, tmp_path: Path) -> None:
    assert store.newest(tmp_path) is None
    assert store.best() is None


KILLED_IN_THE_WRITE = """
import os, signal, sys
from pathlib import Path
from pipeline.artifacts import Artifact
from pipeline.training.checkpoints import CheckpointStore

def save(folder):
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)

CheckpointStore(Artifact(sys.argv[1], "train", "0" * 20), keep=2).write(2, {}, save)
"""


def test_kill_in_the_write_leaves_the_checkpoint_before_it(store: CheckpointStore, tmp_path: Path) -> None:
    kept = add(store, 1)
    done = subprocess.run([sys.executable, "-c", KILLED_IN_THE_WRITE, str(tmp_path / "run")], cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    assert len(store.names()) == 2
    assert store.newest(tmp_path) == kept
    store.remove_unfinished()
    assert store.names() == [kept]


def test_writer_works_in_the_background_and_hands_errors_back() -> None:
    writer, gate, order = BackgroundWriter(), threading.Event(), []
    writer.start(lambda: (gate.wait(10), order.append("first")))
    assert writer.is_busy
    writer.check()
    gate.set()
    writer.start(lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]

    def fail() -> None:
        raise OSError("the disk is full")

    writer.start(fail)
    with pytest.raises(OSError, match="the disk is full"):
        writer.wait()


class Refusing(BaseHTTPRequestHandler):
    """An S3 that answers every request with 503."""

    requests = 0

    def do_PUT(self) -> None:
        Refusing.requests += 1
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST = do_PUT

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    yield
    server.shutdown()


@pytest.mark.slow
def test_s3_errors_are_retried_and_then_name_bucket_and_key(refusing_s3: None) -> None:
    store = CheckpointStore(Artifact("s3://bucket/runs/train-x", "train", FINGERPRINT), keep=2)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"Could not write s3://bucket/runs/train-x/checkpoints/step-00000001-") as raised:
        add(store, 1)
    assert Refusing.requests >= 5
    assert time.monotonic() - began < 240
    assert "\n" not in str(raised.value)


def test_what_is_kept_can_be_read_back(store: CheckpointStore, tmp_path: Path) -> None:
    name = add(store, 7)
    assert (store.fetch(name, tmp_path / "copy") / "progress").read_text() == "7"
