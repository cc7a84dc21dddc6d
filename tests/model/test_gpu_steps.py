"""What only GPUs run, as far as a CPU can say: a recorded step learns what an unrecorded one does."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from model import training
from model.documents import Documents, find_documents
from model.gpt import GPT, ModelConfig
from model.gpu_steps import FLASH_VERSIONS, GraphedGradients, use_flash_attention
from model.optimizer import Optimizer, OptimizerConfig, build_optimizer
from model.training import GraphedLoss, LossModule, autocast, parallelize, train_step
from pipeline.config import TrainConfig
from tests.model.ranks import run_on_ranks
from tests.model.rows import Rows

VOCABULARY = 70


def batches(step: int) -> list[Rows]:
    """Of two shapes; the last has documents."""
    generator = torch.Generator().manual_seed(step)
    rows = [torch.randint(0, VOCABULARY, (size, 9), generator=generator) for size in (2, 3, 2)]
    found = [Rows(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in rows]
    found[2].document_ids = torch.arange(8).repeat(2, 1) // 3
    return found


class Tape(TorchDispatchMode):
    """The operations of a computation, and the tensors that each read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def play(self) -> None:
        """Do it all again: same operations, same numbers, in the same memory."""
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for new, old in zip(tree_leaves(again), tree_leaves(result), strict=True):
                if isinstance(new, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class Recorder:
    """In place of CUDA graphs: warms up as a recording does, and replays a tape.

    As with a graph, a replay knows nothing of Python: it reads and writes the memory of the recording, and a number
    that was no tensor stays what it was.
    """

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, compute: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        self.recordings += 1
        for _ in range(3):
            compute()
        tape = Tape()
        with tape:
            result = compute()

        def replay() -> None:
            self.replays += 1
            with _disable_current_modes():  # one launch to whoever counts, whatever is in it
                tape.play()

        return replay, result


def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(num_layers=2, width=32, num_heads=2, context_length=8), VOCABULARY)


def graphed(model: GPT, recorder: Recorder, is_spread: bool = False, **asked: torch.dtype) -> GraphedLoss:
    module = GraphedLoss(model, is_spread=is_spread, **asked)
    module.graphed.record = recorder
    return module


def train(module: torch.nn.Module, optimizer: Optimizer, steps: range = range(4)) -> list[float]:
    return [train_step(module, optimizer, batches(step), step=step, global_tokens=56).read()[0] for step in steps]


def build(model: GPT, kind: str = "muon") -> Optimizer:
    # Long warm-ups: rates and momentum change with each step. What a replay reads of them must too.
    config = OptimizerConfig(
        kind=kind, clip_norm=0.5, warmup_steps=4, momentum_warmup_steps=4, weight_decay=0.1, weight_decay_to_zero=True
    )
    return build_optimizer(model, config, total_steps=10)


def assert_near(ours: GPT, theirs: GPT, tolerance: float = 1e-6) -> None:
    for name, weight in ours.named_parameters():
        assert torch.allclose(weight, theirs.get_parameter(name), atol=tolerance), name


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_recorded_step_learns_what_an_unrecorded_one_does(kind: str) -> None:
    recorder, model, plain = Recorder(), tiny_model(), tiny_model()
    losses = train(graphed(model, recorder), build(model, kind))
    assert losses == pytest.approx(train(LossModule(plain), build(plain, kind)), abs=1e-5)
    assert_near(model, plain)
    assert recorder.recordings == 3, "one for each shape, documents are not recorded; and one for the update"
    assert recorder.replays == 4 * 2 + 3, "the first update makes the moments"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recorded_micro_batches_have_the_bits_of_unrecorded_ones(precision: torch.dtype) -> None:
    model = tiny_model()
    module = graphed(model, Recorder())
    for rows in batches(0) * 2:
        module.add_gradients(rows, 0.1, precision)
    found = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    for rows in batches(0) * 2:
        with autocast("cpu", precision):
            nats = model.loss(rows.tokens, rows.targets, describe(rows))
        (nats * 0.1).backward()
    for ours, weight in zip(found, model.parameters(), strict=True):
        assert torch.equal(ours, weight.grad)


def describe(rows: Rows) -> Documents | None:
    return None if rows.document_ids is None else find_documents(rows.document_ids)


def test_a_resume_brings_moments_that_are_recorded_anew() -> None:
    """The loaded moments lie elsewhere: a replay of the old recording would go on from the old ones."""
    model, plain = tiny_model(), tiny_model()
    pairs = []
    for each, module in ((model, graphed(model, Recorder())), (plain, LossModule(plain))):
        optimizer = build(each)
        train(module, optimizer, steps=range(3))
        state = optimizer.state_dict()
        train(module, optimizer, steps=range(3, 5))
        optimizer.load_state_dict(state)
        pairs.append(train(module, optimizer, steps=range(3, 6)))
    assert pairs[0] == pytest.approx(pairs[1], abs=1e-5)
    assert_near(model, plain)


