"""What only GPUs run, as far as a CPU can say: a recorded micro-batch learns what an unrecorded one does."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model import training
from model.gpt import GPT, ModelConfig
from model.gpu_steps import FLASH_VERSIONS, GraphedGradients, use_flash_attention
from model.optimizer import OptimizerConfig, build_optimizer
from model.training import GraphedLoss, LossModule, parallelize, train_step
from pipeline.config import TrainConfig

VOCABULARY = 70


@dataclass
class Rows:
    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None = None


def batches(step: int) -> list[Rows]:
    """Of two shapes; the last has documents."""
    generator = torch.Generator().manual_seed(step)
    rows = [torch.randint(0, VOCABULARY, (size, 9), generator=generator) for size in (2, 3, 2)]
    found = [Rows(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in rows]
    found[2].document_ids = torch.arange(8).repeat(2, 1) // 3
    return found


class Recorder:
    """In place of a CUDA graph: warms up and computes as a recording does, and replays by computing again.

    As with a graph, what is replayed reads and writes the tensors that were there when it was recorded.
    """

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, compute: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        self.recordings += 1
        for _ in range(3):
            compute()
        result = compute()

        def replay() -> None:
            self.replays += 1
            result.copy_(compute())

        return replay, result


def train(precision: torch.dtype, recorder: Recorder | None, steps: int = 3) -> tuple[GPT, list[float]]:
    torch.manual_seed(0)
    model = GPT(ModelConfig(num_layers=2, width=32, num_heads=2, context_length=8), VOCABULARY)
    module: LossModule = LossModule(model)
    if recorder is not None:
        module = GraphedLoss(model)
        module.graphed.record = recorder
    optimizer = build_optimizer(model, OptimizerConfig(clip_norm=0.5), total_steps=10)
    losses = []
    for step in range(steps):
        tokens = 7 * 8
        measures = train_step(module, optimizer, batches(step), step=step, global_tokens=tokens, precision=precision)
        losses.append(measures.read()[0])
    return model, losses


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recorded_micro_batches_learn_what_unrecorded_ones_do(precision: torch.dtype) -> None:
    recorder = Recorder()
    graphed, losses = train(precision, recorder)
    plain, expected = train(precision, None)
    assert losses == expected
    for ours, theirs in zip(graphed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert recorder.recordings == 2, "one for each shape; documents are not recorded"
    assert recorder.replays == 6


def test_gradients_keep_their_place_and_begin_each_step_at_zero() -> None:
    model = GPT(ModelConfig(num_layers=1, width=16, num_heads=2, context_length=8), VOCABULARY)
    graphed = GraphedGradients(model, LossModule(model), Recorder())
    places = []
    for _ in range(2):
        for weight in model.parameters():
            weight.grad = None
        graphed.add(batches(0)[0], 1.0, torch.float32)
        places.append([(weight.grad.data_ptr(), weight.grad.norm().item()) for weight in graphed.weights])
    assert places[0] == places[1]


def test_graphs_are_for_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(ModelConfig(num_layers=1, width=16, num_heads=2, context_length=8), VOCABULARY)
    assert not isinstance(parallelize(model, graphs=True), GraphedLoss), "this is a CPU"

    class OnGpu:
        """Where its weights are, is all that is asked of them."""

        device = torch.device("cuda")

    model.embedding = type("Embedding", (torch.nn.Module,), {"weight": OnGpu()})()
    assert isinstance(parallelize(model, graphs=True), GraphedLoss)
    assert not isinstance(parallelize(model), GraphedLoss)
    assert not hasattr(training, "record_graph"), "a graph is recorded in one place"


def test_flash_attention_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    use_flash_attention("2")
    asked = []

    def activate(name: str) -> None:
        asked.append(name)
        raise ModuleNotFoundError("No module named 'flash_attn_interface'")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    with pytest.raises(ValueError, match=r"train.flash_attention=3 cannot be used here .*flash_attn_interface"):
        use_flash_attention("3")
    assert asked == ["FA3"]
    with pytest.raises(ValueError, match="flash_attention"):
        TrainConfig(flash_attention="5")
    assert all(TrainConfig(flash_attention=version) for version in FLASH_VERSIONS)


def test_pytorch_knows_the_versions_that_can_be_set() -> None:
    assert {f"FA{version}" for version in FLASH_VERSIONS[1:]} <= set(torch.nn.attention.list_flash_attention_impls())
