"""One optimizer step, on one device or many: accumulation, mixed precision, and gradients averaged over the ranks.

module = parallelize(model, strategy="ddp", compile=True)       # before build_optimizer
measures = train_step(module, optimizer, micro_batches, step=step, global_tokens=262_144)
loss, gradient_norm = measures.read()   # waits for that step, so read it after the next one was started
"""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from model.config import ModelConfig
from model.documents import Documents, find_documents, split_documents
from model.gpt import GPT, Block, chunked_cross_entropy, cross_entropy_gradient
from model.gpu_steps import GraphedGradients, GraphedUpdate, clip
from model.liger import liger_passes
from model.optimizer import Optimizer
from model.products import use_fast_products
from model.rounded_blocks import AddGradients, RoundedBlocks, add_gradients

STRATEGIES = ("none", "ddp", "fsdp")

# A CPU without such units (AVX-512 BF16 or AMX) emulates bfloat16, ten times slower than float32.
HAS_BFLOAT16_UNITS = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

# DDP sends a bucket of gradients as soon as the backward pass has filled it. 25 MB, PyTorch's default, holds about
# four layers of a 50M model: it is full early, and large enough to use the network's whole bandwidth.
BUCKET_MEGABYTES = 25
MAX_SHARES = 4  # of a micro-batch on a CPU: each share holds gradients of all weights
# How a process that trains on a CPU should start: with one heap for all threads (`keep_freed_memory`), and
# OpenMP's waiting for each other awake only briefly. By itself a thread looks 300,000 times whether the others are
# done, which keeps whoever else wants the core from it, the thread it waits for among them.
CPU_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "GOMP_SPINCOUNT": "1000"}


class MicroBatch(Protocol):
    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T], -100 where nothing is to be learnt
    document_ids: Tensor | None


class StepMeasures:
    """The loss and gradient norm of one step, which are being copied from the device."""

    def __init__(self, loss: Tensor, gradient_norm: Tensor, skipped: bool = False) -> None:
        self.skipped = skipped  # there was no loss, or none that is finite, and the weights were left alone
        self._values = torch.stack((loss, gradient_norm)).to("cpu", non_blocking=True)
        self._arrival = torch.cuda.Event() if loss.is_cuda else None
        if self._arrival is not None:
            self._arrival.record()

    def read(self) -> tuple[float, float]:
        """Return the mean nats per token of the global batch, and the gradient's length before clipping.

        Waits for this step only; `.item()` would wait for the steps that were queued after it too.
        """
        if self._arrival is not None:
            self._arrival.synchronize()
        loss, gradient_norm = self._values.tolist()
        return loss, gradient_norm


