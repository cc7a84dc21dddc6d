"""Tokens to the same bits per byte: the speedrun's recipe beside AdamW at its best learning rate, over three seeds.

.venv/bin/python tests/benchmarks/time_to_quality.py --text openwebtext.jsonl       # about ten minutes on two cores
.venv/bin/python tests/benchmarks/time_to_quality.py --device cuda --layers 8 --width 512 --batch-tokens 65536

Both train the same small modern model on the same batches and tokenizer, with the same schedule. AdamW's learning rate
is searched on the first seed, from the usual weights (normal, 0.02) and from the recipe's; the recipe is not searched.
Draws `time_to_quality.png` beside this file, or where --plot says.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# A script run by its path sees only its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.gpt import GPT, ModelConfig
from model.optimizer import OptimizerConfig, build_optimizer
from model.scoring import score_batches
from model.tokenizer import Tokenizer, train_bpe
from model.training import LossModule, choose_precision, parallelize, train_step

HELD_OUT = 0.05


@dataclass
class Rows:
    tokens: Tensor
    targets: Tensor
    document_ids: None = None


@dataclass
class Curve:
    tokens: list[int] = field(default_factory=list)
    bits_per_byte: list[float] = field(default_factory=list)


def read_texts(path: str | None) -> list[str]:
    """Documents of a .jsonl (column `text`) or .txt file; without one, the documentation that Python carries."""
    if path is None:
        from pipeline.corpus import python_docs

        return list(python_docs.documents())
    content = Path(path).read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in content.splitlines()] if path.endswith(".jsonl") else [content]


def encode(texts: list[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Train and held-out tokens, each document ended by the end-of-text token."""
    parts = [np.append(tokenizer.encode(text), tokenizer.end_of_text) for text in texts]
    tokens = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    held_out = int(len(tokens) * HELD_OUT)
    return tokens[:-held_out], tokens[-held_out:]


def batches(tokens: Tensor, options: argparse.Namespace, seed: int) -> Iterator[Rows]:
    """Random windows, the same for every optimizer."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(options.context + 1)
    while True:
        starts = torch.randint(
            0, len(tokens) - options.context - 1, (options.batch_tokens // options.context, 1), generator=generator
        )
        rows = tokens[starts + offsets]
        yield Rows(rows[:, :-1], rows[:, 1:])


def evaluate(model: GPT, tokens: Tensor, tokenizer: Tokenizer, options: argparse.Namespace) -> float:
    count = min(len(tokens) - 1, options.evaluation_tokens) // options.context * options.context
    inputs, targets = tokens[:count].view(-1, options.context), tokens[1 : count + 1].view(-1, options.context)
    batches = (Rows(x, y) for x, y in zip(inputs.split(64), targets.split(64), strict=True))
    return score_batches(LossModule(model), batches, tokenizer.byte_lengths).bits_per_byte


def usual_weights(model: GPT) -> None:
    """What AdamW is used to: every matrix normal with 0.02, as Qwen3's own code draws them."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    model.clear_padding()


