"""How fast `prepare` turns text into shards, beside bare tiktoken, datatrove and nanoGPT's `datasets.map`.

.venv/bin/python tests/benchmarks/prepare.py [--megabytes 1000] [--text corpus.jsonl] [--tokenizer gpt2]
    [--peers /path/to/python]      # one that has datatrove and datasets, if this one has not

Everything reads the same two .jsonl files with two processes. Bare tiktoken gets its half of the documents in
memory and writes nothing: it is the limit. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))
from jobs.command import set_environment
from model.cores import count_cores

PROCESSES = 2

DATATROVE = """
    import sys, logging
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    if __name__ == "__main__":
        logger.remove()
        corpus, tokenizer, output, processes = sys.argv[1:]
        LocalPipelineExecutor(
            pipeline=[
                JsonlReader(corpus, glob_pattern="*.jsonl"),
                DocumentTokenizer(
                    output, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>", shuffle_documents=False
                ),
            ],
            tasks=int(processes), workers=int(processes), logging_dir=output + "/logs",
        ).run()
"""

# What nanoGPT's data/openwebtext/prepare.py does, on local files.
DATASETS_MAP = """
    import sys
    import numpy as np
    import tiktoken
    from datasets import disable_progress_bars, load_dataset

    corpus, tokenizer, output, processes = sys.argv[1:]
    processes = int(processes)
    encoding = tiktoken.get_encoding(tokenizer)

    def process(example):
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    if __name__ == "__main__":
        disable_progress_bars()
        dataset = load_dataset(
            "json", data_files=corpus + "/*.jsonl", num_proc=processes, split="train", cache_dir=output
        )
        tokenized = dataset.map(process, remove_columns=["text"], num_proc=processes)
        total = int(np.sum(tokenized["len"], dtype=np.uint64))
        array = np.memmap(output + "/train.bin", dtype=np.uint16, mode="w+", shape=(total,))
        index = 0
        for shard in range(64):
            batch = tokenized.shard(num_shards=64, index=shard, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            array[index : index + len(ids)] = ids
            index += len(ids)
        array.flush()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--text", type=Path, help="a .jsonl with a column text; default: Python's documentation")
    parser.add_argument("--tokenizer", default="gpt2", help="a name that tiktoken knows")
    parser.add_argument("--peers", default=sys.executable, help="the Python that has datatrove and datasets")
    parser.add_argument("--rounds", type=int, default=3, help="how often to measure tiktoken and prepare, in turn")
    parser.add_argument("--skip-peers", action="store_true")
    options = parser.parse_args()
    set_environment()
    # Ray starves its workers (nice 15) where a machine has other work; the peers are not, so neither are ours.
    os.environ.setdefault("RAY_worker_niceness", "0")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text_bytes = write_corpus(folder / "corpus", read_texts(options.text), options.megabytes)
        bare, ours, ours_alone, rss = [], [], [], 0.0
        for round_number in range(options.rounds):
            bare.append(time_tiktoken(folder / "corpus", options.tokenizer))
            for alone, times in ((False, ours), (True, ours_alone)):
                storage = folder / f"storage{round_number}{'alone' * alone}"
                taken_seconds, peak = time_prepare(folder, options.tokenizer, storage, alone=alone)
                times.append(taken_seconds)
                rss = max(rss, peak)
        seconds: dict[str, float | None] = {
            "tiktoken alone": statistics.median(bare),
            "prepare": statistics.median(ours),
            "prepare alone": statistics.median(ours_alone),
        }
        if not options.skip_peers:
            tokenizer_file = next((folder / "storage0").glob("*/tokenizer-*/tokenizer.json"))
            peers = {"datatrove": (DATATROVE, str(tokenizer_file)), "datasets.map": (DATASETS_MAP, options.tokenizer)}
            for name, (program, tokenizer) in peers.items():
                seconds[name] = time_peer(options.peers, name, program, folder, tokenizer)

    print(f"\n{text_bytes / 1e6:,.0f} MB of text, {options.tokenizer}, {PROCESSES} processes, {count_cores()} cores")
    print(f"{'':<16}{'seconds':>10}{'MB/s':>10}{'of tiktoken':>14}")
    for name, taken in seconds.items():
        if taken is None:
            print(f"{name:<16}{'missing':>10}")
        else:
            share = seconds["tiktoken alone"] / taken  # type: ignore[operator]
            print(f"{name:<16}{taken:>10.1f}{text_bytes / 1e6 / taken:>10.2f}{share:>14.2f}")
    print(f"most memory in one worker of prepare: {rss:.2f} GB")

    def ratio(name: str, ours: str = "prepare") -> float | None:
        other, mine = seconds.get(name), seconds[ours]
        return round(other / mine, 3) if other and mine else None

    print(
        json.dumps(
            {
                "megabytes": round(text_bytes / 1e6),
                "megabytes_per_second": round(text_bytes / 1e6 / statistics.median(ours), 2),
                "tiktoken_megabytes_per_second": round(text_bytes / 1e6 / statistics.median(bare), 2),
                "ratio_to_tiktoken": ratio("tiktoken alone"),
                "ratio_to_tiktoken_alone": ratio("tiktoken alone", "prepare alone"),
                "ratio_to_datatrove": ratio("datatrove"),
                "ratio_to_datasets_map": ratio("datasets.map"),
                "peak_worker_rss_gigabytes": round(rss, 2),
            }
        )
    )


def read_texts(path: Path | None) -> list[str]:
    if path is None:
        from pipeline.corpus import python_docs

        return list(python_docs.documents())
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def write_corpus(folder: Path, texts: list[str], megabytes: float) -> int:
    """Repeat the documents up to a size, over one file for each process; return the bytes of text."""
    folder.mkdir()
    lines = [(json.dumps({"text": text}, ensure_ascii=False) + "\n").encode() for text in texts]
    sizes = [len(text.encode()) for text in texts]
    total = 0
    for part in range(PROCESSES):
        written = 0
        with open(folder / f"part{part}.jsonl", "wb") as file:
            while written < megabytes * 1e6 / PROCESSES:
                for line, size in zip(lines, sizes, strict=True):
                    file.write(line)
                    written += size
                    if written >= megabytes * 1e6 / PROCESSES:
                        break
        total += written
    return total


def encode_half(path: Path, name: str, barrier: Any) -> float:
    import tiktoken

    encoding = tiktoken.get_encoding(name)
    texts = read_texts(path)
    encoding.encode_to_numpy(texts[0], disallowed_special=())
    barrier.wait()
    began = time.perf_counter()
    for text in texts:
        encoding.encode_to_numpy(text, disallowed_special=())
    return time.perf_counter() - began


def time_tiktoken(corpus: Path, name: str) -> float:
    """The slower of two processes that each encode half of the documents, which they hold in memory."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        barrier = manager.Barrier(PROCESSES, timeout=300)  # seconds; where the other process has failed
        halves = [pool.submit(encode_half, corpus / f"part{part}.jsonl", name, barrier) for part in range(PROCESSES)]
        return max(half.result() for half in halves)


class Enough(Exception):
    """Prepare is done, and the stages after it are not asked for."""


def time_prepare(folder: Path, tokenizer: str, storage: Path, *, alone: bool) -> tuple[float, float]:
    """The whole stage in a fresh Ray, from its call to its manifest; and the most memory of one worker, in GB.

    In a pipeline it gets ready while the tokenizer's stage before it runs; `alone` it cannot.
    """
    import ray

    from pipeline import orchestrator
    from pipeline.config import load_config

    overrides = ["source.kind=files", f"source.paths=[{folder / 'corpus'}]", f"tokenizer.kind={tokenizer}"]
    config = load_config(None, ["name=benchmark", f"storage={storage}", *overrides])
    ray.init(address="local", num_cpus=PROCESSES, log_to_driver=False, configure_logging=False, include_dashboard=False)
    began = 0.0

    def note(line: str) -> None:
        nonlocal began
        if line.startswith("train"):
            raise Enough
        if line.startswith("prepare") and line.endswith("…"):
            threading.Thread(target=watch, daemon=True).start()
            began = time.time()

    peak = 0
    stopped = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stopped.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
                        peak = max(peak, process.memory_info().rss)
                except psutil.Error:
                    continue

    try:
        if alone:
            orchestrator.run(config, only="tokenizer", report=note)
            orchestrator.run(config, only="prepare", report=note)
        else:
            with suppress(Enough):
                orchestrator.run(config, report=note)
        # To the manifest: the entry in MLflow comes after it, and its database is made at the first use.
        finished = next(storage.glob("*/prepare-*/manifest.json")).stat().st_mtime
    finally:
        stopped.set()
        ray.shutdown()
    return finished - began, peak / 1e9


def time_peer(python: str, name: str, program: str, folder: Path, tokenizer: str) -> float | None:
    """Run a peer's program in the Python that has it; None where it is missing."""
    module = name.partition(".")[0]
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
        return None
    script, output = folder / f"run_{module}.py", folder / f"output_{module}"  # not the peer's own name
    script.write_text(textwrap.dedent(program))
    output.mkdir()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    finished = subprocess.run(
        [python, str(script), str(folder / "corpus"), tokenizer, str(output), str(PROCESSES)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        print(f"{name} failed: {finished.stderr.strip().splitlines()[-1:]}")
        return None
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