class LossModule(nn.Module):
    """A module whose forward pass returns the loss of a batch, as DDP and FSDP2 need it."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, documents: Documents | None = None) -> Tensor:
        return self.model.loss(tokens, targets, documents)


def count_shares(threads: int, sequences: int, dropout: float = 0.0) -> int:
    """Return into how many parts a CPU's threads divide a micro-batch.

    One where there is dropout: it draws from one generator, and threads would draw from it in any order.
    """
    return 1 if dropout else min(threads, sequences, MAX_SHARES)


class SharedLoss(LossModule):
    """The loss on a CPU, where each thread computes some of the sequences.

    If all threads share every matrix product instead, they wait for each other after each one, which costs 1 to 8 % of
    the step on two quiet cores and more on busy ones. Each thread has its own gradients; they are added in a fixed
    order, so a step gives the same bits every time.
    """

    def __init__(self, model: GPT, threads: int, precision: torch.dtype = torch.float32) -> None:
        super().__init__(model)
        self.threads = threads
        self.rounded = None if precision == torch.float32 else RoundedBlocks(model, precision)
        self.add_up: AddGradients = add_gradients  # `parallelize` may put it here compiled
        self._pool = ThreadPoolExecutor(MAX_SHARES, thread_name_prefix="share")
        self._compiled: set[tuple[torch.Size, int]] = set()  # batches for which there is code

    def add_gradients(self, batch: MicroBatch, scale: float, precision: torch.dtype) -> Tensor:
        """Add the gradients of `scale` x nats of a micro-batch to those of the weights; return the nats."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        if self.rounded is None or self.rounded.precision != precision:
            done = self._share_out(batch, scale, precision, weights)
        else:
            with self.rounded.in_use(weights) as rounded:
                done = self._share_out(batch, scale, precision, rounded)
        for weight, *parts in zip(weights, *(gradients for _, gradients in done), strict=True):
            if parts[0].dtype == weight.dtype:
                for part in parts:
                    weight.grad = part if weight.grad is None else weight.grad.add_(part)
            else:
                weight.grad = self.add_up(weight.grad, parts)
        return torch.stack([nats for nats, _ in done]).sum()

    def _share_out(
        self, batch: MicroBatch, scale: float, precision: torch.dtype, weights: list[nn.Parameter]
    ) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """Return the nats of each thread's sequences, and `scale` times their gradients."""
        shares = count_shares(self.threads, len(batch.tokens))

        def learn(tokens: Tensor, targets: Tensor, documents: Documents | None) -> tuple[Tensor, tuple[Tensor, ...]]:
            # Sets this thread's number, MKL's for the process, and that with which later threads begin.
            torch.set_num_threads(self.threads // shares)
            with autocast(tokens.device, precision):
                nats = self(tokens, targets, documents)
            return nats.detach(), torch.autograd.grad(nats * scale, weights)

        documents: list[Documents] | tuple[None, ...] = (None,) * shares
        if batch.document_ids is not None:
            documents = split_documents(batch.document_ids, shares)
        kind = batch.tokens.shape, documents[0].reach if documents[0] is not None else 0
        # The first batch of a shape compiles code. Torch cannot compile in one thread while another runs such code.
        share_out = self._pool.map if kind in self._compiled else map
        try:
            done = list(share_out(learn, batch.tokens.chunk(shares), batch.targets.chunk(shares), documents))
        finally:
            torch.set_num_threads(self.threads)
        self._compiled.add(kind)
        return done


class GraphedLoss(LossModule):
    """The loss on GPUs that launch a micro-batch's passes at once, and a step's update at once, as CUDA graphs.

    With several ranks (`is_spread`) all gradients travel together, after the last micro-batch.
    """

    def __init__(self, model: GPT, *, is_spread: bool = False, gradient_precision: torch.dtype = torch.float32) -> None:
        super().__init__(model)
        self.graphed = GraphedGradients(model, self.compute)
        self.is_spread = is_spread
        self.gradient_precision = gradient_precision
        self.updates: dict[Optimizer, GraphedUpdate] = {}
        if is_spread:
            with torch.no_grad():
                for weight in model.parameters():  # as DDP does
                    dist.broadcast(weight, 0)

    def add_gradients(self, batch: MicroBatch, scale: float, precision: torch.dtype) -> Tensor:
        """Add the gradients of `scale` x nats of a micro-batch to those of the weights; return the nats."""
        return self.graphed.add(batch, scale, precision)

    def compute(self, tokens: Tensor, targets: Tensor, documents: Documents | None, precision: torch.dtype) -> Tensor:
        with autocast(tokens.device, precision):
            return self(tokens, targets, documents)

    def add_up_gradients(self) -> None:
        """Add those of all ranks."""
        if self.is_spread:
            self.graphed.add_up(self.gradient_precision)

    def update(self, optimizer: Optimizer, step: int, norm: Tensor) -> None:
        if optimizer not in self.updates:
            self.updates[optimizer] = GraphedUpdate(optimizer, self.graphed.record)
        self.updates[optimizer].step(step, norm)


def parallelize(
    model: GPT,
    *,
    strategy: str = "none",
    compile: bool = False,
    precision: torch.dtype = torch.float32,
    gradient_precision: torch.dtype = torch.float32,
    recompute: bool = False,
    graphs: bool = False,
    pointwise: str = "torch",
) -> nn.Module:
    """Return what `train_step` runs: the model's loss, compiled, and spread over the ranks by `strategy`.

    The model itself keeps its parameters and their names, so the optimizer and checkpoints use it directly; under
    FSDP2 they are sharded in place, which is why the optimizer is built afterwards. With `recompute` each block keeps
    only its input for the backward pass, which computes the rest again (activation checkpointing, arXiv:1604.06174).
    With `graphs` GPUs launch a micro-batch as one CUDA graph and the update as another; FSDP2 and CPUs do as without.
    Gradients travel between ranks in `gradient_precision`: bfloat16 halves the bytes and rounds what each rank adds.
    `pointwise` says whose kernels compute a block between its matrix products.

    Raises `ValueError` where those kernels are not installed.
    """
    assert strategy in STRATEGIES, strategy
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    for block in blocks:
        block.recomputes = recompute
        if pointwise == "liger":
            block.use_passes(liger_passes())
    module = LossModule(model)
    device = model.embedding.weight.device
    if device.type == "cpu":
        keep_freed_memory()
        use_fast_products()
        threads = torch.get_num_threads()
        if strategy == "none" and count_shares(threads, MAX_SHARES, model.config.dropout) > 1:
            module = SharedLoss(model, threads, precision)
            if module.rounded is not None:
                blocks += [block for block in module.rounded.blocks if isinstance(block, Block)]
    elif graphs and device.type == "cuda" and strategy != "fsdp":
        module = GraphedLoss(model, is_spread=strategy == "ddp", gradient_precision=gradient_precision)
    if compile:
        if device.type == "cpu":
            with suppress(ModuleNotFoundError):  # without the folder model/cpu training is slower, no more
                from model.cpu.attention import document_attention, fastest_attention

                for block in blocks:
                    block.attention.causal_attention = fastest_attention
                    block.attention.document_attention = document_attention
        # Each block is compiled by itself: one block's code serves all of them, and the backward pass remains a chain
        # of blocks, so DDP and FSDP2 send the gradients of one while the next computes.
        # A block that C++ runs lets go of Python's lock, so the threads of `SharedLoss` do not wait for each other.
        # In torch 2.13 C++ cannot run a block that computes its activations again.
        options: Any = {"cpp_wrapper": True} if isinstance(module, SharedLoss) and not recompute else None
        for block in blocks:
            block.compile(dynamic=False, options=options)
        if strategy == "ddp":
            from torch._dynamo import config as dynamo

            # Else each block is cut in two where one of DDP's buckets ends, for an overlap that the chain gives anyway.
            dynamo.optimize_ddp = False
        if isinstance(module, SharedLoss):
            module.add_up = torch.compile(add_gradients, dynamic=True, options=options)  # one code for all shapes
        # The loss's chunks differ only in the last one's length.
        chunk_gradient = torch.compile(cross_entropy_gradient, dynamic=False, options=options)
        model.cross_entropy = partial(chunked_cross_entropy, chunk_gradient=chunk_gradient)
    if strategy == "fsdp":
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=gradient_precision)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The loss needs no cast of its integers; the root holds embedding, last norm and head.
        fully_shard(module, mesh=mesh, mp_policy=policy)
        return module
    if strategy == "ddp" and not isinstance(module, GraphedLoss):
        # The only buffer is the rotary table, which each rank computes.
        # Before torch 2.13 the setting had another name.
        names = signature(DistributedDataParallel).parameters
        unsent: Any = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
        wrapped = DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=BUCKET_MEGABYTES,
            gradient_as_bucket_view=True,  # gradients are stored in the buckets, which saves a copy of them
            **unsent,
        )
        if gradient_precision == torch.bfloat16:
            wrapped.register_comm_hook(None, average_in_bfloat16)
        return wrapped
    return module


