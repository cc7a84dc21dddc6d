"""How fast a task is scored, beside lm-eval with the same weights: pairs of sentences, as BLiMP has them.

    .venv-evaluate/bin/python tests/benchmarks/evaluate.py [--items blimp.jsonl.zst [--whole]] [--pairs 500]

The preset's model has random weights, which cost what trained ones cost. Without --items the pairs are made up.
Rounds take turns; medians are reported. Ours runs in float32, as lm-eval does with such a folder, and in bfloat16.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model.checkpoint import load_model, save_model
from model.gpt import GPT
from model.likelihood import encode_requests, score
from model.products import use_fast_products
from model.tokenizer import load_tokenizer, train_bpe
from pipeline.config import load_config
from pipeline.evaluation.evaluators import Item
from pipeline.evaluation.tasks import load_task

NOUNS = ("teacher", "river", "student", "painter", "committee", "daughter", "window", "senator", "cousin", "horse")
VERBS = ("admires", "notices", "describes", "forgets", "remembers", "visits", "questions", "follows")


def make_up_pairs(count: int) -> list[Item]:
    """Sentences of eleven words or so that differ in one of them."""
    drawn = random.Random(0)
    items = []
    for _ in range(count):
        a, b, c = drawn.sample(NOUNS, 3)
        begin, end = f"The {a} that the {b}s know", f"the {c} and some other {b}s near the {a}."
        verb = drawn.choice(VERBS)
        items.append(Item((f" {begin} {verb} {end}", f" {begin} {verb[:-1]} {end}")))
    return items


def write_checkpoint(folder: Path, preset: str, texts: list[str]) -> None:
    """A model of the preset's shape, and a tokenizer learnt from the sentences themselves, its vocabulary filled up."""
    config = load_config(preset)
    tokenizer = train_bpe(texts, config.tokenizer.vocabulary_size)
    torch.manual_seed(0)
    model = GPT(config.model, config.tokenizer.vocabulary_size)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    model.clear_padding()
    save_model(folder, model, tokenizer)


def time_lm_eval(folder: Path, items: list[Item], batch_size: int) -> Callable[[], None] | None:
    """What scores the same sentences with lm-eval, tokenizing included; None where it is not installed."""
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        return None
    peer = HFLM(pretrained=str(folder), device="cpu", batch_size=batch_size, dtype="float32")
    asked = [
        Instance("loglikelihood", {}, ("", ending), number)
        for number, ending in enumerate(ending for item in items for ending in item.endings)
    ]
    return lambda: peer.loglikelihood(asked, disable_tqdm=True) and None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", default="", help="BLiMP's file; neighbours of the whole of it share more")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--preset", default="jobs/presets/gpt-53m.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32, help="lm-eval's")
    parser.add_argument("--whole", action="store_true", help="ours scores all the pairs too, once, among the rounds")
    options = parser.parse_args()

    items = list(load_task(f"blimp={options.items}").items) if options.items else make_up_pairs(options.pairs)
    all_texts = [ending for item in items for ending in item.endings]
    items = random.Random(0).sample(items, min(options.pairs, len(items)))
    texts = [ending for item in items for ending in item.endings]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder, options.preset, texts)
        model, tokenizer = load_model(folder), load_tokenizer(folder)

        def ours(precision: torch.dtype, texts: list[str] = texts) -> Callable[[], None]:
            return lambda: (
                score(model, encode_requests(tokenizer, [("", t) for t in texts]), precision=precision) and None
            )

        ways = {"ours, float32": ours(torch.float32), "ours, bfloat16": ours(torch.bfloat16)}
        peer = time_lm_eval(folder, items, options.batch_size)
        use_fast_products()
        own_products, torch_products = torch.get_float32_matmul_precision(), "highest"
        if peer is None:
            print("lm-eval is missing: pip install -e '.[peers-evaluate]'", file=sys.stderr)
        else:
            ways["lm-eval, float32"] = peer
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        whole_seconds = None
        for number in range(options.rounds):
            if options.whole and number == options.rounds // 2:
                torch.set_float32_matmul_precision(own_products)
                began = time.perf_counter()
                ours(torch.bfloat16, all_texts)()
                whole_seconds = time.perf_counter() - began
            for name, way in ways.items():
                # The choice of a library is the process's; lm-eval by itself leaves PyTorch's own.
                torch.set_float32_matmul_precision(torch_products if way is peer else own_products)
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)
    rates = {name: len(items) / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:<18} {rate:8.1f} pairs/s    67,000 pairs in {67_000 / rate / 60:6.1f} minutes")
    theirs = rates.get("lm-eval, float32")
    whole_rate = whole_seconds and len(all_texts) / 2 / whole_seconds
    if whole_rate:
        print(f"all {len(all_texts) // 2:,} pairs, bfloat16: {whole_seconds:,.0f} s, {whole_rate:.1f} pairs/s")
    print(
        json.dumps(
            {
                "pairs_per_second_float32": rates["ours, float32"],
                "pairs_per_second_bfloat16": rates["ours, bfloat16"],
                "pairs_per_second_lm_eval": theirs,
                "ratio_to_lm_eval_float32": theirs and rates["ours, float32"] / theirs,
                "pairs_per_second_of_all_bfloat16": whole_rate,
                "ratio_to_lm_eval_of_all_bfloat16": theirs and whole_rate and whole_rate / theirs,
                "ratio_to_lm_eval_bfloat16": theirs and rates["ours, bfloat16"] / theirs,
            }
        )
    )


if __name__ == "__main__":
    main()
