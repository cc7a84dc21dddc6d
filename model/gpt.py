"""GPT in plain PyTorch, two families in one class: classic (GPT-2) and modern (Qwen3, Llama).

Shapes: B sequences, T tokens, C width, H heads, K key-value heads, D channels of a head, V vocabulary.

    model = GPT(ModelConfig(num_layers=4, width=256, num_heads=4), vocab_size=8192)
    logits = model(tokens)                                  # [B, T, V]
    nats = model.loss(tokens, targets)                      # a sum, never holding all logits
    cache = model.new_cache(slots=16)                       # for `forward_hidden`, which an engine calls

Long because the whole network is here, so that it can be read without turning a page.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.documents import DocumentAttention, Documents, flash_suits, varlen_attention
from model.pointwise import TORCH_PASSES, PointwisePasses
from model.settings import require

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

IGNORED = -100  # a target that carries no loss
VOCABULARY_MULTIPLE = 64  # matrix units of GPUs want whole tiles: 50,257 rows are slower than 50,304


class KVCache:
    """Keys and values of up to `slots` sequences; whoever calls `GPT.forward_hidden` knows how long each is."""

    def __init__(self, config: ModelConfig, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_layers, slots, config.kv_heads, config.context_length, config.channels_per_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def write(
        self, layer: int, keys: Tensor, values: Tensor, slots: Tensor | None, positions: Tensor, visible: int
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, K, T, D] at `positions` [B, T] of the slots [B], or of slots 0 to B-1.

        Returns what those slots hold at the first `visible` positions.
        """
        rows = torch.arange(len(keys), device=keys.device) if slots is None else slots
        stored_keys, stored_values = self.keys[layer], self.values[layer]
        stored_keys[rows[:, None], :, positions] = keys.transpose(1, 2).to(stored_keys.dtype)
        stored_values[rows[:, None], :, positions] = values.transpose(1, 2).to(stored_values.dtype)
        if slots is None:
            return stored_keys[: len(keys), :, :visible], stored_values[: len(keys), :, :visible]
        return stored_keys[slots, :, :visible], stored_values[slots, :, :visible]


@dataclass
class AttentionContext:
    """What the attention of every layer is told about this forward pass."""

    rotation: tuple[Tensor, Tensor] | None = None  # cosines and sines [B or 1, 1, T, D]
    mask: Tensor | None = None  # [B, 1, T, keys], true where a query may look; None: causal
    cache: KVCache | None = None
    slots: Tensor | None = None
    positions: Tensor | None = None  # [B, T]
    visible: int = 0  # keys that the furthest query may see
    documents: Documents | None = None  # inside which attention stays, by a way that needs no mask
    document_attention: DocumentAttention | None = None  # that way


def torch_causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax of scaled scores times values, [B, H, T, D] by [B, K, T, D]; a query sees its own position and those
    before.
    """
    is_grouped = queries.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=is_grouped)


class Attention(nn.Module):
    """Causal self-attention over one fused projection to queries, keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.channels_per_head
        self.dropout = config.dropout
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        self.sections = (queries, keys, keys)  # rows of `qkv`: each is a matrix of its own to Muon and to files
        self.qkv = nn.Linear(config.width, sum(self.sections), bias=config.has_qkv_bias)
        self.output = nn.Linear(queries, config.width, bias=config.has_output_bias)
        self.query_norm = RMSNorm(self.head_dim, config.epsilon) if config.has_qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, config.epsilon) if config.has_qk_norm else None
        self.causal_attention: AttentionFunction = torch_causal_attention  # `parallelize` may put a faster one here
        self.document_attention: DocumentAttention | None = None  # and one here

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        batch, length, _ = x.shape
        queries, keys, values = (
            part.view(batch, length, -1, self.head_dim) for part in self.qkv(x).split(self.sections, dim=-1)
        )
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys, values = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        if context.rotation is not None:
            # Angles are float32, whatever the rest is; attention wants one dtype.
            queries, keys = (rotate(part, *context.rotation).to(values.dtype) for part in (queries, keys))
        if context.cache is not None:
            assert context.positions is not None
            keys, values = context.cache.write(layer, keys, values, context.slots, context.positions, context.visible)
            keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        if context.mask is None and not self.dropout:
            if context.documents is None:
                mixed = self.causal_attention(queries, keys, values)
            else:
                assert context.document_attention is not None
                mixed = context.document_attention(queries, keys, values, context.documents)
        else:
            mixed = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=context.mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=context.mask is None,
                enable_gqa=self.kv_heads != self.num_heads,
            )
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))

    def find_document_attention(self, x: Tensor) -> DocumentAttention | None:
        """Return how attention stays inside documents without a mask, for activations like `x`; None: with one."""
        if self.dropout:
            return None
        return self.document_attention or (varlen_attention if flash_suits(x.device, x.dtype, self.head_dim) else None)