def train(
    kind: str,
    learning_rate: float | None,
    weights: str,
    seed: int,
    data: tuple[Tensor, Tensor],
    tokenizer: Tokenizer,
    options: argparse.Namespace,
) -> Curve:
    torch.manual_seed(seed)
    config = ModelConfig(
        num_layers=options.layers, width=options.width, num_heads=options.heads, context_length=options.context
    )
    model = GPT(config, tokenizer.vocab_size)
    if weights == "usual":
        usual_weights(model)
    if kind == "adamw":
        settings = OptimizerConfig(
            kind="adamw", learning_rate=learning_rate, warmup_steps=options.steps // 20, clip_norm=1.0
        )
    else:
        settings = OptimizerConfig(kind="muon", momentum_warmup_steps=options.steps // 3)
    model.to(options.device)
    module, precision = parallelize(model), choose_precision("auto", options.device)
    optimizer = build_optimizer(model, settings, options.steps, precision)
    stream, curve, started = batches(data[0], options, seed), Curve(), time.perf_counter()
    for step in range(options.steps):
        train_step(
            module, optimizer, [next(stream)], step=step, global_tokens=options.batch_tokens, precision=precision
        )
        if (step + 1) % options.evaluate_every == 0 or step + 1 == options.steps:
            curve.tokens.append((step + 1) * options.batch_tokens)
            curve.bits_per_byte.append(evaluate(model, data[1], tokenizer, options))
    name = f"{kind} {learning_rate or ''} {weights}"
    seconds = time.perf_counter() - started
    print(f"{name:20} seed {seed}: {curve.bits_per_byte[-1]:.4f} bits per byte, {seconds:.0f} s", flush=True)
    return curve


def tokens_to_reach(curves: list[Curve], target: float) -> float:
    """Tokens at which the mean curve crosses the target; between points, a straight line."""
    mean = np.mean([curve.bits_per_byte for curve in curves], axis=0)
    below = int(np.argmax(mean <= target))
    if mean[below] > target:
        return float("nan")
    tokens = curves[0].tokens
    if below == 0:
        return float(tokens[0])
    share = (mean[below - 1] - target) / (mean[below - 1] - mean[below])
    return tokens[below - 1] + share * (tokens[below] - tokens[below - 1])


def draw(found: dict[str, list[Curve]], best: str, path: Path, options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    styles = {
        "adamw": ("tab:gray", f"AdamW, best learning rate {best}"),
        "muon": ("tab:blue", "Muon for the matrices (the speedrun's recipe)"),
    }
    for kind, curves in found.items():
        color, label = styles[kind]
        millions = np.array(curves[0].tokens) / 1e6
        for curve in curves:
            axes.plot(millions, curve.bits_per_byte, color=color, alpha=0.3, linewidth=1)
        axes.plot(millions, np.mean([curve.bits_per_byte for curve in curves], axis=0), color=color, label=label)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("held-out bits per byte")
    axes.set_title(f"{options.layers} layers, width {options.width}, {options.seeds} seeds and their mean")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help=".jsonl with a column `text`, or .txt; default: Python's documentation")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--evaluate-every", type=int, default=20)
    parser.add_argument("--evaluation-tokens", type=int, default=16_384)
    parser.add_argument("--learning-rates", default="0.002,0.004,0.008,0.016,0.032", help="searched for AdamW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()

    texts = read_texts(options.text)
    tokenizer = train_bpe(texts, options.vocabulary)
    data = encode(texts, tokenizer)
    seen = options.steps * options.batch_tokens
    print(f"{len(data[0]):,} training tokens, {seen:,} of them seen, vocabulary {tokenizer.vocab_size:,}")

    rates = [float(rate) for rate in options.learning_rates.split(",")]
    searched = {
        (rate, weights): train("adamw", rate, weights, 0, data, tokenizer, options)
        for weights in ("usual", "recipe")
        for rate in rates
    }
    best = min(searched, key=lambda choice: searched[choice].bits_per_byte[-1])
    best_rate, best_weights = best
    if len(rates) > 1 and best_rate in (rates[0], rates[-1]):
        print("the best learning rate lies at the edge of those searched: widen --learning-rates", file=sys.stderr)
    found = {
        "adamw": [
            searched[best] if seed == 0 else train("adamw", best_rate, best_weights, seed, data, tokenizer, options)
            for seed in range(options.seeds)
        ],
        "muon": [train("muon", None, "recipe", seed, data, tokenizer, options) for seed in range(options.seeds)],
    }
    draw(found, f"{best_rate:g}, {best_weights} weights", options.plot, options)
    final = {kind: [curve.bits_per_byte[-1] for curve in curves] for kind, curves in found.items()}
    target = float(np.mean(final["adamw"]))
    reached = tokens_to_reach(found["muon"], target)
    total = options.steps * options.batch_tokens
    arrival = "never" if math.isnan(reached) else f"after {reached:,.0f}"
    print(f"\nAdamW ends at {target:.4f} bits per byte after {total:,} tokens; Muon is there {arrival}")
    figures = {
        "adamw_best_learning_rate": best_rate,
        "adamw_best_weights": best_weights,
        "adamw_bits_per_byte": [round(value, 4) for value in final["adamw"]],
        "muon_bits_per_byte": [round(value, 4) for value in final["muon"]],
        "adamw_tokens": total,
        "muon_tokens_to_same_bits_per_byte": None if math.isnan(reached) else round(reached),
        "token_ratio": None if math.isnan(reached) else round(reached / total, 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
