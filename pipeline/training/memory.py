"""Out of memory: how it is recognised, what a training was estimated to take, and which settings help."""

import psutil
import torch

from model.budget import Memory, estimate_memory
from model.training import choose_precision, count_shares
from pipeline.training.plan import TrainingPlan


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def explain_out_of_memory(error: BaseException, plan: TrainingPlan, device: torch.device, world_size: int) -> str:
    """Say in one sentence what a worker ran out of, and what to set."""
    options = plan.train
    alone = device.type == "cpu" and world_size == 1
    sequences = options.micro_batch_sequences
    memory = estimate_memory(
        plan.model,
        plan.optimizer,
        plan.vocab_size,
        micro_batch_sequences=sequences,
        activation_bytes=choose_precision(options.precision, device.type).itemsize,
        recompute=options.recompute_activations,
        shards=world_size if options.sharding == "fsdp" else 1,
        shares=count_shares(torch.get_num_threads(), sequences, plan.model.dropout) if alone else 1,
        device=device.type,
        lora=options.lora,
    )
    if device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(device).total_memory
    else:
        device_bytes = psutil.virtual_memory().total
    return (
        f"Out of memory: {str(error).strip().splitlines()[0][:200].rstrip('.')}. The estimate of `jobs.plan` is"
        f" {memory.total / 1e9:.2f} GB, of which {advise_out_of_memory(memory, sequences, device_bytes)}"
    )


def advise_out_of_memory(memory: Memory, micro_batch_sequences: int, device_bytes: int) -> str:
    """Name the settings that help: the batch's, or the model's where it does not fit whatever the batch."""
    growing = memory.activations + memory.logits
    fixed = memory.total - growing
    if fixed > device_bytes:
        return (
            f"{fixed / 1e9:.2f} GB are weights, gradients and moments, whatever the batch, and there are"
            f" {device_bytes / 1e9:.2f} GB: use more workers with train.sharding=fsdp, or lower model.num_layers,"
            " model.width or model.mlp_width."
        )
    lower = ": lower that first, the result stays the same; then" if micro_batch_sequences > 1 else ":"
    return (
        f"{growing / 1e9:.2f} GB grow with train.micro_batch_sequences, now {micro_batch_sequences}{lower} set"
        " train.recompute_activations=true or train.precision=bfloat16, use more workers with train.sharding=fsdp, or"
        " lower model.context_length."
    )
