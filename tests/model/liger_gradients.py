"""Run with TRITON_INTERPRET=1 by a Python that has Liger: a model's loss and gradients by its kernels and by PyTorch's.

Prints {"float32": {"loss": [ours, Liger's], "gradients": the largest difference, of each weight's largest gradient},
...}, and how many graphs a compiled training has with Liger's kernels in it.
"""

import json
from typing import Any

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import fused_add_rms_norm, rms_norm
from triton.runtime import interpreter

from model.gpt import GPT, ModelConfig
from model.optimizer import OptimizerConfig, build_optimizer
from model.training import autocast, parallelize, train_step
from tests.model.rows import Rows
from tests.model.test_compile import CountingBackend

# Fewer channels than a kernel's tile, and more; a length that is no multiple of anything.
MODEL = ModelConfig(num_layers=2, width=96, num_heads=3, context_length=11, mlp_width=160)
VOCABULARY = 70


def fit_the_interpreter() -> None:
    """Have it do what a compiled kernel does: floats come in as tensors of float32, and CUDA's rsqrt is Triton's."""
    for module in (rms_norm, fused_add_rms_norm):
        module.rsqrt = lambda x: tl.math.rsqrt(x)  # looked up while the interpreter has put its own there
    convert = interpreter._implicit_cvt

    def convert_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = convert_floats


def rows() -> Rows:
    tokens = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    return Rows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def learn(pointwise: str, precision: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = GPT(MODEL, VOCABULARY)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape) * 0.05  # no norm is all ones, and no block the identity
    module = parallelize(model, pointwise=pointwise)
    batch = rows()
    with autocast("cpu", precision):
        nats = module(batch.tokens, batch.targets)
    nats.backward()
    return nats.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def compare(precision: torch.dtype) -> dict[str, Any]:
    loss, expected = learn("torch", precision)
    theirs, gradients = learn("liger", precision)
    assert gradients.keys() == expected.keys()
    differences = [
        ((gradients[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in expected
    ]
    return {"loss": [loss, theirs], "gradients": max(differences)}


def count_graphs() -> int:
    backend, real_compile = CountingBackend(), torch.compile

    def compile_with_counting(function: Any, **asked: Any) -> Any:
        return real_compile(function, dynamic=asked["dynamic"], fullgraph=True, backend=backend)

    torch.compile = compile_with_counting  # type: ignore[assignment]
    model = GPT(MODEL, VOCABULARY)
    module = parallelize(model, compile=True, pointwise="liger")
    optimizer = build_optimizer(model, OptimizerConfig(kind="adamw"), total_steps=4)
    for step in range(2):
        train_step(module, optimizer, [rows()], step=step, global_tokens=22)
    return len(backend.graphs)


if __name__ == "__main__":
    # float16 for 16 bits: the interpreter has no numbers of bfloat16.
    fit_the_interpreter()
    torch.set_num_threads(1)  # one share of the batch
    found: dict[str, Any] = {str(kind)[6:]: compare(kind) for kind in (torch.float32, torch.float16)}
    print(json.dumps(found | {"graphs": count_graphs()}))
