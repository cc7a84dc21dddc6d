"""How book-keeping grows: with files of a source, shards of a corpus, trainings of a storage, runs and versions.

    .venv/bin/python tests/benchmarks/scale.py [--only files] [--sizes 10 100 1000]

Each is made 10, 100 and 1,000 times as large as it is today, and read in a process of its own: processor time, and the
most memory that Python's objects take in a second reading. The exponent is the slope between the two largest sizes on
logarithmic scales: 1 is in proportion, 2 is all beside all.
"""

import argparse
import json
import math
import multiprocessing
import os
import sqlite3
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# A script run by its path sees only its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.artifacts import Artifact, FileRecord, Recipe, artifact_at, record_file
from pipeline.config import Config, load_config

TODAY = {"files": 100, "shards": 10, "trainings": 3, "runs": 3, "versions": 3}
SHARD_TOKENS = 4096
FILES_OF_A_TRAINING = 12


def config_at(folder: Path) -> Config:
    return load_config(None, [f"storage={folder}/storage", "name=scale"])


def client_at(folder: Path) -> Any:
    """A client of this folder's own MLflow store, with its tables made."""
    import mlflow

    from pipeline import tracking

    (folder / "storage").mkdir(exist_ok=True)
    uri = f"sqlite:///{folder}/storage/mlflow.db"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    tracking.prepare_client(uri)
    return mlflow.MlflowClient(uri, uri)


# What there is ----------------------------------------------------------------------------------------------------


def make_files(folder: Path, count: int) -> None:
    for number in range(count):
        place = folder / f"texts/{number // 1000:03d}"
        if number % 1000 == 0:
            place.mkdir(parents=True)
        (place / f"{number:07d}.txt").write_text(f"Text {number}.\n" * 8)


