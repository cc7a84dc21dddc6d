"""What a second worker gives: tokens per second of one and of two CPU workers with one thread each, over gloo.

    .venv/bin/python tests/benchmarks/ddp.py [--steps 6] [--rounds 3]

Both learn the same global batches with the same optimizer step (`model/training.py`, without Ray); the rounds
alternate, so that a machine that is slower for a minute is slower for both. Also what the loop waits for a
checkpoint: the copy of weights and optimizer state, beside the time of a step.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

# One thread per worker, before torch is imported: the point is what a second core does.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist

# A script run by its path sees only its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.checkpoint import export_weights, write_model
from model.cores import count_cores
from model.gpt import GPT, ModelConfig
from model.optimizer import OptimizerConfig, build_optimizer
from model.training import parallelize, train_step
from pipeline.corpus.stream import Batch
from tests.benchmarks.ranks import run_ranks

CONTEXT, SEQUENCES, MICRO_BATCH, VOCABULARY = 256, 16, 4, 4096
MODEL = ModelConfig(num_layers=6, width=256, num_heads=4, context_length=CONTEXT)


def work(rank: int, world_size: int, steps: int) -> tuple[list[float], list[float], list[float], int]:
    torch.manual_seed(0)
    model = GPT(MODEL, VOCABULARY)
    module = parallelize(model, strategy="ddp" if world_size > 1 else "none")
    optimizer = build_optimizer(model, OptimizerConfig(), total_steps=1000)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, CONTEXT + 1))
    mine = tokens[rank * SEQUENCES // world_size : (rank + 1) * SEQUENCES // world_size]
    batch = Batch(mine[:, :-1], mine[:, 1:])
    seconds = []
    for step in range(steps + 1):
        dist.barrier()
        began = time.perf_counter()
        measures = train_step(module, optimizer, batch.split(MICRO_BATCH), step=step, global_tokens=SEQUENCES * CONTEXT)
        measures.read()
        seconds.append(time.perf_counter() - began)
    waits, writes = [], []
    if rank == 0:
        for _ in range(3):
            began = time.perf_counter()
            weights, state = export_weights(model), optimizer.state_dict()
            waits.append(time.perf_counter() - began)
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                write_model(Path(folder), MODEL, VOCABULARY, weights)
                torch.save(state, Path(folder) / "training_state.pt")
                writes.append(time.perf_counter() - began)
    return seconds[1:], waits, writes, model.num_parameters()  # the first step also warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps in each round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of one worker, then two")
    options = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    waits: list[float] = []
    writes: list[float] = []
    num_parameters = 0
    print(f"{'workers':>8} {'s/step':>8} {'tokens/s':>10}")
    for _ in range(options.rounds):
        for world_size in (1, 2):
            times, waited, written, num_parameters = run_ranks(work, world_size, options.steps)
            seconds[world_size] += times
            waits, writes = waits + waited, writes + written
            median = statistics.median(times)
            print(f"{world_size:>8} {median:>8.3f} {SEQUENCES * CONTEXT / median:>10,.0f}", flush=True)
    one, two = statistics.median(seconds[1]), statistics.median(seconds[2])
    print(f"two workers: {one / two:.2f} times one; {num_parameters:,} parameters, {SEQUENCES * CONTEXT} tokens a step")
    wait = statistics.median(waits)
    print(f"a checkpoint holds the loop up for {1000 * wait:.0f} ms, {wait / two:.1%} of one step of two workers")
    print(
        json.dumps(
            {
                "speedup_of_two_workers": round(one / two, 3),
                "tokens_per_second_one_worker": round(SEQUENCES * CONTEXT / one),
                "tokens_per_second_two_workers": round(SEQUENCES * CONTEXT / two),
                "checkpoint_wait_seconds": round(wait, 4),
                "checkpoint_wait_fraction_of_step": round(wait / two, 4),
                "checkpoint_write_seconds": round(statistics.median(writes), 4),
                "cores": count_cores(),
            }
        )
    )


if __name__ == "__main__":
    main()