class RMSNorm(nn.Module):
    passes: PointwisePasses = TORCH_PASSES  # `parallelize` may put others here

    def __init__(self, channels: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.passes.normalise(x, self.weight, self.epsilon)

    def add(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + added and its norm."""
        return self.passes.add_and_normalise(x, added, self.weight, self.epsilon)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + D/2) by the angle of its position: RoPE in the layout of transformers."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


class GeluMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_channels)
        self.output = nn.Linear(config.mlp_channels, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    passes: PointwisePasses = TORCH_PASSES  # `parallelize` may put others here

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sections = (config.mlp_channels, config.mlp_channels)  # rows of `gate_up`
        self.gate_up = nn.Linear(config.width, sum(self.sections), bias=config.has_mlp_bias)
        self.output = nn.Linear(config.mlp_channels, config.width, bias=config.has_mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.passes.gate(self.gate_up(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config)
        self.mlp = SwiGLU(config) if config.is_modern else GeluMLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.recomputes = False  # keeps only its input for the backward pass, which computes the rest again

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(
                self.compute, x, context, layer, use_reentrant=False, preserve_rng_state=self.dropout.p > 0
            )
        return self.compute(x, context, layer)

    def compute(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        attended = self.dropout(self.attention(self.attention_norm(x), context, layer))
        if isinstance(self.mlp_norm, RMSNorm):
            x, normalised = self.mlp_norm.add(x, attended)
        else:
            x = x + attended
            normalised = self.mlp_norm(x)
        return x + self.dropout(self.mlp(normalised))

    def use_passes(self, passes: PointwisePasses) -> None:
        """Have norms, residual and SwiGLU computed by these; the norm of queries and keys stays beside its rotation."""
        for module in (self.attention_norm, self.mlp_norm, self.mlp):
            if isinstance(module, RMSNorm | SwiGLU):
                module.passes = passes


def build_norm(config: ModelConfig) -> nn.Module:
    if config.is_modern:
        return RMSNorm(config.width, config.epsilon)
    return nn.LayerNorm(config.width, eps=config.epsilon)


class GPT(nn.Module):
    cosines: Tensor
    sines: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        require(vocab_size > 1, "a model needs a vocabulary of at least two tokens.")
        self.config = config
        self.vocab_size = vocab_size
        padded_size = math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.embedding = nn.Embedding(padded_size, config.width)
        self.position_embedding = None if config.is_modern else nn.Embedding(config.context_length, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = build_norm(config)
        self.head = nn.Linear(config.width, padded_size, bias=False)
        self.cross_entropy: Callable[..., Tensor] = chunked_cross_entropy  # `parallelize` may put a compiled one here
        self.restarts_positions = False  # whether learned positions count from 0 in each document of a row
        self.restore_derived()
        self.initialise()

    def restore_derived(self) -> None:
        """Make what a checkpoint does not hold: the tie between embedding and head, and the rotary table."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight
        if self.config.is_modern:
            for name, table in zip(("cosines", "sines"), rotary_table(self.config), strict=True):
                self.register_buffer(name, table.to(self.embedding.weight.device), persistent=False)

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights: GPT-2's scheme (classic), or one that Muon likes (modern)."""
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # Modern: matrices that keep the norm of their input, as orthogonal updates then do.
                nn.init.normal_(module.weight, std=config.width**-0.5 if config.is_modern else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.modules():
            if not isinstance(block, Block):
                continue
            for output in (block.attention.output, block.mlp.output):
                if config.is_modern:
                    nn.init.zeros_(output.weight)  # each block starts as the identity
                else:
                    nn.init.normal_(output.weight, std=0.02 / math.sqrt(2 * config.num_layers))
        if config.is_modern and not config.tie_embeddings:
            nn.init.normal_(self.embedding.weight, std=1.0)  # of the size that blocks add to it
            nn.init.zeros_(self.head.weight)  # the first prediction is uniform, whatever the width
        self.clear_padding()

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Zero the rows that pad the vocabulary; they get no gradient, so they stay zero."""
        for weight in (self.embedding.weight, self.head.weight):
            weight[self.vocab_size :] = 0

    def forward(self, tokens: Tensor, documents: Documents | None = None) -> Tensor:
        """Return the logits [B, T, V] of tokens [B, T]."""
        return self.logits(self.forward_hidden(tokens, documents=documents))

    def forward_hidden(
        self,
        tokens: Tensor,
        *,
        documents: Documents | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        positions: Tensor | None = None,
        visible: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the last layer's normalised output [B, T, C], from which `logits` and the loss are computed.

        With a cache, row b's keys and values go to slot `slots[b]` (slot b if None) at `positions[b]` [T], and its
        queries see what the slot holds at their own position and before. No query sees beyond the first `visible`
        positions; the caller says how many, because reading it from the device would wait for it. Rows of different
        lengths go in one batch if the shorter ones are padded on the right: a padding token writes behind the row's
        end, and the next real token overwrites it.

        Without a cache, `mask` [B, 1, T, T], true where a token may look, goes with `positions`: several texts that
        share a beginning can then lie in one row, which may be longer than the context.
        """
        length = tokens.shape[1]
        if cache is not None:
            assert documents is None, "documents are separate slots of a cache"
            assert positions is not None, "a cache does not know how long its texts are"
            assert visible is not None
            assert visible <= cache.capacity
            reached = torch.arange(visible, device=tokens.device)
            mask = (reached <= positions[:, :, None])[:, None]
            context = AttentionContext(None, mask, cache, slots, positions, visible)
        else:
            context = AttentionContext(mask=mask)
        if mask is None and length > self.config.context_length:
            raise ValueError(
                f"{length} tokens are more than the model's context of {self.config.context_length}; shorten the text."
            )
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            weight = self.position_embedding.weight
            if self.restarts_positions and documents is not None:
                positions = documents.positions
            x = self.dropout(x + (weight[:length] if positions is None else weight[positions]))
        elif positions is None:
            context.rotation = (self.cosines[:length], self.sines[:length])
        else:
            context.rotation = (self.cosines[positions][:, None], self.sines[positions][:, None])
        if torch.is_autocast_enabled(x.device.type):
            # Autocast leaves embeddings in float32, and all that is added to them: twice the memory traffic.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if documents is not None:
            first: Any = self.blocks[0]
            context.document_attention = first.attention.find_document_attention(x)
            if context.document_attention is None:
                context.mask = documents.mask()
            else:
                context.documents = documents
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)[..., : self.vocab_size]

    def loss(self, tokens: Tensor, targets: Tensor, documents: Documents | None = None) -> Tensor:
        """Sum of nats over the targets that are not -100; divide by their number for the mean."""
        hidden = self.forward_hidden(tokens, documents=documents)
        return self.cross_entropy(hidden.flatten(0, 1), self.head.weight, targets.flatten(), self.vocab_size)

    def new_cache(self, slots: int) -> KVCache:
        weight = self.embedding.weight
        return KVCache(self.config, slots, weight.device, weight.dtype)

    def num_parameters(self) -> int:
        """Count the parameters that a checkpoint holds: without the rows that pad the vocabulary."""
        return count_parameters(self.config, self.vocab_size)

    def flops_per_token(self) -> int:
        """Training FLOPs per token; see `flops_per_token`."""
        return flops_per_token(self.config, self.vocab_size, is_frozen=not self.embedding.weight.requires_grad)

    def matrices(self) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
        """The blocks' 2-D weights with the heights of the matrices stacked in each, for Muon."""
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            stacked: dict[str, tuple[int, ...]] = {"attention.qkv": block.attention.sections}
            if isinstance(block.mlp, SwiGLU):
                stacked["mlp.gate_up"] = block.mlp.sections
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    weight = module.get_parameter("weight")
                    yield f"blocks.{number}.{name}.weight", weight, stacked.get(name, (len(weight),))


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, D] of every position's angles, each half of D the same."""
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), rotary_frequencies(config))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angles [D/2] by which one position turns each pair of channels, stretched as `rope_scaling` says."""
    pairs = torch.arange(0, config.channels_per_head, 2, dtype=torch.float32) / config.channels_per_head
    frequencies = 1.0 / config.rope_theta**pairs
    if config.rope_scaling == "none":
        return frequencies
    stretched = frequencies / config.rope_factor
    if config.rope_scaling == "linear":
        return stretched
    # Llama 3: slow waves are stretched, fast ones are not, and between the two bounds it changes linearly.
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    turns = config.rope_original_context * frequencies / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(stretched, frequencies, share)


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Parameters without building the model; an untied head counts, padding of the vocabulary does not."""
    embedding = vocab_size * config.width
    heads = embedding * (1 if config.tie_embeddings else 2)
    positions = 0 if config.is_modern else config.context_length * config.width
    return heads + positions + config.num_layers * sum(block_parameters(config)) + norm_parameters(config)