def test_a_bad_loss_leaves_weights_and_moments_alone() -> None:
    model = tiny_model()
    module, optimizer = graphed(model, Recorder()), build(model)
    train(module, optimizer, steps=range(3))
    kept = model.embedding.weight.detach().clone()
    model.embedding.weight.data[:, 0] = torch.inf
    before = [each.detach().clone() for each in optimizer.tensors()]
    assert train_step(module, optimizer, batches(3), step=3, global_tokens=56, skip_bad_loss=True).skipped
    assert all(torch.equal(old, new) for old, new in zip(before, optimizer.tensors(), strict=True))
    model.embedding.weight.data.copy_(kept)
    assert not train_step(module, optimizer, batches(4), step=4, global_tokens=56, skip_bad_loss=True).skipped
    assert all(torch.isfinite(each).all() for each in optimizer.tensors())


def test_launches_of_a_step_do_not_grow_with_the_model() -> None:
    counts = []
    for layers in (1, 4):
        launches = Tape()
        torch.manual_seed(0)
        model = GPT(ModelConfig(num_layers=layers, width=32, num_heads=2, context_length=8), VOCABULARY)
        module = graphed(model, Recorder())
        optimizer, rows = build(model), batches(0)[:2]
        for step in range(3):
            train_step(module, optimizer, rows, step=step, global_tokens=40)
        with launches:
            train_step(module, optimizer, rows, step=3, global_tokens=40)
        counts.append(len(launches.calls))
    assert counts[0] == counts[1] < 30, "without graphs 778, and 2,107"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_gpus_graphs_learn_what_single_launches_do(compiles: bool, kind: str, precision: torch.dtype) -> None:
    losses = []
    for graphs in (False, True):
        model = tiny_model().to("cuda")
        module = parallelize(model, compile=compiles, graphs=graphs)
        assert isinstance(module, GraphedLoss) == graphs
        optimizer = build(model, kind)
        losses.append([])
        for step in range(8):
            if step == 4:  # as after a resume
                optimizer.load_state_dict(optimizer.state_dict())
            measures = train_step(module, optimizer, batches(step), step=step, global_tokens=56, precision=precision)
            losses[-1].append(measures.read()[0])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3 if precision == torch.float32 else 5e-2)


def train_spread(folder: Path, rank: int) -> None:
    for precision in (torch.float32, torch.bfloat16):
        recorder, model, plain = Recorder(), tiny_model(), tiny_model()
        with torch.no_grad():
            model.embedding.weight += rank  # the ranks begin with rank 0's weights
        module = graphed(model, recorder, is_spread=True, gradient_precision=precision)
        ddp = parallelize(plain, strategy="ddp", gradient_precision=precision)
        losses = [[], []]
        for which, (each, optimizer) in enumerate(((module, build(model)), (ddp, build(plain)))):
            for step in range(4):
                # Uneven shares: one rank has one micro-batch, the other two.
                mine = batches(step)[:1] if rank else batches(step)[1:]
                losses[which].append(train_step(each, optimizer, mine, step=step, global_tokens=56).read()[0])
        assert losses[0] == pytest.approx(losses[1], abs=1e-5 if precision == torch.float32 else 1e-3)
        assert_near(model, plain, 1e-6 if precision == torch.float32 else 1e-3)
        assert recorder.recordings == 2
        torch.save([weight.detach() for weight in model.parameters()], folder / f"{precision}-{rank}.pt")


def test_ranks_add_up_recorded_gradients_as_ddp_does(tmp_path: Path) -> None:
    run_on_ranks(partial(train_spread, tmp_path), tmp_path)
    for precision in (torch.float32, torch.bfloat16):
        ours, theirs = (torch.load(tmp_path / f"{precision}-{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True)), "the ranks agree"


def test_gradients_keep_their_place_and_begin_each_step_at_zero() -> None:
    model = GPT(ModelConfig(num_layers=1, width=16, num_heads=2, context_length=8), VOCABULARY)
    gradients = GraphedGradients(model, GraphedLoss(model).compute, Recorder())
    places = []
    for _ in range(2):
        for weight in model.parameters():
            weight.grad = None
        gradients.add(batches(0)[0], 1.0, torch.float32)
        places.append([(weight.grad.data_ptr(), weight.grad.norm().item()) for weight in gradients.weights])
    assert places[0] == places[1]


def test_graphs_are_for_gpus_that_hold_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(ModelConfig(num_layers=1, width=16, num_heads=2, context_length=8), VOCABULARY)
    assert not isinstance(parallelize(model, graphs=True), GraphedLoss), "this is a CPU"

    class OnGpu:
        """Where its weights are, is all that is asked of them."""

        device = torch.device("cuda")

    model.embedding = type("Embedding", (torch.nn.Module,), {"weight": OnGpu()})()
    assert isinstance(parallelize(model, graphs=True), GraphedLoss)
    spread = []
    monkeypatch.setattr(training.dist, "broadcast", lambda weight, source: spread.append(source))
    assert isinstance(parallelize(model, graphs=True, strategy="ddp"), GraphedLoss)
    assert set(spread) == {0}
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
