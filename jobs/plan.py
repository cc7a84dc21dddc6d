"""Say what a preset will take before anyone pays for it: parameters, memory, FLOPs, tokens, hours on a GPU.

    python -m jobs.plan jobs/presets/gpt-53m.yaml --gpu h100 [--mfu 0.4] [section.key=value ...]

Nothing is measured and nothing is started: these are calculations, and each says from what.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.command import Command

if TYPE_CHECKING:
    from pipeline.config import Config


@dataclass(frozen=True)
class Gpu:
    """Makers' figures: dense bfloat16 FLOP/s, memory, and bytes/s of one GPU to its neighbours and to other nodes."""

    flops_per_second: float
    memory_gigabytes: float
    link_bytes_per_second: float
    network_bytes_per_second: float


# Within a node NVLink, one direction, or PCIe; between nodes 400 Gbit/s a GPU where that is usual, else less.
GPUS = {
    "b200": Gpu(2.25e15, 180, 900e9, 50e9),
    "h200": Gpu(989e12, 141, 450e9, 50e9),
    "h100": Gpu(989e12, 80, 450e9, 50e9),
    "a100": Gpu(312e12, 80, 300e9, 25e9),
    "l40s": Gpu(362e12, 48, 25e9, 12.5e9),
    "l4": Gpu(121e12, 24, 12e9, 3e9),
    "a10": Gpu(125e12, 24, 12e9, 3e9),
    "rtx4090": Gpu(165e12, 24, 20e9, 3e9),
}
NAMED_VOCABULARIES = {"gpt2": 50_257, "r50k_base": 50_257, "cl100k_base": 100_277, "o200k_base": 200_019}
GPUS_PER_NODE = 8
NETWORK_SHARE = 0.8  # of the nominal bandwidth, as all-reduce reaches it


def run(config: "Config", options: argparse.Namespace) -> None:
    from model.budget import estimate_memory, estimate_step, orthogonalisation_flops
    from model.gpt import count_parameters, flops_per_token

    gpu, model, train = GPUS[options.gpu], config.model, config.train
    vocab_size = NAMED_VOCABULARIES.get(config.tokenizer.kind, config.tokenizer.vocabulary_size)
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
    workers = train.num_workers if isinstance(train.num_workers, int) else train.num_workers[0]
    shards = workers if train.sharding == "fsdp" else 1
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
    if memory.total < 0.9e9 * gpu.memory_gigabytes:
        verdict = "fits"
    elif memory.weights + memory.gradients + memory.optimizer < 0.9e9 * gpu.memory_gigabytes:
        verdict = "does not fit: lower train.micro_batch_sequences, or set train.recompute_activations=true"
    else:
        verdict = "does not fit, whatever the batch: use more workers with train.sharding=fsdp, or a smaller model"
    print(f"  {'in all':<18}{memory.total / 1e9:>12.2f} GB  {verdict} ({options.gpu}: {gpu.memory_gigabytes:.0f} GB)")

    print(
        f"\n{options.gpu} at {options.mfu:.0%} of its {gpu.flops_per_second / 1e12:,.0f} TFLOP/s (an assumption: --mfu)"
    )
    print(f"  {'GPUs':>4}{'s/step':>10}{'tokens/s':>14}{'efficiency':>12}{'hours':>10}{'GPU-hours':>11}")
    for devices in (1, 8, 64):
        # Micro-batches of one sequence at least: no more GPUs than sequences can work.
        if devices > train.batch_tokens // model.context_length:
            print(f"  {devices:>4}  more GPUs than sequences in a batch ({train.batch_tokens // model.context_length})")
            continue
        nominal = gpu.link_bytes_per_second if devices <= GPUS_PER_NODE else gpu.network_bytes_per_second
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
            f"{hours:>10.2f}{hours * devices:>11.2f}"
        )
    print(
        f"\nScaling is a calculation for DDP at the same global batch: {4 * parameters / 1e6:,.0f} MB of gradients by"
        f"\nring all-reduce, behind the backward pass but for the last 25 MB bucket, at {NETWORK_SHARE:.0%} of"
        f" {gpu.link_bytes_per_second / 1e9:,.0f} GB/s within"
        f"\na node of {GPUS_PER_NODE} and {gpu.network_bytes_per_second / 1e9:,.1f} GB/s a GPU between nodes."
        " Evaluation, start-up and data are not in it."
    )
    if config.optimizer.kind == "muon":
        share = orthogonalisation_flops(model) / (flops * train.batch_tokens)
        print(f"Muon's orthogonalisation adds {share:.1%} of FLOPs, divided over the GPUs and gathered in bfloat16.")


def main(argv: Sequence[str] | None = None) -> int:
    command = Command(__doc__)
    command.parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="[%(default)s]")
    command.parser.add_argument(
        "--mfu", type=_share, default=0.4, help="share of the peak that training reaches [%(default)s]"
    )
    return command.main(run, argv)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
