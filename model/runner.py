"""What runs the model for the engine: tokens of many slots in, logits out. It owns the cache of keys and values.

Every runner guarantees that what a slot gets does not depend on the other slots, to the last bit. `TorchRunner` does so
by always computing the same shapes. On a GPU the newest tokens run as one batch that has a row for every slot, used or
not, and a chunk of a prompt runs alone. On a CPU every slot runs alone, because torch's last bits depend there on the
place of a row in its batch. `KernelRunner` (model/cpu) is several times as fast and needs a C++ compiler.
"""

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gpt import GPT, KVCache, ModelConfig
from model.products import use_fast_products
from model.sampling import find_best
from model.sequence import Work

# While one engine serves, the next version's engine records its graph on the same GPU. Steps and recordings take turns:
# what another thread starts during a recording would be lost to it, or end it.
DEVICE_TURN = threading.Lock()
# On a GPU every step computes this many places more for every slot, with drafts in them or not: hardly more time than
# one, where a longer draft would cost those who ask for none.
GPU_DRAFT_TOKENS = 8
# On a GPU prompts run in so many tokens, or twice, four times, ... as many, padded: CUDA's libraries choose and plan a
# kernel for each shape that they meet, in 20 to 40 ms (read in others' reports, not measured here).
SHORTEST_BUCKET = 32
SHORTEST_VISIBLE = 256  # and so many keys, or twice, four times, ... as many
WEIGHTS = ("auto", "as_is", "float32", "bfloat16", "int8")


