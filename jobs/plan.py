"""Say what a preset will take before anyone pays for it: parameters, memory, FLOPs, tokens, hours on a GPU.

    python -m jobs.plan jobs/presets/gpt-53m.yaml --gpu h100 [--mfu 0.4] [section.key=value ...]
    python -m jobs.plan jobs/presets/gpt-53m.yaml --gpu l40s --gpus-per-node 1 --network-gigabits 20 [--json]

Nothing is measured and nothing is started: these are calculations, and each says from what.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jobs.command import Command, print_json
from model.gpus import GPUS, Gpu, find_gpu

if TYPE_CHECKING:
    from pipeline.config import Config


GPU_COUNTS = (1, 8, 64)
NETWORK_SHARE = 0.8  # of the nominal bandwidth, as all-reduce reaches it


def calculate(config: "Config", options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the plan, by name, with their units."""
    from model.budget import estimate_memory, estimate_step, orthogonalisation_flops
    from model.gpt import count_parameters, flops_per_token
    from model.lora import count_adapter
    from model.roofline import BANDWIDTH_SHARE, launch_seconds, roofline
    from pipeline.training.memory import advise_out_of_memory

    gpu, model, train = options.gpu, config.model, config.train
    vocab_size = config.tokenizer.most_tokens
    parameters = count_parameters(model, vocab_size)
    trained = parameters if train.lora is None else count_adapter(model, train.lora)
    flops = flops_per_token(model, vocab_size, is_frozen=train.lora is not None)
    embedding = vocab_size * model.width
    head = 0 if model.tie_embeddings else embedding
    shards = train.fewest_workers if train.sharding == "fsdp" else 1
    memory = estimate_memory(
        model,
        config.optimizer,
        vocab_size,
        micro_batch_sequences=train.micro_batch_sequences,
        activation_bytes=2 if train.precision != "float32" else 4,
        recompute=train.recompute_activations,
        shards=shards,
        lora=train.lora,
    )
    usable_bytes = int(0.9e9 * gpu.memory_gigabytes)  # the rest is the driver's, and lost between allocations
    fits = memory.total < usable_bytes
    per_node = options.gpus_per_node
    network = gpu.network_bytes_per_second
    if options.network_gigabits is not None:
        network = options.network_gigabits * 1e9 / 8 / per_node
    micro_batches = math.ceil(train.batch_tokens / model.context_length / train.micro_batch_sequences)
    parts = roofline(
        model, config.optimizer, vocab_size, tokens=train.batch_tokens, micro_batches=micro_batches, gpu=gpu
    )
    graphs = train.cuda_graphs and train.sharding != "fsdp"
    rows = []
    for devices in GPU_COUNTS:
        # Micro-batches of one sequence at least: no more GPUs than sequences can work.
        if devices > train.batch_tokens // model.context_length:
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
            lora=train.lora,
            graphs=graphs,
        )
        seconds = step.compute + step.exposed
        rows.append(
            {
                "gpus": devices,
                "seconds_per_step": seconds,
                "tokens_per_second": train.batch_tokens / seconds,
                "efficiency": step.efficiency,
                "hours": train.minutes / 60 or train.steps * seconds / 3600,
                "gpu_hours": devices * (train.minutes / 60 or train.steps * seconds / 3600),
            }
        )
    # Where minutes count, as many steps as one GPU makes in them.
    steps = max(1, round(60 * train.minutes / rows[0]["seconds_per_step"])) if train.minutes else train.steps
    tokens = steps * train.batch_tokens
    return {
        "name": config.name,
        "family": model.family,
        "num_layers": model.num_layers,
        "width": model.width,
        "vocabulary_size": vocab_size,
        "parameters": parameters,
        "trained_parameters": trained,
        "embedding_parameters": embedding,
        "head_parameters": head,
        "other_parameters": parameters - embedding - head,
        "steps": steps,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "flops_per_token": flops,
        "flops": tokens * flops,
        "orthogonalisation_flops_share": (
            orthogonalisation_flops(model) / (flops * train.batch_tokens) if config.optimizer.kind == "muon" else 0.0
        ),
        "gpu": gpu.name,
        "gpu_memory_gigabytes": gpu.memory_gigabytes,
        "gpu_flops_per_second": gpu.flops_per_second,
        "gpu_memory_bytes_per_second": gpu.memory_bytes_per_second,
        "memory_bandwidth_share": BANDWIDTH_SHARE,
        "step_tokens": train.batch_tokens,
        "step_parts": [asdict(part) for part in parts],
        "step_launch_seconds": launch_seconds(model, micro_batches, graphs),
        "graphs": graphs,
        "mfu": options.mfu,
        "gpus_that_share_the_model": shards,
        "memory_bytes": asdict(memory) | {"total": memory.total},
        "fits": fits,
        "advice": "" if fits else advise_out_of_memory(memory, train.micro_batch_sequences, usable_bytes),
        "gpus_per_node": per_node,
        "bytes_per_second_within_a_node": gpu.link_bytes_per_second,
        "bytes_per_second_between_nodes": network,
        "most_gpus": train.batch_tokens // model.context_length,
        "speeds": rows,
    }


def run(config: "Config", options: argparse.Namespace) -> None:
    plan = calculate(config, options)
    if options.json:
        print_json(plan)
    else:
        describe(config, plan)


