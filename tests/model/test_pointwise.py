"""Whose kernels compute a block between its matrix products: the same loss and gradients, and one sentence without."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import training
from model.gpt import GPT, Block, ModelConfig
from model.liger import liger_passes
from model.pointwise import TORCH_PASSES, add_and_normalise, gate, normalise
from model.training import parallelize
from pipeline.config import TrainConfig

ROOT = Path(__file__).parents[2]
MODERN = ModelConfig(num_layers=2, width=32, num_heads=2, context_length=8)


def test_norm_and_gate_are_those_of_the_papers() -> None:
    x, added, weight = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.randn(8)
    expected = x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight
    assert torch.allclose(normalise(x, weight, 1e-6), expected, atol=1e-6)
    total, normalised = add_and_normalise(x, added, weight, 1e-6)
    assert torch.equal(total, x + added)
    assert torch.equal(normalised, normalise(x + added, weight, 1e-6))
    first, second = x[..., :4], x[..., 4:]
    assert torch.allclose(gate(x), first / (1 + (-first).exp()) * second, atol=1e-6)


def test_blocks_use_the_passes_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def note(name: str) -> object:
        def run(*inputs: object) -> object:
            used.append(name)
            return getattr(TORCH_PASSES, name)(*inputs)

        return run

    names = ("normalise", "add_and_normalise", "gate")
    noted = replace(TORCH_PASSES, **{name: note(name) for name in names})
    monkeypatch.setattr(training, "liger_passes", lambda: noted)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    for family, expected in (("modern", [*names] * 2), ("classic", [])):
        model = GPT(replace(MODERN, family=family), 70)
        plain = model.loss(tokens, tokens)
        asked = parallelize(model, pointwise="liger")
        used.clear()
        assert torch.equal(asked(tokens, tokens), plain)
        assert used == expected, family
    other = GPT(MODERN, 70)
    assert all(block.mlp.passes is TORCH_PASSES for block in other.blocks if isinstance(block, Block))


def test_a_setting_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"train\.pointwise"):
        TrainConfig(pointwise="quack")
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    liger_passes.cache_clear()
    with pytest.raises(ValueError, match=r"needs Liger's kernels .*pip install 'gpt-53m\[liger\]'"):
        parallelize(GPT(MODERN, 70), pointwise="liger")


def python_with_liger() -> str | None:
    """A Python that has Liger: this one, or the one that LIGER_PYTHON names."""
    return sys.executable if importlib.util.find_spec("liger_kernel") else os.environ.get("LIGER_PYTHON")


@pytest.mark.slow
@pytest.mark.skipif(python_with_liger() is None, reason="needs Liger, here or in the Python that LIGER_PYTHON names")
def test_ligers_kernels_give_the_loss_and_gradients_of_pytorchs() -> None:
    done = subprocess.run(
        [str(python_with_liger()), "-m", "tests.model.liger_gradients"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # float16 keeps 11 bits of a number: it is rounded by one part in 2,048 after each pass.
    for precision, share in (("float32", 1e-5), ("float16", 4e-3)):
        ours, theirs = found[precision]["loss"]
        assert theirs == pytest.approx(ours, rel=share / 10)
        assert found[precision]["gradients"] < share, precision
    assert found["graphs"] == 2, "a block, and a chunk of the loss"
