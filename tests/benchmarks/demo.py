"""Where the demo's seconds go: its training stage as `make demo` runs it, and one of its steps beside the limit.

    .venv/bin/python tests/benchmarks/demo.py [--preset demo] [section.key=value ...]

The stages run as a person would start them, in a folder that is deleted afterwards. Then two processes, a core each as
the two workers have it, take one step of the same model apart: the forward and backward pass, the exchange of
gradients, Muon, AdamW, and the step's matrix products alone, which no step can be faster than. The parts take turns.
"""

import argparse
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: each worker of the demo has one core

import torch
import torch.distributed as dist

# A script run by its path sees only its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.gpt import GPT, flops_per_token
from model.optimizer import build_optimizer
from model.training import CPU_ENVIRONMENT, autocast, choose_precision, parallelize, train_step
from pipeline.artifacts import MANIFEST
from pipeline.config import Config, load_config
from pipeline.corpus.stream import Batch
from tests.benchmarks.ranks import run_ranks
from tests.benchmarks.train_step import matrix_shapes

WORKERS = 2


def run_stages(options: argparse.Namespace) -> dict[str, Any]:
    """Run the preset's stages up to the evaluation; returns what they say of themselves, and the seconds of each."""
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-m", "jobs.pipeline", options.preset, *options.settings, f"storage={storage}"]
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        log = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if log.returncode:
            raise SystemExit(f"The pipeline failed:\n{log.stdout[-2000:]}\n{log.stderr[-2000:]}")
        stages = {}
        for name, minutes, seconds in re.findall(r"^(\w+) +done in (?:(\d+) min )?(\d+) s", log.stdout, re.MULTILINE):
            stages[name] = 60 * int(minutes or 0) + int(seconds)
        counts = {
            stage: json.loads(next(Path(storage).glob(f"*/{stage}-*/{MANIFEST}")).read_text())["counts"]
            for stage in ("train", "evaluate")
        }
    return {"stages": stages, "train": counts["train"], "evaluate": counts["evaluate"]}


def take_apart(rank: int, world_size: int, config: Config, rounds: int) -> tuple[dict[str, float], int, str]:
    """Be one of two workers; returns the seconds of each part, the operations of a token, and the precision."""
    torch.manual_seed(0)
    precision = choose_precision(config.train.precision, "cpu")
    context, vocab_size = config.model.context_length, config.tokenizer.most_tokens
    model = GPT(config.model, vocab_size)
    module: Any = parallelize(model, strategy="ddp", compile=config.train.compile, precision=precision)
    optimizer = build_optimizer(model, config.optimizer, config.train.steps, precision)
    mine = config.train.batch_tokens // context // world_size
    tokens = torch.randint(0, vocab_size, (mine, context + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    size = config.train.micro_batch_sequences
    products = [
        pair
        for inputs, outputs, count in matrix_shapes(config.model, vocab_size)
        for pair in count * make_products(min(size, mine) * context, inputs, outputs, precision)
    ]

    def learn() -> None:
        with module.no_sync():
            for micro_batch in batch.split(size):
                with autocast("cpu", precision):
                    nats = module(micro_batch.tokens, micro_batch.targets, None)
                (nats / config.train.batch_tokens).backward()

    def step() -> None:
        train_step(module, optimizer, batch.split(size), step=1, global_tokens=config.train.batch_tokens,
                   precision=precision).read()  # fmt: skip

    def multiply() -> None:
        for _ in range(math.ceil(mine / size)):
            for left, right in products:
                torch.mm(left, right)

    def step_muon() -> None:
        assert optimizer.muon is not None
        optimizer.muon.step(1e-9, 0.9, 0.0)

    parts: dict[str, Callable[[], Any]] = {"step": step, "forward_and_backward": learn, "products_alone": multiply}
    if optimizer.muon is not None:
        parts["muon"] = step_muon
    parts["adamw"] = optimizer.adamw.step
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    step()  # compiles
    gc.disable()  # as the training loop does
    for number in range(rounds + 1):
        for name, run in parts.items():
            if name == "forward_and_backward":
                optimizer.zero_grad()
            dist.barrier()
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return medians, flops_per_token(config.model, vocab_size), str(precision).removeprefix("torch.")


def make_products(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One layer's three products: forward, and the gradients of its inputs and of its weights."""
    x, weight, gradient = (
        torch.randn(shape, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    return [(x, weight.t()), (gradient, weight), (gradient.t(), x)]


def measure_step(config: Config, rounds: int) -> tuple[dict[str, float], int, str]:
    os.environ |= CPU_ENVIRONMENT  # as the workers have it
    return run_ranks(take_apart, WORKERS, config, rounds)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="over the preset's own")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--step-only", action="store_true", help="leave out the stages")
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    config = load_config(str(root / f"jobs/presets/{options.preset}.yaml"), options.settings)
    result: dict[str, Any] = {}
    if not options.step_only:
        ran = run_stages(options)
        trained, spent = ran["train"], ran["train"]["seconds"]
        wall = sum(spent.values())
        print(f"{'stage':<12} seconds")
        for name, seconds in ran["stages"].items():
            print(f"{name:<12} {seconds:>7}")
        print(f"\n{'of training':<12} seconds")
        for name, seconds in spent.items():
            print(f"{name:<12} {seconds:>7.1f} {seconds / wall:>6.0%}")
        bits = ran["evaluate"]["bits_per_byte"]
        speed = trained["tokens"] / (spent["compute"] + spent["data_wait"])
        print(
            f"\n{trained['tokens']:,} tokens, {speed:,.0f} tokens/s while learning: {bits:.4f} bits per byte held out"
        )
        result = {
            "bits_per_byte": round(bits, 4),
            "train_stage_seconds": ran["stages"]["train"],
            "stage_seconds": ran["stages"],
            "training_seconds": {name: round(seconds, 2) for name, seconds in spent.items()},
            "tokens_per_second_while_learning": round(speed),
        }
    medians, flops, precision = measure_step(config, options.rounds)
    whole, limit, tokens = medians["step"], medians["products_alone"], config.train.batch_tokens
    rest = whole - sum(medians.get(name, 0.0) for name in ("forward_and_backward", "muon", "adamw"))
    print(f"\n{'part of a step':<24} {'ms':>8}   ({precision}, {tokens:,} tokens, {WORKERS} workers)")
    for name, seconds in {**medians, "exchange_and_rest": rest}.items():
        print(f"{name.replace('_', ' '):<24} {1000 * seconds:>8.1f} {seconds / whole:>6.0%}")
    print(f"{tokens / whole:,.0f} tokens/s; its products alone: {limit / whole:.0%} of the step")
    result |= {
        "step_seconds": {name: round(seconds, 5) for name, seconds in {**medians, "rest": rest}.items()},
        "step_share_of_products_alone": round(limit / whole, 3),
        "step_tokens_per_second": round(tokens / whole),
        "flops_per_token": flops,
        "precision": precision,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