def describe(config: "Config", plan: Mapping[str, Any]) -> None:
    from model.training import BUCKET_MEGABYTES

    train = config.train
    parameters, gpu, shards = plan["parameters"], plan["gpu"], plan["gpus_that_share_the_model"]
    print(f"{plan['name']}: {plan['family']}, {plan['num_layers']} layers, width {plan['width']},"
          f" vocabulary {plan['vocabulary_size']:,}\n")  # fmt: skip

    print(f"parameters          {parameters:>16,}")
    print(f"  embedding         {plan['embedding_parameters']:>16,}")
    print(f"  head              {plan['head_parameters']:>16,}" + " (tied)" * config.model.tie_embeddings)
    print(f"  all else          {plan['other_parameters']:>16,}")
    print(f"tokens              {plan['tokens']:>16,}  = {plan['steps']:,} steps x {train.batch_tokens:,};"
          f" {plan['tokens_per_parameter']:.1f} per parameter")  # fmt: skip
    trained, per_weight = plan["trained_parameters"], "6 per matrix weight"
    if train.lora is not None:
        per_weight = "4 per matrix weight, which stays,"
        print(f"trained             {trained:>16,}  = {trained / parameters:.2%}: factors of rank {train.lora_rank}")
    print(f"FLOPs per token     {plan['flops_per_token']:>16,}  = {per_weight} + 12 L H D T (PaLM, appendix B)")
    print(f"FLOPs in all        {plan['flops']:>16.3g}")

    holder = f"one GPU of {shards} that share the model" if shards > 1 else "one GPU"
    micro_batch = f"{train.micro_batch_sequences} x {config.model.context_length}"
    print(f"\nmemory of {holder}, micro-batches of {micro_batch} tokens")
    memory = plan["memory_bytes"]
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        print(f"  {name:<18}{memory[name] / 1e9:>12.2f} GB")
    verdict = "fits" if plan["fits"] else "does not fit"
    print(
        f"  {'in all':<18}{memory['total'] / 1e9:>12.2f} GB  {verdict} ({gpu}: {plan['gpu_memory_gigabytes']:.0f} GB)"
    )
    if plan["advice"]:
        print(f"  {plan['advice']}")

    describe_step(plan)
    peak = plan["gpu_flops_per_second"] / 1e12
    print(f"\n{gpu} at {plan['mfu']:.0%} of its {peak:,.0f} TFLOP/s (an assumption: --mfu)")
    print(f"  {'GPUs':>4}{'s/step':>10}{'tokens/s':>14}{'efficiency':>12}{'time':>10}{'GPU time':>11}")
    for row in plan["speeds"]:
        print(
            f"  {row['gpus']:>4}{row['seconds_per_step']:>10.4f}{row['tokens_per_second']:>14,.0f}"
            f"{row['efficiency']:>12.1%}{_duration(row['hours']):>10}{_duration(row['gpu_hours']):>11}"
        )
    for devices in GPU_COUNTS[len(plan["speeds"]) :]:
        print(f"  {devices:>4}  more GPUs than sequences in a batch ({plan['most_gpus']})")
    if train.sharding == "fsdp":
        traffic = (
            "FSDP gathers the weights twice a step in bfloat16 and scatters the gradients once in float32:\n"
            f"together as many bytes as DDP's all-reduce of {4 * parameters / 1e6:,.0f} MB."
            " Most of it overlaps with arithmetic"
        )
    elif plan["graphs"]:
        traffic = (
            f"The GPUs sum {4 * trained / 1e6:,.0f} MB of gradients in every step by ring all-reduce,"
            "\nall at once between the graphs of the passes and of the update"
        )
    else:
        traffic = (
            f"DDP sums {4 * trained / 1e6:,.0f} MB of gradients in every step by ring all-reduce, in buckets of"
            f" {BUCKET_MEGABYTES} MB.\nBuckets are sent while the backward pass goes on; a step waits for the last one"
        )
    per_node, link = plan["gpus_per_node"], plan["bytes_per_second_within_a_node"]
    within = f"{link / 1e9:,.0f} GB/s within a node of {per_node}, and of " if per_node > 1 else ""
    between = plan["bytes_per_second_between_nodes"]
    print(
        f"\nAll rows have the same global batch.\n{traffic}."
        f"\nAssumed: {NETWORK_SHARE:.0%} of {within}{between / 1e9:,.2f} GB/s per GPU between nodes."
        "\nEvaluation, start-up and reading data are not counted."
    )
    if share := plan["orthogonalisation_flops_share"]:
        whose = "on each GPU" if plan["graphs"] else "divided over the GPUs and gathered in bfloat16"
        print(f"Muon's orthogonalisation adds {share:.1%} of FLOPs, {whose}.")


def describe_step(plan: Mapping[str, Any]) -> None:
    """Say what a step takes by part, for a measured one to be laid beside it."""
    tokens, parts = plan["step_tokens"], plan["step_parts"]
    seconds = sum(part["seconds"] for part in parts)
    print(f"\na step of {tokens:,} tokens on one {plan['gpu']} by part, in bfloat16 (sources: model/roofline.py)")
    for part in parts:
        share = part["seconds"] / seconds
        print(f"  {part['name']:<18}{1000 * part['seconds']:>10.1f} ms {share:>5.0%}  {part['formula']}")
    mfu = plan["flops_per_token"] * tokens / seconds / plan["gpu_flops_per_second"]
    bandwidth = f"{plan['memory_bandwidth_share']:.0%} of {plan['gpu_memory_bytes_per_second'] / 1e12:.2f} TB/s"
    print(f"  {'in all':<18}{1000 * seconds:>10.1f} ms        {tokens / seconds:,.0f} tokens/s, MFU {mfu:.0%};"
          f" {bandwidth} assumed")  # fmt: skip
    launches = plan["step_launch_seconds"]
    bound = "longer than the GPU's work: a step waits for the host" if launches > seconds else "hidden behind them"
    print(f"  {'launches':<18}{1000 * launches:>10.1f} ms        {bound}")


def main(argv: Sequence[str] | None = None) -> int:
    command = Command(__doc__, only_calculates=True)
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
    command.parser.add_argument("--json", action="store_true", help="print JSON, for another program")
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
