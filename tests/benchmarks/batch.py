"""A file of prompts through Ray Data, beside the bare engine with the same requests in the same run; and its memory.

    .venv/bin/python tests/benchmarks/batch.py [--rows 2000] [--rounds 9] [--memory-rows 1000000]

Prompts of 4 to 64 tokens, answers of 4 to 64, greedy, none of which stops early. The engine is the same in both, with
all cores; its time begins with its first step, that of the actor when it has its model, so neither counts the loading.
Both give the same texts, or the benchmark fails. Rounds take turns; medians are reported. With --memory-rows, so many
rows are answered at once by a backend that computes nothing, and the largest resident memory of the driver and of the
actor is told for the first tenth of the rows and for all.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from jobs.command import ray_session, set_environment


def write_prompts(file: Path, rows: int, vocab_size: int, end_of_text: int) -> None:
    chance = random.Random(0)
    with open(file, "w", encoding="utf-8") as stream:
        for _ in range(rows):
            prompt = [chance.randrange(vocab_size - 1) for _ in range(chance.randint(4, 64))]
            bias = {str(end_of_text): -100}
            row = {"prompt": prompt, "max_tokens": chance.randint(4, 64), "temperature": 0, "logit_bias": bias}
            stream.write(json.dumps(row) + "\n")


def run_engine(config: Any, model: Any, tokenizer: Any, prompts: Path) -> tuple[float, list[str]]:
    """The bare engine: every request is there from the start, one thread steps it; returns tokens/s and the texts."""
    from concurrent.futures import ThreadPoolExecutor

    from model.engine import Engine, GenerationRequest
    from model.sampling import SamplingSettings
    from pipeline.serving.live_engine import engine_settings

    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    settings = dataclasses.replace(engine_settings(config.serve), max_queue=len(rows))
    engine = Engine(model, tokenizer, settings)

    def work() -> tuple[float, list[str]]:
        texts = [""] * len(rows)
        for number, row in enumerate(rows):
            bias = {int(token): float(value) for token, value in row["logit_bias"].items()}
            sampling = SamplingSettings(max_tokens=row["max_tokens"], temperature=0, logit_bias=bias)
            engine.add(GenerationRequest(str(number), row["prompt"], sampling))
        began = time.perf_counter()
        tokens = 0
        while engine.has_work:
            for chunk in engine.step():
                texts[int(chunk.request_id)] += chunk.text
                tokens += len(chunk.tokens)
        return tokens / (time.perf_counter() - began), texts

    with ThreadPoolExecutor(1, initializer=engine.enter_thread) as thread:
        return thread.submit(work).result()


def run_batch(config: Any, start: Any, prompts: Path, output: Path) -> float:
    """The command's own way; returns tokens/s since the actor had its model, the joining of the parts included."""
    from pipeline.serving.batch import answer_batch, plan_batch

    ready: list[float] = []
    batch = plan_batch(config, "champion", str(prompts), str(output), {}, 0)
    counts = answer_batch(batch, start, told=lambda part: ready.append(part.ready_at))
    return counts.completion_tokens / (time.time() - min(ready))


def measure_memory(config: Any, folder: Path, rows: int) -> dict[str, float]:
    """The largest resident megabytes of the driver and of its actor, in the first tenth of the rows and in all."""
    import psutil

    from pipeline.serving.batch import answer_batch, plan_batch

    prompts = folder / "many.jsonl"
    with open(prompts, "w", encoding="utf-8") as stream:
        for number in range(rows):
            stream.write(json.dumps({"prompt": f"Return the item of row {number}", "max_tokens": 8}) + "\n")
    driver = psutil.Process()
    peaks = {"driver": 0.0, "actor": 0.0}
    at_a_tenth: dict[str, float] = {}
    done, looked_at = 0, 0.0

    def told(part: Any) -> None:
        nonlocal done, looked_at
        done += part.rows
        if time.monotonic() - looked_at > 0.5:
            looked_at = time.monotonic()
            peaks["driver"] = max(peaks["driver"], driver.memory_info().rss / 1e6)
            workers = [each for each in driver.children(recursive=True) if "MapWorker" in " ".join(each.cmdline())]
            peaks["actor"] = max([peaks["actor"], *(each.memory_info().rss / 1e6 for each in workers)])
        if done >= rows / 10 and not at_a_tenth:
            at_a_tenth.update(peaks)

    began = time.perf_counter()
    batch = plan_batch(config, "champion", str(prompts), str(folder / "many-answers.jsonl"), {}, 0)
    counts = answer_batch(batch, start_at_once, told=told)
    assert counts.rows == rows
    assert not counts.failed
    found = {f"{name}_megabytes_at_a_tenth": round(value) for name, value in at_a_tenth.items()}
    found |= {f"{name}_megabytes": round(value) for name, value in peaks.items()}
    return found | {"simulated_rows_per_second": round(rows / (time.perf_counter() - began))}


class AtOnce:
    """A backend that answers at once, with the prompt's own tokens."""

    weights = "none"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tickets: set[Any] = set()

    def submit(self, requests: Any) -> Any:
        from model.sequence import Chunk
        from pipeline.serving.backend import Ticket

        ticket = Ticket(requests)
        for each in requests:
            tokens = each.prompt_tokens[: each.settings.max_tokens]
            ticket.deliver(Chunk(each.request_id, 0, self.tokenizer.decode(tokens), tokens, None, "length"))
        return ticket

    def leave(self, ticket: Any) -> None:
        pass


async def start_at_once(checkpoint: Path, model: Any, tokenizer: Any) -> Any:
    await asyncio.sleep(0)
    return AtOnce(tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=512, help="of the model, of two layers and random weights")
    parser.add_argument("--memory-rows", type=int, default=0)
    options = parser.parse_args()
    set_environment()

    import torch

    from pipeline import registry
    from pipeline.config import load_config
    from pipeline.serving.live_engine import engine_starter
    from tests.pipeline.tiny_registry import make_registry

    figures: dict[str, Any] = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_registry(folder).add_version(seed=1, alias="champion", width=options.width)
        config = load_config(None, ["name=tiny"])
        with ray_session():
            if options.rounds:
                loaded, model = registry.load(registry.resolve("tiny", "champion"), torch.device("cpu"))
                tokenizer = loaded.tokenizer
                prompts = folder / "prompts.jsonl"
                write_prompts(prompts, options.rows, tokenizer.vocab_size, tokenizer.end_of_text)
                bare, batch = [], []
                for number in range(options.rounds):
                    rate, texts = run_engine(config, model, tokenizer, prompts)
                    bare.append(rate)
                    output = folder / f"answers-{number}.jsonl"
                    batch.append(run_batch(config, engine_starter(config.serve), prompts, output))
                    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
                    if [answer["text"] for answer in answers] != texts:
                        sys.exit("error: the batch has other texts than the bare engine.")
                figures = {
                    "tokens_per_second_bare_engine": round(statistics.median(bare)),
                    "tokens_per_second_batch": round(statistics.median(batch)),
                    "ratio_to_bare_engine": round(statistics.median(batch) / statistics.median(bare), 3),
                }
                ratios = ", ".join(f"{one / other:.2f}" for one, other in zip(batch, bare, strict=True))
                print(f"{options.rows:,} prompts, ratios of the rounds: {ratios}")
            if options.memory_rows:
                figures |= measure_memory(config, folder, options.memory_rows)
    print(f"load average {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")
    for name, value in figures.items():
        print(f"{name:>40} {value:>10}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
