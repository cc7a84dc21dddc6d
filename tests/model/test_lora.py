"""Adapters learn beside frozen weights; merged, and read by `peft`, they are the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint import export_weights, save_model, write_model
from model.config import LoraSettings, ModelConfig, OptimizerConfig
from model.families import weight_names
from model.gpt import GPT
from model.lora import (
    adapt,
    count_adapter,
    export_adapter,
    import_adapter,
    load_adapter,
    merge,
    save_adapter,
)
from model.optimizer import build_optimizer
from model.training import parallelize, train_step
from tests.model.ranks import run_on_ranks
from tests.model.test_training import GLOBAL_TOKENS, VOCABULARY, Rows, global_batch, split

SIZES = {"num_layers": 2, "width": 32, "num_heads": 4, "context_length": 16, "mlp_width": 48}
CONFIGS = {
    "gpt2": ModelConfig(family="classic", tie_embeddings=True, **SIZES),
    "qwen3": ModelConfig(num_kv_heads=2, head_dim=6, **SIZES),
}
SETTINGS = LoraSettings(rank=3, alpha=12)


def tiny_model(kind: str, settings: LoraSettings | None = SETTINGS) -> GPT:
    torch.manual_seed(3)
    model = GPT(CONFIGS[kind], VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.clear_padding()
    if settings is not None:
        adapt(model, settings)
    return model


def learn(model: GPT, steps: int = 3, strategy: str = "none", rank: int | None = None) -> list[float]:
    module = parallelize(model, strategy=strategy)
    config = OptimizerConfig(kind="adamw", learning_rate=0.02, clip_norm=0.5)
    optimizer = build_optimizer(model, config, total_steps=steps)
    losses = []
    for step in range(steps):
        batch = global_batch(0)
        rows = split(batch, 4) if rank is None else [split(batch, 3, 1)[rank]]
        losses.append(train_step(module, optimizer, rows, step=step, global_tokens=GLOBAL_TOKENS).read()[0])
    return losses


@pytest.fixture(scope="module", params=list(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def learnt(kind: str) -> GPT:
    model = tiny_model(kind)
    losses = learn(model)
    assert losses[-1] < losses[0]
    return model.eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))


def opened_by_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM  # here: it takes seconds, and other processes need it not

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def merged_weights(model: GPT, settings: LoraSettings = SETTINGS) -> dict[str, Tensor]:
    weights = export_weights(model)
    merge(weights, export_adapter(model), settings, model.config)
    return weights


def test_an_adapter_begins_as_nothing_and_only_its_factors_are_learnt(kind: str, learnt: GPT, tokens: Tensor) -> None:
    plain, adapted = tiny_model(kind, None), tiny_model(kind)
    with torch.no_grad():
        assert torch.equal(plain(tokens), adapted(tokens))
        assert not torch.allclose(plain(tokens), learnt(tokens), atol=1e-2)
    before, after = export_weights(plain), export_weights(learnt)
    assert all(torch.equal(before[name], after[name]) for name in before)
    trained = [name for name, parameter in learnt.named_parameters() if parameter.grad is not None]
    assert trained and all(".down" in name or ".up." in name for name in trained)  # noqa: PT018
    assert count_adapter(CONFIGS[kind], SETTINGS) == sum(each.numel() for each in export_adapter(learnt).values())


def test_merged_is_the_same_model_in_transformers(learnt: GPT, tokens: Tensor, tmp_path: Path) -> None:
    write_model(tmp_path, learnt.config, learnt.vocab_size, merged_weights(learnt))
    theirs = opened_by_transformers(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, learnt(tokens), rtol=0, atol=1e-5)


def test_peft_reads_the_folder_and_computes_the_same(kind: str, learnt: GPT, tokens: Tensor, tmp_path: Path) -> None:
    import peft

    save_model(tmp_path / "base", tiny_model(kind, None))
    save_adapter(tmp_path / "adapter", export_adapter(learnt), SETTINGS, learnt.config, str(tmp_path / "base"))
    base = opened_by_transformers(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, learnt(tokens), rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.merge_and_unload()(tokens).logits, learnt(tokens), rtol=0, atol=1e-5)


def test_an_adapter_comes_back_from_its_folder_to_the_last_bit(kind: str, learnt: GPT, tmp_path: Path) -> None:
    save_adapter(tmp_path, export_adapter(learnt), SETTINGS, learnt.config, "base")
    again = tiny_model(kind)
    import_adapter(again, load_adapter(tmp_path), "disk")
    for name, ours in again.named_parameters():
        assert torch.equal(ours, learnt.get_parameter(name)), name
    with pytest.raises(ValueError, match="another adapter"):
        import_adapter(tiny_model(kind, LoraSettings(2, 4)), load_adapter(tmp_path), "disk")
    with pytest.raises(ValueError, match="which this adapter has not"):
        import_adapter(tiny_model(kind, LoraSettings(3, 4, ("c_attn", "q_proj")[kind == "qwen3" :][:1])),
                       load_adapter(tmp_path), "disk")  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "targets", "matrices"),
    [
        ("qwen3", ("q_proj", "v_proj"), 4),
        ("qwen3", ("mlp.up_proj",), 2),
        ("gpt2", ("attn.c_proj",), 2),
        ("gpt2", ("c_proj",), 4),
    ],
)
def test_targets_are_the_ends_of_hugging_faces_names(
    kind: str, targets: tuple[str, ...], matrices: int, tokens: Tensor, tmp_path: Path
) -> None:
    settings = LoraSettings(2, 8, targets)
    model = tiny_model(kind, settings)
    learn(model, steps=2)
    adapter = export_adapter(model)
    assert len(adapter) == 2 * matrices
    assert all(any(f".{target}.lora_" in name for target in targets) for name in adapter)
    write_model(tmp_path, model.config, model.vocab_size, merged_weights(model, settings))
    theirs = opened_by_transformers(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model.eval()(tokens), rtol=0, atol=1e-5)
    save_adapter(tmp_path, adapter, settings, model.config, "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(targets)


def test_an_unknown_target_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'c_attn', which this model has not; it has down_proj, gate_proj, k_proj"):
        tiny_model("qwen3", LoraSettings(2, 8, ("q_proj", "c_attn")))


def test_every_matrix_of_every_family_has_its_own_factors(kind: str) -> None:
    named = {key.removesuffix(f".lora_{letter}.weight") for key in export_adapter(tiny_model(kind)) for letter in "AB"}
    matrices = {
        f"base_model.model.{name.removesuffix('.weight')}"
        for ours, theirs, _ in weight_names(CONFIGS[kind])
        if ours.startswith("blocks.") and ours.endswith(".weight") and "norm" not in ours
        for name in theirs
    }
    assert {name for name in named if "lora_" not in name} == matrices


def test_two_ranks_learn_the_same_adapter_with_ddp_and_fsdp2_as_one_alone(tmp_path: Path) -> None:
    run_on_ranks(learn_on_one_rank, tmp_path)


def learn_on_one_rank(rank: int) -> None:
    alone = tiny_model("qwen3")
    losses = learn(alone)
    expected = export_adapter(alone)
    for strategy in ("ddp", "fsdp"):
        model = tiny_model("qwen3")
        assert learn(model, strategy=strategy, rank=rank) == pytest.approx(losses, rel=1e-4), strategy
        for name, factor in export_adapter(model).items():
            torch.testing.assert_close(factor, expected[name], rtol=1e-3, atol=1e-4)


def test_the_heads_gradient_is_not_computed_where_it_is_frozen() -> None:
    model = tiny_model("qwen3")
    batch: Rows = global_batch(0)
    model.loss(batch.tokens, batch.targets).backward()
    assert model.head.weight.grad is None
    frozen = model.blocks[0].attention.qkv.down.grad.clone()
    model.zero_grad()
    model.head.weight.requires_grad_(True)
    model.loss(batch.tokens, batch.targets).backward()
    assert model.head.weight.grad is not None
    torch.testing.assert_close(model.blocks[0].attention.qkv.down.grad, frozen)
