"""A real cluster for the slow tests, as `make cluster` starts it, and the few things that tests do with it."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster import Cluster
from tests.infra.manifests import ROOT

# A model of no worth, trained in seconds: here the machinery is tested, not the learning.
TINY = [
    "storage=s3://gpt/artifacts",
    "source.kind=files",
    "source.paths=[s3://gpt/corpus/]",
    "tokenizer.vocabulary_size=384",
    "prepare.shard_tokens=20000",
    "prepare.validation_fraction=0.3",
    "model.num_layers=1",
    "model.width=64",
    "model.num_heads=2",
    "model.context_length=64",
    "train.batch_tokens=512",
    "train.compile=false",
    "train.evaluate_every_steps=1000",
    "train.evaluation_tokens=1024",
    "train.checkpoint_every_steps=5",
    "train.log_every_steps=2",
    "train.sample_tokens=8",
    "evaluate.max_tokens=1024",
    "evaluate.sample_tokens=8",
]


class RunningCluster:
    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder)
        try:
            self.state = self.cluster.up()
        except BaseException:
            self.cluster.down()
            raise
        self.environment = self.cluster.environment(self.state)
        self.shell = os.environ | self.environment

    # ------------------------------------------------------------ jobs

    def submit(self, name: str, *settings: str, job: str = "pipeline", serve: bool = False) -> str:
        """Submit as `make submit` does, and return the job's id."""
        command = [sys.executable, "-m", "jobs.submit", "jobs/presets/demo.yaml", "--detach", "--skip-preflight"]
        command += ["--job", job, *(["--serve"] if serve else []), f"name={name}", *TINY, *settings]
        done = subprocess.run(command, cwd=ROOT, env=self.shell, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("submitted: ")[1].split()[0]

    def ask(self, path: str, method: str = "GET", token: str | None = None) -> Any:
        """Ask the head's dashboard, with the cluster's token unless another is given."""
        token = (self.cluster.folder / "token").read_text() if token is None else token
        url = self.environment["RAY_API_SERVER_ADDRESS"] + path
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(url, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def log(self, job: str) -> str:
        return self.ask(f"/api/jobs/{job}/logs")["logs"]

    def status(self, job: str) -> str:
        return self.ask(f"/api/jobs/{job}")["status"]

    def wait_for(self, job: str, words: str, seconds: float = 900) -> None:
        """Wait until the job's log says `words`."""
        self._wait(lambda: words in self.log(job), job, f"never said {words!r}", seconds)

    def wait_end(self, job: str, seconds: float = 900) -> str:
        """Wait until the job has ended; returns how."""
        self._wait(lambda: self.status(job) in ("SUCCEEDED", "FAILED", "STOPPED"), job, "did not end", seconds)
        return self.status(job)

    def _wait(self, happened: Any, job: str, complaint: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            ended = self.status(job) in ("SUCCEEDED", "FAILED", "STOPPED")
            if (ended and not happened()) or time.monotonic() > deadline:
                raise AssertionError(f"{job} {complaint}:\n{self.log(job)[-3000:]}")
            time.sleep(2)

    # ------------------------------------------------------------ storage

    def s3(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
        )

    def put(self, key: str, content: bytes) -> None:
        self.s3().put_object(Bucket="gpt", Key=key, Body=content)

    def keys(self, prefix: str) -> list[str]:
        pages = self.s3().get_paginator("list_objects_v2").paginate(Bucket="gpt", Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return self.s3().get_object(Bucket="gpt", Key=key)["Body"].read()

    def manifest(self, name: str, stage: str) -> dict[str, Any]:
        keys = self.keys(f"artifacts/{name}/{stage}-")
        (key,) = [each for each in keys if each.endswith("/manifest.json") and "/checkpoints/" not in each]
        return json.loads(self.read(key))

    def shard_digests(self, name: str) -> dict[str, str]:
        files = self.manifest(name, "prepare")["files"]
        return {file: record["sha256"] for file, record in files.items() if file.endswith(".parquet")}

    # ------------------------------------------------------------ metrics

    def scrape(self) -> str:
        """Read every Ray node's metrics, as Prometheus does from Ray's own list of them."""
        pages = []
        for group in self.ask("/api/prometheus/sd"):
            for target in group["targets"]:
                try:
                    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                        pages.append(answer.read().decode())
                except OSError:
                    continue  # a node that has just been killed
        return "\n".join(pages)


class MetricNames(threading.Thread):
    """Notes the names of all metrics that show up while it runs: a training's are gone when it ends."""

    def __init__(self, running: RunningCluster) -> None:
        super().__init__(daemon=True)
        self._running = running
        self._ended = threading.Event()
        self.names: set[str] = set()

    def run(self) -> None:
        while not self._ended.wait(3):
            try:
                page = self._running.scrape()
            except (OSError, ValueError):
                continue
            self.names |= {line.split("{")[0].split(" ")[0] for line in page.splitlines() if not line.startswith("#")}

    def end(self) -> set[str]:
        self._ended.set()
        self.join()
        return self.names


def require_postgresql() -> None:
    if not (list(Path("/usr/lib/postgresql").glob("*/bin/postgres")) or shutil.which("postgres")):
        pytest.skip("PostgreSQL is not installed")
    if not sys.platform.startswith("linux"):
        pytest.skip("several Ray nodes on one machine need Linux")
