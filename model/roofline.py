"""What one training step takes on a GPU, part by part, so that a measured step can be laid beside it.

    for part in roofline(model, optimizer, vocab_size, tokens=262_144, micro_batches=4, gpu=find_gpu("h100")): ...

All of it is calculation: FLOPs over a share of the peak, bytes over a share of the memory's bandwidth. The shares are
assumptions, or from where they say; nothing here was measured.

T: context   C: width   L: layers   H x D: channels of the queries   K x D: of keys   M: of the MLP   V: vocabulary
"""

from dataclasses import dataclass

from model.budget import orthogonalisation_flops
from model.config import ModelConfig, OptimizerConfig
from model.gpt import block_parameters, count_parameters
from model.gpus import Gpu

# Assumed: what products of 16 bits reach of the peak. Narrow matrices are bound by memory, and by a last wave of tiles
# that fills the GPU in part.
PRODUCT_SHARES = ((512, 0.58), (768, 0.66), (1024, 0.70), (1 << 30, 0.75))
ATTENTION_SHARE = 0.35  # read: FlashAttention-2 on an H100, "only 35% utilization" (arXiv:2407.08608, abstract)
BANDWIDTH_SHARE = 0.85  # assumed: a pass that reads and writes, of the data sheet's bandwidth
# Assumed: one kernel's launch through compiled code.
LAUNCH_SECONDS = 6e-6
# Kernels of one block beside attention, as inductor makes them (model/README.md): Triton's and products, both passes.
KERNELS_OF_A_BLOCK = {"modern": 9 + 4 + 14 + 8 + 4, "classic": 10 + 4 + 15 + 8 + 4}


@dataclass(frozen=True)
class Part:
    """Seconds of one step that one kind of work takes, and the formula that they are from."""

    name: str
    seconds: float
    formula: str


def roofline(
    model: ModelConfig, optimizer: OptimizerConfig, vocab_size: int, *, tokens: int, micro_batches: int, gpu: Gpu
) -> list[Part]:
    """Calculate the parts of a step of `tokens` on one GPU, in bfloat16."""
    product_rate = gpu.flops_per_second * product_share(model.width)
    bandwidth = gpu.memory_bytes_per_second * BANDWIDTH_SHARE
    matrices = model.num_layers * block_parameters(model)[0]
    products = 6 * matrices * tokens / product_rate
    pointwise = 2 * model.num_layers * pointwise_numbers(model) * tokens / bandwidth
    # Logits are written, read with the loss, and their gradient written, in 16 bits; the products read them besides.
    head = 6 * vocab_size * model.width * tokens / product_rate + 3 * 2 * vocab_size * tokens / bandwidth
    channels = model.num_heads * model.channels_per_head
    # Forward 4 T H D, half of it causal; backward computes the scores again: 2.5 times as much.
    attention_flops = 3.5 * 2 * model.context_length * channels * model.num_layers * tokens
    attention = attention_flops / (ATTENTION_SHARE * gpu.flops_per_second)
    return [
        Part("products", products, f"6 FLOPs x {matrices:,} weights at {product_share(model.width):.0%} of the peak"),
        Part("pointwise", pointwise, f"{pointwise_numbers(model):,} numbers a token and layer, of 2 bytes"),
        Part("head and loss", head, "6 V C FLOPs, and the logits written, read, and their gradient written"),
        Part("attention", attention, f"7 T H D L FLOPs at {ATTENTION_SHARE:.0%} of the peak"),
        Part("rest", rest_seconds(model, optimizer, vocab_size, tokens, micro_batches, gpu), "weights and embedding"),
    ]


def product_share(width: int) -> float:
    return next(share for widest, share in PRODUCT_SHARES if width <= widest)


def pointwise_numbers(model: ModelConfig) -> int:
    """Numbers that the fused passes of a block read and write for each token, forward and backward.

    Modern, forward: norm 2 C; queries and keys normed and turned, 2 (H + K) D; sum and norm 4 C; gate 3 M; sum 3 C.
    Backward each pass reads its input again beside the gradient: norms 8 C, queries and keys 3 (H + K) D, gate 6 M, and
    sums 6 C. Classic: no turning, GELU 2 M forward and 3 M backward, biases' sums (H + 2 K) D + C + M more.
    """
    queries = model.num_heads * model.channels_per_head
    keys = model.kv_heads * model.channels_per_head
    sums_and_norms = (2 + 4 + 3 + 8 + 6) * model.width
    if model.is_modern:
        return sums_and_norms + 5 * (queries + keys) + 9 * model.mlp_channels
    return sums_and_norms + 5 * model.mlp_channels + queries + 2 * keys + model.width + model.mlp_channels


def rest_seconds(
    model: ModelConfig, optimizer: OptimizerConfig, vocab_size: int, tokens: int, micro_batches: int, gpu: Gpu
) -> float:
    """The optimizer, the copies of weights in 16 bits, and the embedding's rows."""
    parameters = count_parameters(model, vocab_size)
    bandwidth = gpu.memory_bytes_per_second * BANDWIDTH_SHARE
    # Weight, gradient and two moments read, weight and moments written, the norm's pass over the gradient: float32.
    optimizer_bytes = 8 * 4 * parameters
    copies = micro_batches * (4 + 2 + 4 + 4) * parameters  # read and cast, and gradients added up
    embedding = tokens * model.width * (2 + 2 + 2 + 4)  # rows read and written, gradients read and added
    muon = orthogonalisation_flops(model) / (0.5 * gpu.flops_per_second) if optimizer.kind == "muon" else 0.0
    return (optimizer_bytes + copies + embedding) / bandwidth + muon


# Of a step with graphs, counted: the copies to where each micro-batch's graph reads, and what lies between graphs.
LAUNCHES_OF_A_GRAPH, LAUNCHES_BESIDE_GRAPHS = 6, 10


def launch_seconds(model: ModelConfig, micro_batches: int, graphs: bool = False) -> float:
    """What the host needs to start a step's kernels: hidden behind the GPU's work unless it is longer."""
    if graphs:
        return (micro_batches * LAUNCHES_OF_A_GRAPH + LAUNCHES_BESIDE_GRAPHS) * LAUNCH_SECONDS
    return micro_batches * (model.num_layers * KERNELS_OF_A_BLOCK[model.family] + 40) * LAUNCH_SECONDS
