"""The token stream across processes that are killed, and from S3."""

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import Artifact, filesystem_of, record_file
from pipeline.corpus.shards import TokenCache, open_shards
from pipeline.corpus.stream import TokenStream, ValidationStream

OPTIONS = {"context_length": 16, "batch_sequences": 6, "seed": 11, "window_tokens": 3000}

WORKER = """
import hashlib, sys, time
from pipeline.artifacts import Artifact
from pipeline.corpus.stream import TokenStream
url, cache, log, first_step, rank, world_size = sys.argv[1:]
stream = TokenStream(Artifact(url, "prepare", "0" * 20), cache_folder=cache, **{options})
with open(log, "a") as file:
    for batch in stream.batches(int(first_step), int(rank), int(world_size)):
        rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in batch.tokens]
        print(batch.step, *rows, file=file, flush=True)
        time.sleep(0.01)
""".replace("{options}", repr(OPTIONS))


def write_shards(folder: Path, num_shards: int = 6) -> Artifact:
    random = np.random.default_rng(0)
    files = {}
    for split, count in (("train", num_shards), ("val", 1)):
        for index in range(count):
            path = folder / split / f"{index:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            documents = [[*random.integers(1, 60_000, length).tolist(), 0] for length in random.integers(1, 60, 50)]
            pq.write_table(pa.table({"tokens": pa.array(documents, pa.list_(pa.uint16()))}), path, row_group_size=9)
            files[f"{split}/{path.name}"] = record_file(path)
    artifact = Artifact(str(folder), "prepare", "0" * 20)
    artifact.commit({}, files)
    return artifact


class Workers:
    """Processes that write down what they read."""

    def __init__(self, artifact: Artifact, folder: Path, first_step: int, world_size: int) -> None:
        self.logs = [folder / f"from-{first_step}-rank-{rank}" for rank in range(world_size)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, artifact.url]
                + [str(word) for word in (folder / "cache", log, first_step, rank, world_size)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank, log in enumerate(self.logs)
        ]

    def kill_after(self, step: int) -> dict[int, list[str]]:
        """Kill -9 every worker once all are past `step`; return the rows of each step that all of them wrote down."""
        try:
            deadline = time.monotonic() + 120
            while min(max(self.read(log), default=-1) for log in self.logs) <= step:
                assert time.monotonic() < deadline, "the workers do not get on"
                assert all(process.poll() is None for process in self.processes), "a worker died"
                time.sleep(0.05)
        finally:
            for process in self.processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
        shares = [self.read(log) for log in self.logs]
        return {number: [row for share in shares for row in share[number]] for number in min(shares, key=len)}

    @staticmethod
    def read(log: Path) -> dict[int, list[str]]:
        whole_lines = log.read_text().split("\n")[:-1] if log.exists() else []
        return {int(line.split()[0]): line.split()[1:] for line in whole_lines}


def test_workers_killed_and_replaced_see_no_gap_and_no_repeat(tmp_path: Path) -> None:
    artifact = write_shards(tmp_path / "shards")
    before = Workers(artifact, tmp_path, 0, world_size=2).kill_after(40)
    checkpoint = 37
    after = Workers(artifact, tmp_path, checkpoint, world_size=2).kill_after(checkpoint + 80)

    stream = TokenStream(artifact, cache_folder=tmp_path / "another", **OPTIONS)  # type: ignore[arg-type]
    assert checkpoint + 80 > stream.steps_per_epoch  # it went through an epoch's end
    seen = [before[step] for step in range(checkpoint)] + [after[step] for step in range(checkpoint, checkpoint + 80)]
    for step, rows in enumerate(seen):
        expected = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in stream.batch(step).tokens]
        assert rows == expected, f"step {step}"


