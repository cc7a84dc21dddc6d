"""Training step speed beside transformers and litgpt, and beside the machine's own matrix products.

.venv/bin/python tests/benchmarks/train_step.py                              # 53M class, context 512, batch 4
.venv/bin/python tests/benchmarks/train_step.py --device cuda --context 1024 --batch 64
.venv/bin/python tests/benchmarks/train_step.py --family classic --width 768 --heads 12 --vocabulary 50257 --tied
.venv/bin/python tests/benchmarks/train_step.py --levers   # ours, with one thing after another left out

Every candidate runs in a process of its own, so that peak memory is its own, and on a CPU they take turns: forward,
loss, backward and a fused AdamW step on the same random tokens, eager and compiled.
README.md beside this file says how the peers are installed.
Long because the step, its peers and every lever stand side by side.
"""

import argparse
import gc
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor

# A script run by its path sees only its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import gpt, optimizer, training
from model.cpu import attention
from model.families import export_config
from model.gpt import GPT, ModelConfig, block_parameters, flops_per_token
from model.gpu_steps import use_flash_attention
from model.optimizer import OptimizerConfig, build_optimizer
from model.products import use_fast_products
from model.training import autocast, choose_precision, parallelize, train_step

STEPS_OF_A_TURN = {"cpu": 1, "cuda": 10}  # queued one behind the other, as in training; then waited for
PEERS = {"modern": ("transformers", "litgpt"), "classic": ("transformers",)}


class Batch:
    """The same tokens for every candidate, which `--documents` cuts into documents of random lengths."""

    def __init__(self, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        self.document_ids: torch.Tensor | None = None
        if options.documents:
            ends = torch.rand(options.batch, options.context, generator=generator) < 1 / options.documents
            self.document_ids = ends.cumsum(dim=1).int()
        shape = (options.batch, options.context + 1)
        rows = torch.randint(0, options.vocabulary, shape, generator=generator).to(options.device)
        self.tokens, self.targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def model_config(options: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        family=options.family,
        num_layers=options.layers,
        width=options.width,
        num_heads=options.heads,
        mlp_width=options.mlp_width,
        context_length=options.context,
        tie_embeddings=options.tied,
    )


def our_step(options: argparse.Namespace, is_compiled: bool) -> Callable[[], Any]:
    config, batch, precision = (
        model_config(options),
        Batch(options),
        choose_precision(options.precision, options.device),
    )
    model = GPT(config, options.vocabulary).to(options.device)
    module = parallelize(
        model,
        compile=is_compiled,
        precision=precision,
        recompute=options.recompute,
        graphs=options.graphs,
        pointwise=options.pointwise,
    )
    optimizer = build_optimizer(model, OptimizerConfig(kind=options.optimizer), total_steps=1000, precision=precision)
    tokens = batch.tokens.numel()
    gc.collect()
    gc.disable()  # as the training loop does
    return lambda: train_step(module, optimizer, [batch], step=1, global_tokens=tokens, precision=precision)


def peer_step(
    options: argparse.Namespace, model: torch.nn.Module, loss_of: Callable[[Batch], torch.Tensor]
) -> Callable[[], Any]:
    """The usual loop around a peer's model and loss."""
    batch, precision = Batch(options), choose_precision(options.precision, options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with autocast(options.device, precision):
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_step(options: argparse.Namespace, is_compiled: bool) -> Callable[[], Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = export_config(model_config(options), options.vocabulary)
    settings.pop("architectures")
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, use_cache=False)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(options.device).train()
    run = torch.compile(model, dynamic=False) if is_compiled else model
    # Its own loss, with the targets already shifted.
    return peer_step(
        options, model, lambda batch: run(batch.tokens, labels=batch.targets, shift_labels=batch.targets).loss
    )


def litgpt_step(options: argparse.Namespace, is_compiled: bool) -> Callable[[], Any]:
    from litgpt import GPT as LitGPT
    from litgpt import Config
    from litgpt.utils import chunked_cross_entropy

    ours = model_config(options)
    config = Config(
        n_layer=ours.num_layers,
        n_embd=ours.width,
        n_head=ours.num_heads,
        n_query_groups=ours.kv_heads,
        head_size=ours.channels_per_head,
        intermediate_size=ours.mlp_channels,
        block_size=ours.context_length,
        vocab_size=options.vocabulary,
        padded_vocab_size=options.vocabulary,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_qk=True,
        mlp_class_name="LLaMAMLP",
    )
    model = LitGPT(config).to(options.device).train()
    run = torch.compile(model, dynamic=False) if is_compiled else model
    return peer_step(options, model, lambda batch: chunked_cross_entropy(run(batch.tokens), batch.targets))


STEPS: dict[str, Callable[[argparse.Namespace, bool], Callable[[], Any]]] = {
    "ours": our_step,
    "transformers": transformers_step,
    "litgpt": litgpt_step,
}


# What can be left out of our step, one at a time, to see what it gives: each makes its change before the step is built.
LEVERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "all": lambda options: None,
    "no torch.compile": lambda options: vars(options).update(compiles=False),
    "float32": lambda options: vars(options).update(precision="float32"),
    "all logits at once": lambda options: gpt.CHUNK_LOGITS.update({torch.device(options.device).type: 2**62}),
    "AdamW in many kernels": lambda options: setattr(
        torch.optim,
        "AdamW",
        lambda *groups, adamw=torch.optim.AdamW, **named: adamw(*groups, **named | {"fused": False}),
    ),
    "garbage collector on": lambda options: setattr(gc, "disable", lambda: None),
    "activations computed again": lambda options: vars(options).update(recompute=True),
}
# With --documents: what the boundaries cost, and what they would with a mask.
DOCUMENT_LEVERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "no document boundaries": lambda options: vars(options).update(documents=0),
    "boundaries by a mask": lambda options: setattr(gpt.Attention, "find_document_attention", lambda *_: None),
}
CPU_LEVERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "PyTorch's attention": lambda options: setattr(attention, "pays", lambda *_: False),
    "each product divided among cores": lambda options: setattr(training, "MAX_SHARES", 1),
    "freed memory given back": lambda options: setattr(training, "keep_freed_memory", lambda: None),
}
# What may give something and is not what a training does by itself.
GPU_LEVERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "each micro-batch one graph, the update one": lambda options: vars(options).update(graphs=True),
    "Liger's norms, residual and SwiGLU": lambda options: vars(options).update(pointwise="liger"),
    "FlashAttention 3": lambda options: use_flash_attention("3"),
    "FlashAttention 4": lambda options: use_flash_attention("4"),
    "products by Triton, SwiGLU in their epilogue": lambda options: setattr(inductor, "max_autotune_gemm", True),
}
GPU_MUON_LEVERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "orthogonalised in float32": lambda options: setattr(
        optimizer, "_orthogonalisation_dtype", lambda device, precision: torch.float32
    ),
}