def make_shards(folder: Path, count: int) -> None:
    """Many names of one shard: what is read of each is its footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    artifact = artifact_at(f"{folder}/storage", "scale", "prepare", "1" * 20)
    first = Path(artifact.file("train/0000000.parquet"))
    first.parent.mkdir(parents=True)
    pq.write_table(pa.table({"tokens": pa.array([list(range(SHARD_TOKENS))], pa.list_(pa.uint16()))}), first)
    record = record_file(first)
    files = {"train/0000000.parquet": record}
    for number in range(1, count):
        name = f"train/{number:07d}.parquet"
        os.link(first, artifact.file(name))
        files[name] = record
    artifact.commit({}, files)


def training_at(folder: Path, fingerprint: str) -> Artifact:
    from pipeline import train

    recipe = Recipe(1, train.settings(config_at(folder)), {"prepare": "1" * 20})
    return artifact_at(f"{folder}/storage", "scale", "train", fingerprint, recipe=recipe)


def make_trainings(folder: Path, count: int) -> None:
    for number in range(count):
        artifact = training_at(folder, f"{number:020d}")
        files = {f"checkpoint/{each}.json": artifact.write_text(f"checkpoint/{each}.json", "{}")
                 for each in range(FILES_OF_A_TRAINING)}  # fmt: skip
        artifact.commit({"steps": number, "mlflow_run_id": f"{number:032x}"}, files)


def make_runs(folder: Path, count: int) -> None:
    """One run by MLflow itself, and the rest as copies of its rows: by its client 3,000 take minutes."""
    client = client_at(folder)
    run = client.create_run(client.create_experiment("scale"), run_name="first")
    for name, value in (("fingerprint", "0"), ("train.steps", "10"), *((f"model.{each}", "1") for each in range(30))):
        client.log_param(run.info.run_id, name, value)
    for name in ("train/loss", "validation/bits_per_byte", "speed/tokens_per_second"):
        client.log_metric(run.info.run_id, name, 1.0, step=10)
    client.set_terminated(run.info.run_id)
    copy_rows(folder, ("runs", "params", "tags", "latest_metrics"), "run_uuid", run.info.run_id, count)


def make_versions(folder: Path, count: int) -> None:
    client = client_at(folder)
    client.create_registered_model("scale")
    tags = {"fingerprint": "0", "training_url": f"{folder}/storage/scale/train-0"}
    client.create_model_version("scale", f"{folder}/model", tags=tags)
    client.set_registered_model_alias("scale", "champion", "1")
    copy_rows(folder, ("model_versions", "model_version_tags"), "version", 1, count)


def copy_rows(folder: Path, tables: tuple[str, ...], key: str, value: Any, count: int) -> None:
    with sqlite3.connect(folder / "storage/mlflow.db") as database:
        for table in tables:
            columns = [row[1] for row in database.execute(f"pragma table_info({table})")]
            rows = database.execute(f"select * from {table} where {key} = ?", (value,)).fetchall()
            place = columns.index(key)
            for number in range(2, count + 1):
                copied = number if isinstance(value, int) else f"{number:032x}"
                database.executemany(
                    f"insert into {table} values ({','.join('?' * len(columns))})",
                    [(*row[:place], copied, *row[place + 1 :]) for row in rows],
                )


# What is done with it ---------------------------------------------------------------------------------------------


def plan_files(folder: Path) -> int:
    """What `prepare` does before its first unit: the fingerprint, the listing, the slices."""
    from pipeline.corpus import files

    source = load_config(None, ["source.kind=files", f"source.paths=[{folder}/texts]"]).source
    files.fingerprint_source(source)
    listing = files.listing_of(source)
    assert files.slices(source, 4_000_000, listing)
    return len(listing.files)


def open_stream(folder: Path) -> int:
    from pipeline.corpus.stream import TokenStream

    artifact = Artifact(artifact_at(f"{folder}/storage", "scale", "prepare", "1" * 20).url, "prepare", "1" * 20)
    stream = TokenStream(artifact, context_length=64, batch_sequences=8, seed=1, cache_folder=folder / "cache")
    stream.identity(3)
    stream.close()
    return len(stream.shards)


def write_manifest(folder: Path) -> int:
    artifact = artifact_at(f"{folder}/storage", "scale", "prepare", "1" * 20)
    manifest = artifact.any_manifest()
    assert manifest is not None
    records = {name: FileRecord(each.bytes, each.sha256) for name, each in manifest.files.items()}
    artifact_at(f"{folder}/storage", "other", "prepare", "2" * 20).commit({}, records)
    return len(records)


def list_trainings(folder: Path) -> int:
    """What `jobs.artifacts` and the look for a run to extend do."""
    from pipeline.records.inventory import take_inventory
    from pipeline.training.extend import suggest

    found = take_inventory(f"{folder}/storage")
    suggest(training_at(folder, "f" * 20))
    return len(found.stored)


def list_runs(folder: Path) -> int:
    from pipeline.records.runs import describe_rows, list_runs

    client_at(folder)  # MLflow keeps its address in the environment
    rows = list_runs(config_at(folder), limit=50_000)
    assert describe_rows(rows)
    return len(rows)


def list_versions(folder: Path) -> int:
    from pipeline import registry
    from pipeline.records.versions import read_registered

    client_at(folder)
    found = read_registered(config_at(folder))
    assert registry.resolve("scale", "champion").version == "1"
    return len(found)


MAKE: dict[str, Callable[[Path, int], None]] = {
    "files": make_files,
    "shards": make_shards,
    "trainings": make_trainings,
    "runs": make_runs,
    "versions": make_versions,
}
READ: dict[str, tuple[str, Callable[[Path], int]]] = {
    "plan the files of a source": ("files", plan_files),
    "open the stream of a corpus": ("shards", open_stream),
    "write a manifest": ("shards", write_manifest),
    "list a storage's trainings": ("trainings", list_trainings),
    "list MLflow's runs": ("runs", list_runs),
    "list the registry's versions": ("versions", list_versions),
}


def read(name: str, folder: Path, small: Path) -> tuple[int, float, float, float]:
    """Read what is small first, so that imports and caches are no part of the figures."""
    _, do = READ[name]
    do(small)
    began, cpu_began = time.perf_counter(), time.process_time()
    count = do(folder)
    wall_seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    tracemalloc.start()  # in a turn of its own: it makes everything slower
    do(folder)
    _, most_bytes = tracemalloc.get_traced_memory()
    return count, cpu_seconds, wall_seconds, most_bytes


def measure(name: str, folder: Path, small: Path, rounds: int) -> tuple[int, float, float, float]:
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawning, max_tasks_per_child=1) as processes:
        found = [processes.submit(read, name, folder, small).result() for _ in range(rounds)]
    count = found[0][0]
    return count, *(statistics.median(each[column] for each in found) for column in (1, 2, 3))  # type: ignore[return-value]


def exponent(small: float, large: float, growth: float) -> float:
    return math.log(max(large, 1e-9) / max(small, 1e-9)) / math.log(growth)


def main() -> None:
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # each folder has a store of its own
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MAKE)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="times today's")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    print(f"{'':<30} {'how many':>10} {'CPU s':>9} {'wall s':>9} {'MB':>8}")
    for kind in MAKE if options.only is None else [options.only]:
        with tempfile.TemporaryDirectory() as temporary:
            folders = {}
            for times in (1, *options.sizes):
                folders[times] = Path(temporary) / str(times)
                folders[times].mkdir()
                MAKE[kind](folders[times], times * TODAY[kind])
            for name in (name for name, (of, _) in READ.items() if of == kind):
                rows = [measure(name, folders[times], folders[1], options.rounds) for times in options.sizes]
                for count, cpu, wall, memory in rows:
                    print(f"{name:<30} {count:>10,} {cpu:>9.3f} {wall:>9.3f} {memory / 1e6:>8.1f}", flush=True)
                grew = options.sizes[-1] / options.sizes[-2]
                powers = {
                    "cpu": exponent(rows[-2][1], rows[-1][1], grew),
                    "memory": exponent(rows[-2][3], rows[-1][3], grew),
                }
                print(f"{'':<30} grows with the power {powers['cpu']:.2f} in time, {powers['memory']:.2f} in memory")
                result[name.replace(" ", "_").replace("'", "")] = {
                    "count": [row[0] for row in rows],
                    "cpu_seconds": [round(row[1], 4) for row in rows],
                    "memory_megabytes": [round(row[3] / 1e6, 2) for row in rows],
                    "cpu_exponent": round(powers["cpu"], 3),
                    "memory_exponent": round(powers["memory"], 3),
                }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
