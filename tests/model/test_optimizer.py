"""The optimizers against torch's, against an SVD, and against a table."""

import io

import pytest
import torch

from model.gpt import GPT, ModelConfig
from model.optimizer import (
    Optimizer,
    OptimizerConfig,
    build_optimizer,
    compiled_orthogonalise,
    orthogonalise,
    schedule,
)

TINY = ModelConfig(num_layers=2, width=16, num_heads=2, context_length=8, mlp_width=32)


def tiny_model() -> GPT:
    torch.manual_seed(3)
    return GPT(TINY, 70)


def learn(model: GPT, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 70, (4, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model.loss(tokens[:, :-1], tokens[:, 1:]) / 32).backward()
        optimizer.step(step)


def test_adamw_steps_as_torch_does() -> None:
    config = OptimizerConfig(kind="adamw", learning_rate=1e-2, weight_decay=0.3, decay_fraction=0.0)
    model, twin = tiny_model(), tiny_model()
    matrices = [parameter for parameter in twin.parameters() if parameter.ndim >= 2]
    scalars = [parameter for parameter in twin.parameters() if parameter.ndim < 2]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": scalars, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        foreach=False,
    )
    learn(model, build_optimizer(model, config, total_steps=10), range(3))
    for step in range(3):
        tokens = torch.randint(0, 70, (4, 9), generator=torch.Generator().manual_seed(step))
        theirs.zero_grad()
        (twin.loss(tokens[:, :-1], tokens[:, 1:]) / 32).backward()
        theirs.step()
    for (name, ours), parameter in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("shape", [(3, 24, 64), (3, 64, 24), (1, 48, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalisation_stays_within_its_bound_of_an_svd(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalise(matrices.to(dtype)).float()
    # Five steps bring singular values from a thousandth of the largest upwards to between 0.858 and 1.142.
    slack = 0.001 if dtype == torch.float32 else 0.02
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.858 - slack
    assert values.max() < 1.142 + slack
    assert (found - left @ right).norm() / (left @ right).norm() < 0.142 + slack


@pytest.mark.slow
def test_the_compiled_orthogonalisation_is_the_same() -> None:
    matrices = torch.randn(2, 16, 24)
    torch.testing.assert_close(compiled_orthogonalise()(matrices), orthogonalise(matrices), rtol=1e-4, atol=1e-4)


def test_muon_moves_each_matrix_of_a_fused_weight_on_its_own() -> None:
    config = OptimizerConfig(muon_learning_rate=0.1, weight_decay=0.0, momentum_start=0.95, decay_fraction=0.0)
    model = tiny_model()
    before = model.blocks[0].attention.qkv.weight.detach().clone()
    learn(model, build_optimizer(model, config, total_steps=10), range(1))
    gradient = model.blocks[0].attention.qkv.weight.grad
    for rows in torch.arange(48).split(16):
        moved = (before - model.blocks[0].attention.qkv.weight.detach())[rows] / 0.1
        if not gradient[rows].any():
            continue
        expected = orthogonalise(gradient[rows][None])[0]
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-3)


def test_products_in_bfloat16_leave_weights_and_momenta_in_float32() -> None:
    models = [tiny_model(), tiny_model()]
    optimizers = [
        build_optimizer(model, OptimizerConfig(), 10, precision)
        for model, precision in zip(models, (torch.float32, torch.bfloat16), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        drawn = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=drawn)
        optimizer.step(0)
    before = dict(tiny_model().named_parameters())
    for (name, exact), rough in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert rough.dtype == torch.float32
        moved, error = exact - before[name], rough - exact
        assert error.norm() <= 0.05 * moved.norm(), name
    assert any(not torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))
    exact_momenta, momenta = (optimizer.state_dict()["muon"] for optimizer in optimizers)
    for name, momentum in momenta.items():
        torch.testing.assert_close(momentum, exact_momenta[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_goes_on_from_its_state_as_if_never_stopped(kind: str) -> None:
    config = OptimizerConfig(kind=kind, momentum_warmup_steps=4)
    model = tiny_model()
    optimizer = build_optimizer(model, config, total_steps=6)
    learn(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = tiny_model()
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = build_optimizer(resumed, config, total_steps=6)
    resumed_optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert resumed_optimizer.learning_rates() == optimizer.learning_rates()
    learn(model, optimizer, range(3, 6))
    learn(resumed, resumed_optimizer, range(3, 6))
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_kind_of_optimizer_is_refused() -> None:
    model = tiny_model()
    state = build_optimizer(model, OptimizerConfig(kind="adamw"), 5).state_dict()
    with pytest.raises(ValueError, match="start a new run"):
        build_optimizer(model, OptimizerConfig(), 5).load_state_dict(state)


def test_the_schedules_follow_a_table_computed_by_hand() -> None:
    # 10 steps: 2 of warm-up, a constant peak, and from step 6 a fall over 4 steps towards 0.2.
    linear = OptimizerConfig(warmup_steps=2, decay_fraction=0.4, final_ratio=0.2)
    table = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4]
    assert [schedule(linear, step, 10) for step in range(10)] == pytest.approx(table)
    assert schedule(linear, 10, 10) == pytest.approx(0.2)
    # Half a cosine from step 2 to step 10: at 6 it is half-way between 1 and 0.2.
    cosine = OptimizerConfig(schedule="cosine", warmup_steps=2, final_ratio=0.2)
    table = [0.5, 1.0, 1.0, 0.969552, 0.882843, 0.753073, 0.6, 0.446927, 0.317157, 0.230448]
    assert [schedule(cosine, step, 10) for step in range(10)] == pytest.approx(table, abs=1e-6)
    constant = OptimizerConfig(decay_fraction=0.0)
    assert [schedule(constant, step, 10) for step in (0, 9)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "sgd"}, "muon or adamw"),
        ({"schedule": "step"}, "linear or cosine"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number"),
        ({"muon_learning_rate": float("inf")}, "muon_learning_rate must be a positive number"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number"),
        ({"beta2": 1.0}, "beta2"),
        ({"decay_fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**settings)