def compile_ahead(
    module: nn.Module, rows: int, context_length: int, precision: torch.dtype, *, documents: bool
) -> None:
    """Have a compiled module's code made, or found in the cache, by a made-up micro-batch of which nothing stays.

    No other rank is asked for anything, so one rank can compile with all cores while the others wait.
    """
    device = next(module.parameters()).device
    alone = module.module if isinstance(module, DistributedDataParallel) else module
    tokens = torch.zeros(rows, context_length, dtype=torch.int64, device=device)
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(generators), autocast(device, precision):
        nats = alone(tokens, tokens, find_documents(tokens.int()) if documents else None)
    nats.backward()
    module.zero_grad()


def scores_as_trained(module: nn.Module, config: ModelConfig) -> bool:
    """Tell whether the code of a compiled training step scores held-out batches too, so that none is compiled for it.

    Not where threads share a batch out, whose code is that of a part; nor where ranks share the weights, which are
    gathered for a backward pass and would stay; nor beside graphs, which keep the memory of a whole step; nor with
    dropout.
    """
    return not isinstance(module, SharedLoss | GraphedLoss | FSDPModule) and config.dropout == 0


def average_in_bfloat16(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's way for one bucket of gradients, as torch's own hook has it, which wants NCCL."""
    light = bucket.buffer().bfloat16().div_(dist.get_world_size(group))
    work = dist.all_reduce(light, group=group, async_op=True)
    return work.get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))


def train_step(
    module: nn.Module,
    optimizer: Optimizer,
    micro_batches: Iterable[MicroBatch],
    *,
    step: int,
    global_tokens: int,
    precision: torch.dtype = torch.float32,
    skip_bad_loss: bool = False,
) -> StepMeasures:
    """Learn from this rank's share of global batch `step`, given as micro-batches.

    `global_tokens` is the number of targets in the global batch, over all ranks. Each micro-batch adds its sum of
    nats over that number: so micro-batches and ranks may be uneven, and the result is the mean over all tokens.
    From a batch without a target nothing is learnt: the weights and the optimizer stay as they are.
    """
    device = next(module.parameters()).device
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    sharded = isinstance(module, (DistributedDataParallel, FSDPModule))
    loss = torch.zeros((), device=device)
    if not global_tokens:  # every rank knows, so none waits for another
        return StepMeasures(loss, loss.clone(), skipped=True)
    # DDP and FSDP2 average over the ranks, and the loss needs the sum.
    scale = (world_size if sharded else 1) / global_tokens
    optimizer.zero_grad()
    for batch, is_last in _mark_last(micro_batches):
        if isinstance(module, SharedLoss | GraphedLoss):
            loss += module.add_gradients(batch, scale, precision) / global_tokens
            continue
        with _synchronised(module, is_last):
            with autocast(device, precision):
                nats = module(
                    batch.tokens.to(device, non_blocking=True),
                    batch.targets.to(device, non_blocking=True),
                    None if batch.document_ids is None else find_documents(batch.document_ids).to(device),
                )
            (nats * scale).backward()
        loss += nats.detach() / global_tokens
    if isinstance(module, GraphedLoss):
        module.add_up_gradients()
    if world_size > 1 and (sharded or (isinstance(module, GraphedLoss) and module.is_spread)):
        dist.all_reduce(loss)
    norm = gradient_norm(optimizer.parameters.values())
    if skip_bad_loss and not bool(torch.isfinite(loss + norm)):  # this waits for the device
        optimizer.zero_grad()
        return StepMeasures(loss, norm, skipped=True)
    if isinstance(module, GraphedLoss):
        module.update(optimizer, step, norm)
    else:
        clip(optimizer, norm)
        optimizer.step(step)
    return StepMeasures(loss, norm)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Length of all gradients as one vector; with sharded ones every rank must call it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def autocast(
    device: torch.device | str, precision: torch.dtype, *, keeps_casts: bool = False
) -> AbstractContextManager[Any]:
    """Compute matrix products in `precision`; weights and their gradients stay float32.

    With `keeps_casts` a weight is cast once for all passes inside. A training step needs each once, and a graph would
    keep those of the step that it recorded.
    """
    kind = torch.device(device).type
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(kind, dtype=precision, cache_enabled=keeps_casts)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step instead of returning it to the system.

    Every step allocates the same gigabytes. If they come from the system each time, it clears every page first, which
    took 6 % of the step of a 53M model. All threads share one heap, because glibc always returns the free end of the
    other heaps: another 4 %, and 0.5 of 3.1 GB. A process that has several heaps already, as Ray's workers do, has to
    be started in `CPU_ENVIRONMENT`. Only glibc has these switches; with another C library nothing changes.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(arena_max, 1)


def choose_precision(name: str, device: torch.device | str) -> torch.dtype:
    """Resolve `float32`, `bfloat16` or `auto`: bfloat16 where the hardware multiplies in it.

    Raises `ValueError` for bfloat16 on a GPU from before Ampere, which emulates it and is slower than in float32.
    """
    if torch.device(device).type == "cuda" and name != "float32":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        if name == "bfloat16":
            raise ValueError(
                f"train.precision=bfloat16 needs a GPU of compute capability 8.0 (Ampere) or newer, and this is a"
                f" {torch.cuda.get_device_name(device)} with {capability[0]}.{capability[1]}, which has float16 alone:"
                f" not supported here. Set train.precision=float32, which auto takes there too."
            )
        return torch.float32
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return torch.bfloat16 if HAS_BFLOAT16_UNITS else torch.float32


def _mark_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each item with whether it is the last."""
    iterator = iter(items)
    try:
        held = next(iterator)
    except StopIteration:
        raise ValueError("A training step needs at least one micro-batch.") from None
    for item in iterator:
        yield held, False
        held = item
    yield held, True


def _synchronised(module: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """Average gradients over the ranks with the last micro-batch only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
    elif isinstance(module, DistributedDataParallel) and not is_last:
        return module.no_sync()
    return nullcontext()
