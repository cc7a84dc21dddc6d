"""Liger's Triton kernels (LinkedIn, pip install 'gpt-53m[liger]') for a block's norms, residual and SwiGLU.

    passes = liger_passes()          # for `parallelize(model, pointwise="liger")`

Each kernel is an operation of PyTorch here, with its gradient and the shape of its result, so that a compiled block
stays one graph around it. Its rotation is not used: it works in place, so it would need a copy first, while
`torch.compile` makes one kernel of the norm of queries and keys and their rotation.

No GPU has run this yet: the tests run the kernels in Triton's interpreter.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from model.pointwise import PointwisePasses

IN_FLOAT32 = "gemma"  # Liger's name for: all of a norm in float32, rounded once at its end, as ours is


@cache
def liger_passes() -> PointwisePasses:
    """Return Liger's passes. Raises `ValueError` where Liger or Triton is not installed."""
    try:
        from liger_kernel.ops import fused_add_rms_norm, rms_norm, swiglu
    except ImportError as error:
        raise ValueError(
            f"train.pointwise=liger needs Liger's kernels ({error}); pip install 'gpt-53m[liger]', or set it to torch."
        ) from None

    @torch.library.custom_op("gpt_53m::liger_norm", mutates_args=())
    def norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        y, _, scales, *_ = rms_norm.rms_norm_forward(x.contiguous(), weight, epsilon, 0.0, IN_FLOAT32, None)
        return y, scales

    @norm.register_fake
    def _(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return _like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)

    @torch.library.custom_op("gpt_53m::liger_norm_gradient", mutates_args=())
    def norm_gradient(upstream: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.contiguous().view(-1, x.shape[-1])
        mode, sizes = _number_of(IN_FLOAT32, rms_norm), rms_norm.calculate_settings(x.shape[-1])
        return rms_norm.rms_norm_backward(
            upstream.contiguous(), rows, weight, scales, 0.0, mode, *sizes, in_place=False, row_mode=None
        )

    @norm_gradient.register_fake
    def _(upstream: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return _like(upstream), torch.empty_like(weight)

    def keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight, output[1])

    def norm_backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        return (*norm_gradient(upstream, *ctx.saved_tensors), None)

    norm.register_autograd(norm_backward, setup_context=keep_norm)

    @torch.library.custom_op("gpt_53m::liger_add_norm", mutates_args=())
    def add_norm(x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        y, total, scales, *_ = fused_add_rms_norm.fused_add_rms_norm_forward(
            x.contiguous(), added.contiguous(), weight, epsilon, 0.0, IN_FLOAT32
        )
        return total, y, scales

    @add_norm.register_fake
    def _(x: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        return _like(x), _like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)

    @torch.library.custom_op("gpt_53m::liger_add_norm_gradient", mutates_args=())
    def add_norm_gradient(
        by_total: Tensor, by_norm: Tensor, total: Tensor, weight: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        mode = _number_of(IN_FLOAT32, fused_add_rms_norm)
        sizes = fused_add_rms_norm.calculate_settings(total.shape[-1])
        upstream = by_norm.contiguous(), by_total.contiguous()
        by_sum, _, by_weight = fused_add_rms_norm.fused_add_rms_norm_backward(
            *upstream, total, weight, scales, 0.0, mode, *sizes, num_stages=2, in_place=False
        )
        return by_sum, by_weight

    @add_norm_gradient.register_fake
    def _(by_total: Tensor, by_norm: Tensor, total: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return _like(by_norm), torch.empty_like(weight)

    def keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[0], inputs[2], output[2])

    def add_norm_backward(
        ctx: Any, by_total: Tensor, by_norm: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        by_sum, by_weight = add_norm_gradient(by_total, by_norm, *ctx.saved_tensors)
        return by_sum, by_sum, by_weight, None  # a sum passes its gradient on to both sides

    add_norm.register_autograd(add_norm_backward, setup_context=keep_add_norm)

    @torch.library.custom_op("gpt_53m::liger_gate", mutates_args=())
    def gate(gate_up: Tensor) -> Tensor:
        return swiglu.swiglu_fused_gate_up_forward(gate_up.contiguous())[1]

    @gate.register_fake
    def _(gate_up: Tensor) -> Tensor:
        return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @torch.library.custom_op("gpt_53m::liger_gate_gradient", mutates_args=())
    def gate_gradient(upstream: Tensor, gate_up: Tensor) -> Tensor:
        return swiglu.swiglu_fused_gate_up_backward(gate_up.contiguous(), upstream.contiguous()).view(gate_up.shape)

    @gate_gradient.register_fake
    def _(upstream: Tensor, gate_up: Tensor) -> Tensor:
        return _like(gate_up)

    gate.register_autograd(
        lambda ctx, upstream: gate_gradient(upstream, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )

    return PointwisePasses(
        normalise=lambda x, weight, epsilon: norm(x, weight, epsilon)[0],
        add_and_normalise=lambda x, added, weight, epsilon: add_norm(x, added, weight, epsilon)[:2],
        gate=lambda gate_up: gate(gate_up),  # a function can be copied with the model, the operation cannot
    )


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _number_of(mode: str, module: Any) -> int:
    """Liger's number for a way of rounding, which its gradients want in place of the name."""
    return int(module._str_to_casting_mode[mode])