def levers_of(options: argparse.Namespace) -> dict[str, Callable[[argparse.Namespace], None]]:
    levers = LEVERS | (DOCUMENT_LEVERS if options.documents else {})
    if torch.device(options.device).type == "cpu":
        levers |= CPU_LEVERS
    else:
        levers |= GPU_LEVERS | (GPU_MUON_LEVERS if options.optimizer == "muon" else {})
    chosen = options.only.split(",") if options.only else levers
    return {name: lever for name, lever in levers.items() if name == "all" or name in chosen}


def matmul_step(options: argparse.Namespace) -> Callable[[], float]:
    """The step's own matrix products and nothing else, every shape, forward and both gradients; returns seconds."""
    config = model_config(options)
    dtype = choose_precision(options.precision, options.device)
    rows = options.batch * options.context
    in_a_row = STEPS_OF_A_TURN[torch.device(options.device).type]
    if options.device == "cpu":
        use_fast_products()

    def time_product(left: torch.Tensor, right: torch.Tensor) -> float:
        durations = []
        torch.mm(left, right)
        for _ in range(3):
            wait_for(options.device)
            start = time.perf_counter()
            for _ in range(in_a_row):
                torch.mm(left, right)
            wait_for(options.device)
            durations.append((time.perf_counter() - start) / in_a_row)
        return statistics.median(durations)

    def step() -> float:
        seconds = 0.0
        for inputs, outputs, count in matrix_shapes(config, options.vocabulary):
            x = torch.randn(rows, inputs, device=options.device, dtype=dtype)
            weight = torch.randn(outputs, inputs, device=options.device, dtype=dtype)
            gradient = torch.randn(rows, outputs, device=options.device, dtype=dtype)
            products = [(x, weight.t()), (gradient, weight), (gradient.t(), x)]
            seconds += count * sum(time_product(left, right) for left, right in products)
        return seconds

    return step


