"""Every tensor is where its partners are, wherever that is: all of it runs on `meta`, which refuses to meet the CPU."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from model import runner as runner_module
from model import training
from model.gpt import GPT, ModelConfig
from model.optimizer import OptimizerConfig, build_optimizer
from model.runner import TorchRunner
from model.sampling import SamplingSettings, filter_logits, penalize
from model.sequence import Work
from model.training import GraphedLoss, LossModule, train_step
from tests.model.rows import Rows

VOCABULARY = 70


class Unread:
    """A step's measures, of which `meta` has none to read."""

    def __init__(self, loss: Tensor, gradient_norm: Tensor, skipped: bool = False) -> None:
        assert loss.is_meta
        assert gradient_norm.is_meta


@pytest.fixture(autouse=True)
def a_pytorch_that_knows_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own refuses autocast and operations on lists of tensors there."""
    is_enabled, real = torch.is_autocast_enabled, torch.autocast
    for name in ("_has_foreach_support", "_device_has_foreach_support"):
        monkeypatch.setattr(torch.nn.utils.clip_grad, name, lambda *_: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and is_enabled(kind))
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **asked: nullcontext() if kind == "meta" else real(kind, **asked)
    )


def model_on_meta(family: str) -> GPT:
    return GPT(ModelConfig(family=family, num_layers=2, width=32, num_heads=2, context_length=16), VOCABULARY).to(
        "meta"
    )


def test_meta_refuses_to_meet_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="not on the expected device"):
        torch.ones(2, device="meta") + torch.ones(2)


@pytest.mark.parametrize("family", ["modern", "classic"])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("graphed", [False, True])
def test_a_training_step_stays_on_its_device(
    family: str, kind: str, graphed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "StepMeasures", Unread)
    model = model_on_meta(family)
    model.restarts_positions = True
    module = LossModule(model)
    if graphed:
        module = GraphedLoss(model)
        module.graphed.record = lambda compute, device: (compute, compute())
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, clip_norm=1.0, weight_decay=0.1), total_steps=4)
    rows = torch.randint(0, VOCABULARY, (2, 17))
    batch = Rows(rows[:, :-1], rows[:, 1:])
    packed = Rows(batch.tokens, batch.targets, torch.arange(16).repeat(2, 1) // 5)
    for step in range(1 if graphed else 3):  # an update that is recorded is kept on the host meanwhile
        train_step(module, optimizer, [batch, packed], step=step, global_tokens=64)
    assert all(weight.grad is not None and weight.grad.is_meta for weight in model.parameters())
    assert all(each.is_meta or each.ndim == 0 for each in optimizer.tensors()), "AdamW counts its steps on the host"


@pytest.mark.parametrize("family", ["modern", "classic"])
@pytest.mark.parametrize("batches_slots", [False, True])
def test_generation_stays_on_its_device(family: str, batches_slots: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "find_best", lambda logits: [])  # `meta` has no numbers to read
    runner = TorchRunner(model_on_meta(family), 3, "float32", use_graph=False)
    runner.batches_slots = batches_slots  # as on a GPU
    if batches_slots:
        runner.width = 3
    runner.run([Work(0, 0, [1, 2, 3, 4, 5], 1)])
    runner.copy(0, 1, 5)
    logits = runner.run([Work(0, 5, [6], 1), Work(1, 5, [7, 8], 2)])
    assert logits.is_meta
    runner.clear(0)
    settings = SamplingSettings(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, typical_p=0.9, logit_bias={3: -1.0}, presence_penalty=0.5
    )
    logits = logits.clone()
    penalize(logits[0], settings, [1], [])
    assert filter_logits(logits, [settings] * 3).is_meta