def norm_parameters(config: ModelConfig) -> int:
    return config.width * (1 if config.is_modern else 2)


def block_parameters(config: ModelConfig) -> tuple[int, int]:
    """One block's parameters: in matrices, and in all else (biases and norms)."""
    queries = config.num_heads * config.channels_per_head
    keys = config.kv_heads * config.channels_per_head
    attention = config.width * (queries + 2 * keys) + queries * config.width
    mlps = 3 if config.is_modern else 2  # SwiGLU has a gate more
    others = 2 * norm_parameters(config) + 2 * config.channels_per_head * config.has_qk_norm
    others += (queries + 2 * keys) * config.has_qkv_bias + config.width * config.has_output_bias
    others += ((mlps - 1) * config.mlp_channels + config.width) * config.has_mlp_bias
    return attention + mlps * config.width * config.mlp_channels, others


def flops_per_token(config: ModelConfig, vocab_size: int, is_frozen: bool = False) -> int:
    """Count the FLOPs of forward and backward pass per token, as PaLM does (appendix B).

    6 for each weight of a matrix product, the head's among them, and 12 L H D T for attention as if it were not causal.
    Embedding rows are looked up, not multiplied. 4 for each weight that is frozen and gets no gradient; adapters beside
    them are too small to count.
    """
    matrices = config.num_layers * block_parameters(config)[0] + vocab_size * config.width
    attention = 12 * config.num_layers * config.num_heads * config.channels_per_head * config.context_length
    return (4 if is_frozen else 6) * matrices + attention