def matrix_shapes(config: ModelConfig, vocabulary: int) -> list[tuple[int, int, int]]:
    """Inputs, outputs, and how many of them the model has."""
    heads = config.num_heads * config.channels_per_head
    keys = config.kv_heads * config.channels_per_head
    inner = config.mlp_channels
    return [
        (config.width, heads + 2 * keys, config.num_layers),
        (heads, config.width, config.num_layers),
        (config.width, 2 * inner if config.is_modern else inner, config.num_layers),
        (inner, config.width, config.num_layers),
        (config.width, vocabulary, 1),
    ]


def wait_for(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def run_candidate(options: argparse.Namespace) -> None:
    """Take a turn for every line that comes in, and answer with a step's seconds; at the end, with the gigabytes."""
    kind = torch.device(options.device).type
    name, mode, lever = [*options.candidate.split("/"), "", ""][:3]
    options.compiles = mode == "compiled"
    if lever:
        levers_of(options)[lever](options)
    step = matmul_step(options) if name == "matmul" else STEPS[name](options, options.compiles)
    for _ in sys.stdin:
        if name == "matmul":
            seconds = step()
        else:
            start = time.perf_counter()
            for _ in range(STEPS_OF_A_TURN[kind]):
                step()
            wait_for(options.device)
            seconds = (time.perf_counter() - start) / STEPS_OF_A_TURN[kind]
        print(json.dumps(seconds), flush=True)
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = torch.cuda.max_memory_allocated() if kind == "cuda" else resident
    print(json.dumps(memory / 1e9), flush=True)


def missing_peers(family: str) -> list[str]:
    return [name for name in PEERS[family] if importlib.util.find_spec(name) is None]


class Candidate:
    """This script again, with the same options, in a process that takes a step when it is told to."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--candidate", name]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.first_seconds = self.step()
        self.step()
        self.seconds: list[float] = []

    def step(self) -> float:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def finish(self) -> float:
        """End the process; returns the gigabytes it took at most."""
        assert self.process.stdin
        self.process.stdin.close()
        memory = self._read()
        self.process.wait()
        return memory

    def _read(self) -> float:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit status {self.process.wait()}")
        return json.loads(line)


@dataclass(frozen=True)
class Speed:
    seconds: float  # a step's, the median
    gigabytes: float
    compile_seconds: float  # the first turn over the later ones


def measure(options: argparse.Namespace, names: list[str]) -> dict[str, Speed]:
    """Let all take turns on a CPU, whose speed changes from minute to minute; one after another on a GPU, whose memory
    would be shared.
    """
    groups = [[name] for name in names] if torch.device(options.device).type == "cuda" else [names]
    speeds = {}
    for group in groups:
        candidates = [Candidate(name) for name in group]
        for _ in range(options.steps):
            for candidate in candidates:
                candidate.seconds.append(candidate.step())
        for candidate in candidates:
            memory, typical = candidate.finish(), statistics.median(candidate.seconds)
            in_a_turn = STEPS_OF_A_TURN[torch.device(options.device).type]
            speeds[candidate.name] = Speed(typical, memory, max(candidate.first_seconds - typical, 0.0) * in_a_turn)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="modern", choices=("modern", "classic"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--mlp-width", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument(
        "--steps", type=int, default=3, help="timed turns, of one step on a CPU and ten on a GPU; the median counts"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"), help="ours; the peers have AdamW")
    parser.add_argument("--recompute", action="store_true", help="ours computes activations again")
    parser.add_argument(
        "--graphs", action="store_true", help="on a GPU: ours launches each micro-batch, and the update, as one graph"
    )
    parser.add_argument(
        "--pointwise", choices=("torch", "liger"), default="torch", help="on a GPU: kernels of our passes"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--levers", action="store_true", help="ours without one lever after another, in place of peers")
    parser.add_argument("--only", help="these levers alone, with commas between them")
    parser.add_argument(
        "--documents", type=int, default=0, help="boundaries of documents of so many tokens on average; 0: none"
    )
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.candidate:
        run_candidate(options)
        return
    config = model_config(options)
    precision = str(choose_precision(options.precision, options.device)).removeprefix("torch.")
    print(
        f"{options.family}, {config.num_layers} layers, width {config.width}, vocabulary {options.vocabulary:,},"
        f" batch {options.batch} x {options.context}, {precision} on {options.device},"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(json.dumps(compare_levers(options) if options.levers else compare_peers(options)))


def compare_peers(options: argparse.Namespace) -> dict[str, Any]:
    config = model_config(options)
    flops = flops_per_token(config, options.vocabulary)
    matrices = config.num_layers * block_parameters(config)[0] + options.vocabulary * config.width
    print(f"FLOPs per token: {flops:,} = 6 x {matrices:,} matrix weights + 12 L H D T of attention (PaLM's count)")
    missing = missing_peers(options.family)
    modes = options.modes.split(",")
    names = [f"{name}/{mode}" for name in ("ours", *PEERS[options.family]) if name not in missing for mode in modes]
    tokens = options.batch * options.context
    speeds = measure(options, ["matmul", *names])
    results = {
        name: {
            "tokens_per_second": tokens / speeds[name].seconds,
            "milliseconds_per_step": 1000 * speeds[name].seconds,
            "peak_memory_gigabytes": speeds[name].gigabytes,
            "compile_seconds": speeds[name].compile_seconds if name.endswith("compiled") else 0.0,
        }
        for name in names
    }
    limit = tokens / speeds["matmul"].seconds
    rate = 6 * matrices * limit
    print(f"matrix products of the step alone: {rate / 1e9:,.0f} GFLOP/s, which would be {limit:,.0f} tokens/s\n")
    print(f"{'':24}{'tokens/s':>12}{'ms/step':>10}{'of limit':>10}{'MFU*':>8}{'GB':>8}{'compile s':>11}")
    for name, found in results.items():
        speed = found["tokens_per_second"]
        print(
            f"{name.replace('/', ', '):24}{speed:12,.0f}{found['milliseconds_per_step']:10,.0f}{speed / limit:10.1%}"
            f"{speed * flops / rate:8.1%}{found['peak_memory_gigabytes']:8.2f}{found['compile_seconds']:11.0f}"
        )
    for name in missing:
        print(f"{name:24}{'not installed':>12}")
    print("* of the measured matrix rate, attention's FLOPs included; GPU makers' peaks are in jobs/plan.py")

    ours = max((r for n, r in results.items() if n.startswith("ours/")), key=lambda r: r["tokens_per_second"])
    peers = {n: r["tokens_per_second"] for n, r in results.items() if not n.startswith("ours/")}
    best_peer = max(peers, key=lambda n: peers[n]) if peers else None
    return {
        "tokens_per_second": round(ours["tokens_per_second"], 1),
        "ratio_to_best_peer": round(ours["tokens_per_second"] / peers[best_peer], 3) if best_peer else None,
        "best_peer": best_peer,
        "missing_peers": missing,
        "fraction_of_matmul_limit": round(ours["tokens_per_second"] / limit, 3),
        "matmul_gigaflops_per_second": round(rate / 1e9, 1),
        "model_flops_per_token": flops,
        "peak_memory_gigabytes": round(ours["peak_memory_gigabytes"], 3),
        "compile_seconds": round(ours["compile_seconds"], 1),
        "candidates": {n: {k: round(v, 3) for k, v in r.items()} for n, r in results.items()},
    }


def compare_levers(options: argparse.Namespace) -> dict[str, Any]:
    tokens = options.batch * options.context
    speeds = measure(options, [f"ours/compiled/{lever}" for lever in levers_of(options)])
    whole = speeds["ours/compiled/all"].seconds
    print(f"\n{'':36}{'tokens/s':>12}{'ms/step':>10}{'of all':>8}{'GB':>8}")
    figures = {}
    for name, speed in speeds.items():
        lever = name.rpartition("/")[2]
        print(
            f"{lever:36}{tokens / speed.seconds:12,.0f}{1000 * speed.seconds:10,.1f}{whole / speed.seconds:8.2f}"
            f"{speed.gigabytes:8.2f}"
        )
        figures[lever] = {
            "tokens_per_second": round(tokens / speed.seconds, 1),
            "ratio_to_all": round(whole / speed.seconds, 3),
            "peak_memory_gigabytes": round(speed.gigabytes, 3),
        }
    return {"levers": figures}


if __name__ == "__main__":
    main()
