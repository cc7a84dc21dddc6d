"""Time to first token of each turn of a conversation, with what the slots hold from the turns before and without.

    .venv/bin/python tests/benchmarks/chat_turns.py [--rounds 5] [--turns 5] [--new-tokens 64]

The model is that of the preset gpt-53m with random weights in bfloat16. Every turn asks and is answered in equally many
tokens. Without: the same prompts by another owner each, who may not have what was read before. Both give the same
tokens with the same log-probabilities, or the benchmark fails.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from model.checkpoint import load_model
from model.engine import Engine, EngineSettings, GenerationRequest
from model.sampling import SamplingSettings
from tests.benchmarks.serve import build_checkpoint, prompt_of

Answer = tuple[list[int], list[float | None]]


def answer(engine: Engine, prompt: list[int], settings: SamplingSettings, owner: str) -> tuple[float, Answer]:
    """Return the seconds to the first token, and all tokens with their log-probabilities."""
    began = time.perf_counter()
    first = 0.0
    tokens: list[int] = []
    logprobs: list[float | None] = []
    engine.add(GenerationRequest("", prompt, settings, owner=owner))
    while engine.has_work:
        for chunk in engine.step():
            first = first or time.perf_counter() - began
            tokens += chunk.tokens
            logprobs += [each.logprob for each in chunk.logprobs or []]
    return first, (tokens, logprobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64, help="of each question, and of each answer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = build_checkpoint(Path(temporary))
        model = load_model(Path(temporary))
    engine = Engine(model, tokenizer, EngineSettings(max_batch_size=4, threads=torch.get_num_threads()))
    engine.enter_thread()
    bias = {tokenizer.end_of_text: -100.0}
    settings = SamplingSettings(max_tokens=options.new_tokens, temperature=0, logit_bias=bias, logprobs=1)
    answer(engine, prompt_of(300, 0), settings, "warm-up")
    kept: list[list[float]] = [[] for _ in range(options.turns)]
    anew: list[list[float]] = [[] for _ in range(options.turns)]
    for number in range(options.rounds):
        prompt: list[int] = []
        for turn in range(options.turns):
            prompt = prompt + prompt_of(options.new_tokens, 1 + number * options.turns + turn)
            seconds, said = answer(engine, prompt, settings, f"talker {number}")
            kept[turn].append(seconds)
            seconds, again = answer(engine, prompt, settings, f"stranger {number} {turn}")
            anew[turn].append(seconds)
            if again != said:
                sys.exit(f"error: turn {turn + 1} has other bits with what the slot held than without.")
            prompt = prompt + said[0]
    print(
        f"{torch.get_num_threads()} threads, {options.new_tokens} new tokens a turn, medians of {options.rounds} rounds"
    )
    print(f"load average {os.getloadavg()[0]:.1f}\n")
    print(f"{'turn':>4} {'with':>9} {'without':>9}   milliseconds to the first token")
    middles = [[1e3 * statistics.median(times) for times in way] for way in (kept, anew)]
    for turn, (one, other) in enumerate(zip(*middles, strict=True), start=1):
        print(f"{turn:4} {one:9.1f} {other:9.1f}")
    figures = {
        "first_turn_milliseconds": round(middles[0][0], 1),
        "last_turn_milliseconds": round(middles[0][-1], 1),
        "last_turn_read_anew_milliseconds": round(middles[1][-1], 1),
        "ratio_last_to_first_turn": round(middles[0][-1] / middles[0][0], 2),
        "ratio_last_to_first_turn_read_anew": round(middles[1][-1] / middles[1][0], 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