def test_a_process_killed_while_decoding_leaves_the_shard_to_the_next(tmp_path: Path) -> None:
    artifact = write_shards(tmp_path / "shards", num_shards=1)
    script = """
import sys, time
from pipeline.artifacts import Artifact
from pipeline.corpus.shards import TokenCache, open_shards
class Stuck(TokenCache):
    def _make_room(self, wanted_bytes):
        print("decoding", flush=True)
        time.sleep(600)
url, cache = sys.argv[1:]
Stuck(cache).open(open_shards(Artifact(url, "prepare", "0" * 20), "train")[0])
"""
    command = [sys.executable, "-c", script, artifact.url, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "decoding\n"
        process.kill()
    [shard] = open_shards(artifact, "train")
    assert len(TokenCache(tmp_path / "cache").open(shard)) == shard.num_tokens


# S3, through a server that speaks its protocol.


def upload(local: Artifact, url: str) -> Artifact:
    filesystem: fsspec.AbstractFileSystem = filesystem_of(url)[0]
    for path in Path(local.url).rglob("*"):
        if path.is_file():
            filesystem.put_file(str(path), f"{url}/{path.relative_to(local.url)}")
    return Artifact(url, "prepare", "0" * 20)


def test_the_stream_from_s3_is_the_stream_from_disk(tmp_path: Path, bucket: str) -> None:
    local = write_shards(tmp_path / "shards")
    remote = upload(local, f"{bucket}/whole")
    here = TokenStream(local, cache_folder=tmp_path / "here", **OPTIONS)  # type: ignore[arg-type]
    there = TokenStream(remote, cache_folder=tmp_path / "there", **OPTIONS)  # type: ignore[arg-type]
    for step in range(0, here.steps_per_epoch, 7):
        assert (here.batch(step).tokens == there.batch(step).tokens).all()
    assert not list((tmp_path / "there").glob("*.parquet*"))  # downloads are not kept
    options = {"context_length": 16, "batch_sequences": 4, "cache_folder": tmp_path / "there"}
    found = [batch.targets.tolist() for batch in ValidationStream(remote, **options).batches()]  # type: ignore[arg-type]
    assert found == [batch.targets.tolist() for batch in ValidationStream(local, **options).batches()]  # type: ignore[arg-type]


def test_the_next_window_is_fetched_before_it_is_needed(tmp_path: Path, bucket: str) -> None:
    remote = upload(write_shards(tmp_path / "shards"), f"{bucket}/ahead")
    stream = TokenStream(remote, cache_folder=tmp_path / "cache", **OPTIONS)  # type: ignore[arg-type]
    first, second, *_ = (stream._windows[index] for index in stream._window_order(0))
    stream.batch(0)
    deadline = time.monotonic() + 20
    wanted = {shard.record.sha256 for shard in (*first, *second)}
    while {path.stem for path in (tmp_path / "cache").glob("*.uint16")} < wanted:
        assert time.monotonic() < deadline, "nothing was fetched ahead"
        time.sleep(0.02)


def test_a_corrupt_or_missing_object_is_named_before_training_starts_on_it(
    tmp_path: Path, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    local = write_shards(tmp_path / "shards")
    remote = upload(local, f"{bucket}/damaged")
    stream = TokenStream(remote, cache_folder=tmp_path / "cache", **OPTIONS)  # type: ignore[arg-type]
    bad = stream._windows[stream._window_order(0)[1]][0]  # a shard of the second window
    content = bytearray(remote.read_bytes(bad.name))
    content[30] ^= 255
    remote.filesystem.pipe_file(remote.file(bad.name), bytes(content))
    complaint = rf"{remote.url}/{bad.name} is damaged: .*{bad.record.sha256[:12]}"

    stream.batch(0)  # the first window is sound, and training may begin while the second is fetched
    with pytest.raises(ValueError, match=complaint):
        list(itertools.islice(stream.batches(), stream.steps_per_epoch))
    assert "training will stop when it gets there" in caplog.text
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("token-batch") for thread in threading.enumerate()):
        assert time.monotonic() < deadline  # a batch that was under way still reads the damaged shard
        time.sleep(0.02)
    remote.filesystem.pipe_file(remote.file(bad.name), (Path(local.url) / bad.name).read_bytes())
    for step in range(stream.steps_per_epoch):  # mended, it goes on
        stream.batch(step)

    remote.filesystem.rm(remote.file(bad.name))
    with pytest.raises(ValueError, match=rf"{remote.url}/{bad.name} is missing; .*{bad.record.sha256}"):
        TokenStream(remote, cache_folder=tmp_path / "cache", **OPTIONS)  # type: ignore[arg-type]