TILE_TOKENS = 128  # rows that matrix units take at a time: a chunk of 1,334 tokens costs them as much as one of 1,408
# Logits held at once. On a GPU large products are fast: 128 MiB in bfloat16. On a CPU small ones stay near its cache.
CHUNK_LOGITS = {"cpu": 2**23}
DEFAULT_CHUNK_LOGITS = 2**26


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    chunk_tokens: int | None = None,
    chunk_gradient: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Sum of nats of `targets` [N] under the head `weight` [V, C] applied to `hidden` [N, C].

    Only the logits of one chunk of tokens exist at a time. The forward pass computes their gradient too, before they
    are dropped, so nothing is computed twice: three matrix products per chunk, as without chunks. `chunk_gradient` is
    `cross_entropy_gradient`, or that function compiled, which passes over the logits once or twice.
    """
    if chunk_tokens is None:
        most = CHUNK_LOGITS.get(hidden.device.type, DEFAULT_CHUNK_LOGITS) // len(weight)
        chunk_tokens = max(most // TILE_TOKENS, 1) * TILE_TOKENS
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return ChunkedCrossEntropy.apply(
            hidden, weight, targets, vocab_size, chunk_tokens, chunk_gradient or cross_entropy_gradient
        )
    total = torch.zeros((), device=hidden.device)
    for part, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        logits = F.linear(part, weight)[:, :vocab_size].float()
        total = total + F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
    return total


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        chunk_tokens: int,
        chunk_gradient: Callable[..., tuple[Tensor, Tensor]],
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            cast_weight = weight.to(dtype)
            hidden_gradient = torch.empty_like(hidden, dtype=dtype)
            is_learnt = ctx.needs_input_grad[1]  # not where the head is frozen
            weight_gradient: Tensor | None = None  # chunks add up
            total = torch.zeros((), device=hidden.device, dtype=torch.float32)
            for start in range(0, len(hidden), chunk_tokens):
                part = hidden[start : start + chunk_tokens].to(dtype)
                target = targets[start : start + chunk_tokens]
                nats, gradient = chunk_gradient(part @ cast_weight.t(), target, vocab_size)
                total += nats
                torch.mm(gradient, cast_weight, out=hidden_gradient[start : start + chunk_tokens])
                if is_learnt:
                    weight_gradient = add_product(weight_gradient, gradient.t(), part)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        by_hidden = (hidden_gradient * upstream[0]).to(ctx.hidden_dtype)
        # In place: a second gradient of the same loss, which nobody takes, would be refused.
        by_weight = weight_gradient.mul_(upstream[0]).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return by_hidden, by_weight, None, None, None, None


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return a float32 `total` to which left @ right is added in place; None is nothing yet."""
    if keeps_float32_sums(left.device) and left.dtype != torch.float32:
        # One pass: elsewhere the product is rounded to 16 bits, written, and read again to be added.
        if total is None:
            total = left.new_zeros(len(left), right.shape[1], dtype=torch.float32)
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return total
    if total is None:
        return (left @ right).float()
    return total.addmm_(left, right) if left.dtype == total.dtype else total.add_(left @ right)


def keeps_float32_sums(device: torch.device) -> bool:
    """Tell whether a product of 16 bits can be added in float32 there: on GPUs, and not in every PyTorch."""
    return device.type == "cuda" and hasattr(torch.ops.aten.addmm, "dtype_out")


def cross_entropy_gradient(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the summed nats of one chunk and their gradient by the logits [n, V].

    Columns from `vocab_size` on pad the vocabulary; they take no probability and get no gradient.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    scores = logits.float()
    if vocab_size < logits.shape[1]:
        scores = scores.masked_fill(columns >= vocab_size, -torch.inf)
    normaliser = scores.logsumexp(dim=-1, keepdim=True)
    counted = (targets != IGNORED)[:, None]
    chosen = targets.clamp(min=0)[:, None]
    nats = ((normaliser - scores.gather(1, chosen)) * counted).sum()
    gradient = ((scores - normaliser).exp() - (columns == chosen).float()) * counted
    return nats, gradient.to(logits.dtype)
