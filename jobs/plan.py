"""Say what a preset will take before anyone pays for it: parameters, memory, FLOPs, tokens, hours on a GPU.

    python -m jobs.plan jobs/presets/gpt-53m.yaml --gpu h100 [--mfu 0.4] [section.key=value ...]
    python -m jobs.plan jobs/presets/gpt-53m.yaml --gpu l40s --gpus-per-node 1 --network-gigabits 20

Nothing is measured and nothing is started: these are calculations, and each says from what.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.command import Command
from model.gpus import GPUS, Gpu, find_gpu

if TYPE_CHECKING:
    from pipeline.config import Config


NETWORK_SHARE = 0.8  # of the nominal bandwidth, as all-reduce reaches it


def run(config: "Config", options: argparse.Namespace) -> None:
    from model.budget import estimate_memory, estimate_step, orthogonalisation_flops
    from model.gpt import count_parameters, flops_per_token
    from model.training import BUCKET_MEGABYTES
    from pipeline.training.memory import advise_out_of_memory

    gpu, model, train = options.gpu, config.model, config.train
    vocab_size = config.tokenizer.most_tokens
    parameters = count_parameters(model, vocab_size)
    tokens = train.steps * train.batch_tokens
    flops = flops_per_token(model, vocab_size)
    print(f"{config.name}: {model.family}, {model.num_layers} layers, width {model.width}, vocabulary {vocab_size:,}\n")

    table = vocab_size * model.width
    print(f"parameters          {parameters:>16,}")
    print(f"  embedding         {table:>16,}")
    print(f"  head              {0 if model.tie_embeddings else table:>16,}" + " (tied)" * model.tie_embeddings)
    print(f"  all else          {parameters - table * (1 if model.tie_embeddings else 2):>16,}")
    print(f"tokens              {tokens:>16,}  = {train.steps:,} steps x {train.batch_tokens:,};"
          f" {tokens / parameters:.1f} per parameter")  # fmt: skip
    print(f"FLOPs per token     {flops:>16,}  = 6 per matrix weight + 12 L H D T (PaLM, appendix B)")
    print(f"FLOPs in all        {tokens * flops:>16.3g}")

    is_half = train.precision != "float32"
    shards = train.fewest_workers if train.sharding == "fsdp" else 1
    memory = estimate_memory(
        model,
        config.optimizer,
        vocab_size,
        micro_batch_sequences=train.micro_batch_sequences,
        activation_bytes=2 if is_half else 4,
        recompute=train.recompute_activations,
        shards=shards,
    )
    holder = f"one GPU of {shards} that share the model" if shards > 1 else "one GPU"
    print(f"\nmemory of {holder}, micro-batches of {train.micro_batch_sequences} x {model.context_length} tokens")
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        print(f"  {name:<18}{getattr(memory, name) / 1e9:>12.2f} GB")
    usable_bytes = int(0.9e9 * gpu.memory_gigabytes)  # the rest is the driver's, and lost between allocations
    fits = memory.total < usable_bytes
    verdict = "fits" if fits else "does not fit"
    print(f"  {'in all':<18}{memory.total / 1e9:>12.2f} GB  {verdict} ({gpu.name}: {gpu.memory_gigabytes:.0f} GB)")
    if not fits:
        print(f"  {advise_out_of_memory(memory, train.micro_batch_sequences, usable_bytes)}")

    print(f"\n{gpu.name} at {options.mfu:.0%} of its {gpu.flops_per_second / 1e12:,.0f} TFLOP/s (an assumption: --mfu)")
    print(f"  {'GPUs':>4}{'s/step':>10}{'tokens/s':>14}{'efficiency':>12}{'time':>10}{'GPU time':>11}")
    per_node = options.gpus_per_node
    network = gpu.network_bytes_per_second
    if options.network_gigabits is not None:
        network = options.network_gigabits * 1e9 / 8 / per_node
    for devices in (1, 8, 64):
        # Micro-batches of one sequence at least: no more GPUs than sequences can work.
        if devices > train.batch_tokens // model.context_length:
            print(f"  {devices:>4}  more GPUs than sequences in a batch ({train.batch_tokens // model.context_length})")
            continue
        nominal = gpu.link_bytes_per_second if devices <= per_node else network
        step = estimate_step(
            model,
            config.optimizer,
            vocab_size,
            flops=flops * train.batch_tokens,
            flops_per_second=options.mfu * gpu.flops_per_second,
            devices=devices,
            bytes_per_second=NETWORK_SHARE * nominal,
        )
        seconds = step.compute + step.exposed
        hours = train.steps * seconds / 3600
        print(
            f"  {devices:>4}{seconds:>10.4f}{train.batch_tokens / seconds:>14,.0f}{step.efficiency:>12.1%}"
            f"{_duration(hours):>10}{_duration(hours * devices):>11}"
        )
    if train.sharding == "fsdp":
        traffic = (
            "FSDP gathers the weights twice a step in bfloat16 and scatters the gradients once in float32:\n"
            f"together as many bytes as DDP's all-reduce of {4 * parameters / 1e6:,.0f} MB."
            " Most of it overlaps with arithmetic"
        )
    else:
        traffic = (
            f"DDP sums {4 * parameters / 1e6:,.0f} MB of gradients in every step by ring all-reduce, in buckets of"
            f" {BUCKET_MEGABYTES} MB.\nBuckets are sent while the backward pass goes on; a step waits for the last one"
        )
    within = f"{gpu.link_bytes_per_second / 1e9:,.0f} GB/s within a node of {per_node}, and of " if per_node > 1 else ""
    print(
        f"\nAll rows have the same global batch.\n{traffic}."
        f"\nAssumed: {NETWORK_SHARE:.0%} of {within}{network / 1e9:,.2f} GB/s per GPU between nodes."
        "\nEvaluation, start-up and reading data are not counted."
    )
    if config.optimizer.kind == "muon":
        share = orthogonalisation_flops(model) / (flops * train.batch_tokens)
        print(f"Muon's orthogonalisation adds {share:.1%} of FLOPs, divided over the GPUs and gathered in bfloat16.")


def main(argv: Sequence[str] | None = None) -> int:
    command = Command(__doc__)
    command.parser.add_argument("--gpu", type=_gpu, default="h100", help="such as h100, a100-80gb, l40s [%(default)s]")
    command.parser.add_argument(
        "--mfu", type=_share, default=0.4, help="share of the peak that training reaches [%(default)s]"
    )
    command.parser.add_argument(
        "--gpus-per-node", type=_count, default=8, help="GPUs that need no network among them [%(default)s]"
    )
    command.parser.add_argument(
        "--network-gigabits",
        type=_gigabits,
        help="Gbit/s of one node's network card, all its GPUs together [what is usual for the GPU]",
    )
    return command.main(run, argv)


def _gpu(text: str) -> Gpu:
    found = find_gpu(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"no GPU {text!r} is known; there are {', '.join(gpu.name for gpu in GPUS)}")
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs: write 1, 2, 4 or 8")
    return int(text)


def _gigabits(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no network: write its Gbit/s, such as 20 or 400")
    return value


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 0.4 or 40%")
    return value


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.2f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.2g} s"


if __name__ == "__main__":
    sys.exit(main())
