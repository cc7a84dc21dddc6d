"""What a training will take before it is started: bytes of memory, seconds of arithmetic, seconds of network.

All of it is calculation from the settings; nothing here is measured.
"""

import math
from dataclasses import dataclass

from model.config import LoraSettings
from model.gpt import CHUNK_LOGITS, DEFAULT_CHUNK_LOGITS, ModelConfig, block_parameters, count_parameters
from model.lora import count_adapter
from model.optimizer import POLAR_EXPRESS, OptimizerConfig
from model.training import BUCKET_MEGABYTES


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    vocab_size: int,
    *,
    micro_batch_sequences: int,
    activation_bytes: int = 2,
    recompute: bool = False,
    shards: int = 1,
    shares: int = 1,
    device: str = "cuda",
    lora: LoraSettings | None = None,
) -> Memory:
    """Peak of one training step: float32 weights, gradients and moments; activations in `activation_bytes` each.

    With `recompute` each block keeps its input, and one block at a time computes the rest again. `shards` is the number
    of ranks over which FSDP2 divides weights, gradients and moments. `shares` is the number of threads that share a
    micro-batch on a CPU (`SharedLoss`); each has its own gradients, logits and copy of the head, and all have one copy
    of the blocks' matrices. With `lora` only the adapter has gradients and moments.
    """
    parameters = count_parameters(model, vocab_size)
    adapter = 0 if lora is None else count_adapter(model, lora)
    trained = adapter or parameters
    matrices = model.num_layers * block_parameters(model)[0]
    moments = matrices + 2 * (parameters - matrices) if optimizer.kind == "muon" else 2 * trained
    head = vocab_size * model.width
    if shards > 1:
        # Gathered while in use: two blocks, because the next one is fetched meanwhile, and what belongs to no block.
        copies = (2 * matrices // model.num_layers + parameters - matrices) * activation_bytes
    else:
        # Under autocast every matrix has a copy in the activations' precision until the step ends.
        copies = (matrices + shares * head) * activation_bytes if activation_bytes < 4 else 0
    # Of a matrix in a block each share's gradient is in the activations' precision, and their sum in float32.
    rounded = (adapter or matrices) if shares > 1 and activation_bytes < 4 else 0
    tokens = micro_batch_sequences * model.context_length
    kept = model.num_layers * activations_per_token(model)
    if recompute:
        kept = model.num_layers * model.width + activations_per_token(model)
    limit = CHUNK_LOGITS.get(device, DEFAULT_CHUNK_LOGITS)
    chunk = min(tokens // shares, max(limit // vocab_size, 128)) * vocab_size
    return Memory(
        weights=4 * (parameters + adapter) // shards + copies,
        gradients=(4 * shares * (trained - rounded) + (4 + shares * activation_bytes) * rounded) // shards,
        optimizer=4 * moments // shards,
        activations=tokens * kept * activation_bytes,
        # One chunk's logits, their float32 copy and their gradient, and the head's gradient as it adds up.
        logits=shares * (chunk * (4 + 2 * activation_bytes) + (0 if adapter else 4 * head)),
    )


def activations_per_token(model: ModelConfig) -> int:
    """Count the numbers that one block keeps per token for the backward pass; attention keeps no T x T scores."""
    queries = model.num_heads * model.channels_per_head
    keys = model.kv_heads * model.channels_per_head
    norms = 4 * model.width  # both norms' inputs and outputs
    if model.is_modern:
        # The projections, queries and keys again after norm and rotation, attention's output; gate, up, product.
        return norms + (queries + 2 * keys) + (queries + keys) + queries + 3 * model.mlp_channels
    masks = 2 * model.width // 2 if model.dropout else 0  # a byte each
    return norms + 3 * queries + queries + 2 * model.mlp_channels + masks


def orthogonalisation_flops(model: ModelConfig) -> int:
    """FLOPs of Muon's orthogonalisation in one step, over all matrices."""
    queries = model.num_heads * model.channels_per_head
    keys = model.kv_heads * model.channels_per_head
    shapes = [(queries, model.width), (keys, model.width), (keys, model.width), (model.width, queries)]
    shapes += [(model.mlp_channels, model.width)] * (3 if model.is_modern else 2)
    total = 0
    for shape in shapes:
        short, long = min(shape), max(shape)
        total += len(POLAR_EXPRESS) * (4 * short * short * long + 2 * short**3)
    return model.num_layers * total


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on each of several devices: arithmetic, and the network's part that is not hidden by it."""

    compute: float
    gradients: float  # the whole all-reduce, most of which runs during the backward pass
    exposed: float  # what the step waits for: the last bucket, what the backward pass is too short for, Muon's gather

    @property
    def efficiency(self) -> float:
        return self.compute / (self.compute + self.exposed)


def estimate_step(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    vocab_size: int,
    *,
    flops: float,
    flops_per_second: float,
    devices: int,
    bytes_per_second: float,
    latency_seconds: float = 20e-6,
    lora: LoraSettings | None = None,
    graphs: bool = False,
) -> StepTime:
    """Estimate a step of `flops` divided over `devices` with DDP; `flops_per_second` is what one device reaches.

    Each of the n devices sends 2 (n-1)/n of the gradients' bytes (ring all-reduce), in buckets that start as soon
    as they are full. The backward pass is two thirds of the arithmetic; the last bucket is full only at its end.
    Muon orthogonalises 1/n of the matrices on each, then all gather the bfloat16 results. With `graphs` gradients are
    sent after the backward pass, and each device orthogonalises all matrices.
    """
    parameters = count_parameters(model, vocab_size) if lora is None else count_adapter(model, lora)  # with gradients
    matrices = model.num_layers * block_parameters(model)[0]
    muon = orthogonalisation_flops(model) if optimizer.kind == "muon" else 0
    compute = (flops / devices + muon / (1 if graphs else devices)) / flops_per_second
    if devices == 1:
        return StepTime(compute, 0.0, 0.0)
    share = (devices - 1) / devices
    buckets = math.ceil(4 * parameters / (BUCKET_MEGABYTES * 2**20))
    bucket_latency = 2 * math.log2(devices) * latency_seconds
    gradients = 2 * share * 4 * parameters / bytes_per_second + buckets * bucket_latency
    last_bucket = gradients / buckets
    if graphs:
        return StepTime(compute, gradients, gradients)
    backward = 2 / 3 * flops / devices / flops_per_second
    gather = share * 2 * matrices / bytes_per_second + bucket_latency if muon else 0.0
    return StepTime(compute, gradients, max(last_bucket, gradients - backward) + gather)