class Runner(Protocol):
    num_slots: int
    weights: str
    cache_dtype: torch.dtype
    max_draft_tokens: int  # that one step can verify for a text; of longer drafts the next steps verify the rest
    # Whether a token gets the same bits alone, in any chunk of a prompt and as a draft: then a prompt may go on from
    # any token that a slot holds. Elsewhere it has to be cut into the same chunks.
    has_independent_rows: bool
    vocab_size: int  # so many logits a row: a model may have more rows than there are tokens

    def run(self, work: list[Work]) -> Tensor:
        """Run the work, of each slot one piece, and return the logits [rows, V] that it wants, in order, in float32."""

    def best_tokens(self) -> list[int]:
        """Return the first place of the largest logit of each row of the last `run`; -1 as `find_best` has it."""

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the keys and values of the first tokens of one slot to another."""

    def clear(self, slot: int) -> None:
        """Zero what a slot holds, after a failure: a NaN spreads even where it is masked."""

    def reserve_memory(self) -> None:
        """Have the system give the cache its memory now, which it otherwise does as texts come to use it."""

    def enter_thread(self) -> None:
        """Prepare the thread that will call `run` from now on, and nothing else beside the engine."""

    def weight_bytes(self) -> int:
        """Return the memory that the weights take."""


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    return 2 * config.num_layers * config.kv_heads * config.channels_per_head * dtype.itemsize


class Int8Linear(nn.Module):
    """A linear layer whose weights are 8-bit integers, with one scale per output."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return out if self.bias is None else out + self.bias


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights [outputs, inputs] as int8 and the scale of each output: symmetric around 0, without clipping."""
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def compute_dtype(model: GPT, weights: str) -> torch.dtype:
    """Return the precision of activations and cache under `TorchRunner`."""
    if weights == "as_is":
        return model.embedding.weight.dtype
    # CPUs without bfloat16 units emulate it slowly: int8 weights meet float32 there.
    on_cpu = model.embedding.weight.device.type == "cpu"
    return torch.float32 if weights == "float32" or (weights == "int8" and on_cpu) else torch.bfloat16


def with_weights(model: GPT, weights: str) -> GPT:
    """Return a model with its weights stored in that precision; the given model does not change."""
    dtype = compute_dtype(model, weights)
    if weights != "int8" and model.embedding.weight.dtype == dtype:
        return model
    model = copy.deepcopy(model).to(dtype)
    model.restore_derived()  # the rotary table stays float32: bfloat16 has no number for each position
    if weights == "int8":
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child, dtype))
    return model


class TorchRunner:
    """Runs `GPT` on the device where its weights are; on CUDA the batch of newest tokens is a recorded graph."""

    has_independent_rows = False  # torch and CUDA's libraries choose the order of additions by the shapes

    def __init__(
        self, model: GPT, num_slots: int, weights: str, use_graph: bool, max_draft_tokens: int = GPU_DRAFT_TOKENS
    ) -> None:
        self.model = with_weights(model, weights).eval()
        self.weights = weights
        self.num_slots = num_slots
        self.vocab_size = model.vocab_size
        self.device = model.embedding.weight.device
        if self.device.type == "cpu":
            use_fast_products()
        self.batches_slots = self.device.type == "cuda"
        self.max_draft_tokens = max_draft_tokens if self.batches_slots else 0
        self.width = 1 + self.max_draft_tokens
        self.cache: KVCache = self.model.new_cache(num_slots)
        self.cache_dtype = self.cache.keys.dtype
        self.turn: AbstractContextManager[Any] = DEVICE_TURN if self.device.type == "cuda" else nullcontext()
        self._best: list[int] = []  # of the last pass, one for each row of logits
        self._graph: torch.cuda.CUDAGraph | None = None
        if use_graph and self.device.type == "cuda":
            self._capture()

    @torch.inference_mode()
    def run(self, work: list[Work]) -> Tensor:
        short = []
        if self.batches_slots:
            short = [item for item in work if len(item.tokens) <= self.width and item.num_logits == len(item.tokens)]
        with self.turn:
            batched = self._run_slots(short) if short else {}
            rows = [batched[item.slot] if item.slot in batched else self._run_chunk(item) for item in work]
            logits = torch.cat(rows)[:, : self.vocab_size].float()
        self._best = find_best(logits)
        return logits

    def best_tokens(self) -> list[int]:
        return self._best

    @torch.inference_mode()
    def copy(self, source: int, target: int, num_tokens: int) -> None:
        with self.turn:
            for stored in (self.cache.keys, self.cache.values):
                stored[:, target, :, :num_tokens] = stored[:, source, :, :num_tokens]

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        with self.turn:
            self.cache.keys[:, slot] = 0
            self.cache.values[:, slot] = 0

    def reserve_memory(self) -> None:
        """Do nothing: torch has written zeros to all of the cache."""

    def enter_thread(self) -> None:
        """Do nothing: the model's own operations need all of torch's threads."""

    def weight_bytes(self) -> int:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _run_chunk(self, item: Work) -> Tensor:
        count, end = len(item.tokens), item.start + len(item.tokens)
        length, visible = count, end
        if self.batches_slots:
            capacity = self.cache.capacity
            length = bucket_of(count, SHORTEST_BUCKET, capacity - item.start)
            visible = bucket_of(end, SHORTEST_VISIBLE, capacity)
        # Padding writes behind the text's end, where its next tokens will overwrite it.
        positions = torch.arange(item.start, item.start + length, device=self.device)
        hidden = self.model.forward_hidden(
            torch.tensor([item.tokens + [0] * (length - count)], device=self.device),
            cache=self.cache,
            slots=torch.tensor([item.slot], device=self.device),
            positions=positions[None],
            visible=visible,
        )
        return self.model.logits(hidden[0, count - item.num_logits : count])

    def _run_slots(self, work: list[Work]) -> dict[int, Tensor]:
        """Run a few tokens of some slots in the batch [slots, width], which has a row for every slot."""
        capacity = self.cache.capacity
        tokens = torch.zeros(self.num_slots, self.width, dtype=torch.long)
        # Places without a token write to the last position of their slot. Nobody reads it: a text that fills the
        # context ends with the token there, whose keys are not needed any more.
        positions = torch.full((self.num_slots, self.width), capacity - 1, dtype=torch.long)
        for item in work:
            tokens[item.slot, : len(item.tokens)] = torch.tensor(item.tokens)
            places = torch.arange(item.start, item.start + self.width)
            positions[item.slot] = places.clamp(max=capacity - 1)
        if self._graph is not None:
            self._tokens.copy_(tokens, non_blocking=True)
            self._positions.copy_(positions, non_blocking=True)
            self._graph.replay()
            logits = self._logits
        else:
            logits = self._forward(tokens.to(self.device), positions.to(self.device))
        return {item.slot: logits[item.slot, : len(item.tokens)] for item in work}

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = self.model.forward_hidden(tokens, cache=self.cache, positions=positions, visible=self.cache.capacity)
        return self.model.logits(hidden)

    @torch.inference_mode()
    def _capture(self) -> None:
        """Record the batch of all slots as a CUDA graph, which one launch starts instead of some hundred."""
        shape = (self.num_slots, self.width)
        self._tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self._positions = torch.full(shape, self.cache.capacity - 1, dtype=torch.long, device=self.device)
        self._graph, self._logits = record_graph(lambda: self._forward(self._tokens, self._positions), self.device)


def bucket_of(count: int, shortest: int, most: int) -> int:
    """The first of shortest, twice that, four times that, ... that is not below `count`, and no more than `most`."""
    return min(shortest << max(0, (count - 1) // shortest).bit_length(), most)


def record_graph(
    compute: Callable[[], Tensor], device: torch.device, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record what `compute` starts on the GPU, between the steps of other engines; returns the graph and its result.

    Only this thread's calls can spoil the recording: in the default mode, any thread that allocates memory or waits
    for the GPU, as uploads and samplers do, ends it with an error on both sides.
    """
    with DEVICE_TURN:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # lets the libraries allocate their workspaces outside the graph
                compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = compute()
    return graph, result
