"""How fast the token stream feeds a training, beside nanoGPT's random windows, a bare gather, and pyarrow alone.

    .venv/bin/python tests/benchmarks/token_stream.py [--tokens 100_000_000]

Warm: batches of 256 sequences of 1024 tokens from decoded shards. Cold: from Parquet to decoded shards, digests
checked. Rounds take turns, so that a busy moment of the machine falls on all of them; medians are reported.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.lib.stride_tricks import sliding_window_view

from pipeline.artifacts import Artifact, record_file
from pipeline.corpus.shards import TokenCache
from pipeline.corpus.stream import TokenStream

CONTEXT = 1024
SEQUENCES = 256
NUM_SHARDS = 8
ROUND_BATCHES = 40
VOCABULARY = 50_257


def write_corpus(folder: Path, num_tokens: int) -> Artifact:
    """Shards like prepare's: documents of some 1,100 tokens, Zipf-like ids, row groups of a million tokens, zstd."""
    random = np.random.default_rng(0)
    files = {}
    for index in range(NUM_SHARDS):
        count = num_tokens // NUM_SHARDS
        tokens = (VOCABULARY * random.random(count) ** 4).astype(np.uint16)
        ends = np.unique(np.append(np.cumsum(random.lognormal(6.5, 1.0, count // 1000).astype(np.int64) + 2), count))
        ends = ends[ends <= count]
        tokens[ends - 1] = VOCABULARY - 1
        column = pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), tokens)
        path = folder / "train" / f"{index:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = max(1, len(ends) * 1_000_000 // count)
        pq.write_table(pa.table({"tokens": column}), path, row_group_size=rows, compression="zstd")
        files[f"train/{path.name}"] = record_file(path)
    artifact = Artifact(str(folder), "prepare", "0" * 20)
    artifact.commit({}, files)
    return artifact


def take_turns(rounds: int, ways: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Time each way once a round; return the median of tokens per second. Each way returns the tokens it read."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            tokens = way()
            rates[name].append(tokens / (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in rates.items()}


def measure_warm(artifact: Artifact, cache: Path, folder: Path, rounds: int) -> dict[str, float]:
    stream = TokenStream(artifact, context_length=CONTEXT, batch_sequences=SEQUENCES, seed=1, cache_folder=cache)
    stream.batch(0)
    joined = folder / "joined.bin"  # nanoGPT keeps its corpus in one file
    with open(joined, "wb") as file:
        for shard in stream.shards:
            file.write(TokenCache(cache).open(shard).data)
    random = np.random.default_rng(2)
    whole = np.asarray(np.memmap(joined, dtype=np.uint16, mode="r"))
    rows = sliding_window_view(whole, CONTEXT + 1)

    def ours() -> int:
        batches = stream.batches(int(random.integers(1000)))
        for _ in range(ROUND_BATCHES):
            next(batches)
        batches.close()
        return ROUND_BATCHES * SEQUENCES * CONTEXT

    def nanogpt() -> int:
        for _ in range(ROUND_BATCHES // 4):
            data = np.memmap(joined, dtype=np.uint16, mode="r")
            starts = torch.randint(len(data) - CONTEXT, (SEQUENCES,))
            torch.stack([torch.from_numpy(data[i : i + CONTEXT].astype(np.int64)) for i in starts])
            torch.stack([torch.from_numpy(data[i + 1 : i + 1 + CONTEXT].astype(np.int64)) for i in starts])
        return ROUND_BATCHES // 4 * SEQUENCES * CONTEXT

    def gather() -> int:
        for _ in range(ROUND_BATCHES):
            rows[random.integers(0, len(rows), SEQUENCES)]
        return ROUND_BATCHES * SEQUENCES * CONTEXT

    ways = {"token stream": ours, "nanoGPT's random windows": nanogpt, "bare gather, 16 bits": gather}
    take_turns(1, ways)
    rates = take_turns(rounds, ways)
    stream.close()
    return rates


def measure_cold(artifact: Artifact, folder: Path, rounds: int) -> dict[str, float]:
    files = sorted(Path(artifact.url).glob("train/*.parquet"))
    turn = iter(range(1000))

    def ours() -> int:
        stream = TokenStream(
            artifact,
            context_length=CONTEXT,
            batch_sequences=SEQUENCES,
            seed=1,
            cache_folder=folder / f"cold-{next(turn)}",
        )
        stream.batch(0)
        stream.close()
        return stream.num_tokens

    def pyarrow_alone() -> int:
        return sum(
            len(pq.read_table(file, columns=["tokens"]).column("tokens").combine_chunks().values) for file in files
        )

    ways = {"first batch, nothing cached": ours, "pyarrow alone": pyarrow_alone}
    take_turns(1, ways)
    return take_turns(rounds, ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=9, help="rounds whose median is reported")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifact = write_corpus(folder / "shards", arguments.tokens)
        warm = measure_warm(artifact, folder / "cache", folder, arguments.rounds)
        cold = measure_cold(artifact, folder, arguments.rounds)
        parquet_bytes = sum(path.stat().st_size for path in Path(artifact.url).glob("train/*.parquet"))
        began = time.perf_counter()
        stream = TokenStream(
            artifact, context_length=CONTEXT, batch_sequences=SEQUENCES, seed=1, cache_folder=folder / "cache"
        )
        stream.batch(123_456)
        resume_seconds = time.perf_counter() - began
        stream.close()

    print(f"{arguments.tokens:,} tokens in {NUM_SHARDS} shards, {parquet_bytes / arguments.tokens:.2f} bytes per token")
    for title, rates in (("warm", warm), ("cold", cold)):
        print(f"\n{title:<32}{'million tokens/s':>18}")
        for way, rate in rates.items():
            print(f"  {way:<30}{rate / 1e6:>18.1f}")
    print(f"\nresumed at step 123,456 in {resume_seconds * 1e3:.0f} ms")
    ours, nanogpt, gather = warm.values()
    ours_cold, pyarrow_alone = cold.values()
    figures = {
        "tokens_per_second_warm": ours,
        "tokens_per_second_memmap_windows": nanogpt,
        "tokens_per_second_bare_gather": gather,
        "ratio_to_memmap_windows": ours / nanogpt,
        "ratio_to_bare_gather": ours / gather,
        "tokens_per_second_cold": ours_cold,
        "tokens_per_second_pyarrow": pyarrow_alone,
        "ratio_to_pyarrow": ours_cold / pyarrow_alone,
        "resume_seconds": resume_seconds,
    }
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
