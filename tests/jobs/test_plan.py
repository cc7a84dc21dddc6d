"""The plan of every preset prints, adds up, and agrees with what the model really holds."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.plan import main
from model.budget import activations_per_token, estimate_memory, estimate_step, orthogonalisation_flops
from model.config import LoraSettings
from model.gpt import GPT, ModelConfig, flops_per_token
from model.gpus import Gpu, find_gpu
from model.optimizer import OptimizerConfig
from model.roofline import launch_seconds, product_share, roofline
from model.training import MAX_SHARES, SharedLoss, count_shares, parallelize

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "jobs" / "presets").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_has_a_plan(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(preset), "--gpu", "h200"]) == 0
    printed = capsys.readouterr().out
    for word in ("parameters", "FLOPs per token", "activations", "GPU time", "pointwise", "head and loss", "launches"):
        assert word in printed


def test_the_reference_shapes_have_their_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    presets = {path.stem: str(path) for path in PRESETS}
    main([presets["gpt2-124m"]])
    assert "124,439,808" in capsys.readouterr().out


SMALL = ModelConfig(num_layers=2, width=64, num_heads=2, num_kv_heads=1, mlp_width=100, context_length=128)


def parts_of(model: ModelConfig, gpu: Gpu, tokens: int = 1024, micro_batches: int = 1) -> dict[str, float]:
    found = roofline(model, OptimizerConfig("adamw"), 256, tokens=tokens, micro_batches=micro_batches, gpu=gpu)
    return {part.name: part.seconds for part in found}


def test_a_steps_parts_are_flops_over_the_peak_and_bytes_over_the_bandwidth() -> None:
    gpu = Gpu("round", 1e12, 80, 1e9, 1e9, 1e9)
    found = parts_of(SMALL, gpu)
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 100)
    assert found["products"] == pytest.approx(6 * weights * 1024 / (0.58 * 1e12))
    numbers = 23 * 64 + 5 * (64 + 32) + 9 * 100
    assert found["pointwise"] == pytest.approx(2 * 2 * numbers * 1024 / (0.85 * 1e9))
    assert found["head and loss"] == pytest.approx(6 * 256 * 64 * 1024 / 0.58e12 + 6 * 256 * 1024 / 0.85e9)
    assert found["attention"] == pytest.approx(7 * 128 * 64 * 2 * 1024 / 0.35e12)
    # Twice the tokens take twice the time, but the optimizer's; a faster memory leaves the products alone.
    twice = parts_of(SMALL, gpu, tokens=2048)
    assert all(twice[name] == pytest.approx(2 * found[name]) for name in found if name != "rest")
    assert found["rest"] < twice["rest"] < 2 * found["rest"]
    faster = parts_of(SMALL, replace(gpu, memory_bytes_per_second=2e9))
    assert faster["products"] == found["products"]
    assert faster["pointwise"] == pytest.approx(found["pointwise"] / 2)
    assert parts_of(SMALL, gpu, micro_batches=4)["rest"] > found["rest"]
    assert launch_seconds(SMALL, 8) == 8 * launch_seconds(SMALL, 1)


def test_wide_products_are_a_larger_part_and_reach_more_of_the_peak() -> None:
    h100 = find_gpu("h100")
    assert h100 is not None
    shares = []
    for width, heads, mlp_width in ((512, 4, 1280), (768, 6, 2048), (2048, 16, 5504)):
        found = parts_of(ModelConfig(num_layers=12, width=width, num_heads=heads, mlp_width=mlp_width), h100)
        shares.append(found["products"] / sum(found.values()))
    assert shares == sorted(shares)
    assert product_share(512) < product_share(768) < product_share(4096) < 1


def test_what_does_not_fit_says_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    large = [str(PRESETS[0]), "model.width=16384", "model.num_heads=128", "model.num_layers=24"]
    large += ["train.batch_tokens=1048576"]
    assert main([*large, "train.num_workers=8"]) == 0
    printed = capsys.readouterr().out
    assert "  does not fit" in printed
    assert "GB are weights, gradients and moments, whatever the batch" in printed
    assert main([*large, "train.num_workers=[64,512]", "train.sharding=fsdp", "train.micro_batch_sequences=1"]) == 0
    printed = capsys.readouterr().out
    assert "memory of one GPU of 64 that share the model" in printed
    assert "  fits" in printed
    assert "FSDP gathers the weights" in printed
    assert "DDP sums" not in printed
    assert main([*large, "train.num_workers=64", "train.sharding=fsdp", "train.micro_batch_sequences=4096"]) == 0
    assert "grow with train.micro_batch_sequences, now 4096: lower that first" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", ["H100", "a100-80gb", "NVIDIA L40S", "rtx4090"])
def test_a_gpu_is_known_by_any_of_its_names(gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(PRESETS[0]), "--gpu", gpu, "--mfu", "40%"]) == 0
    assert "at 40% of its" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--gpu", "h1000", "no GPU 'h1000' is known; there are"),
        ("--mfu", "forty", "write 0.4 or 40%"),
        ("--gpus-per-node", "0", "is no number of GPUs"),
        ("--network-gigabits", "-1", "is no network"),
    ],
)
def test_an_unknown_gpu_and_a_share_that_is_none_are_told(
    option: str, value: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(PRESETS[0]), option, value])
    assert words in capsys.readouterr().err


def seconds_per_step(printed: str, gpus: int) -> float:
    (line,) = re.findall(rf"^ +{gpus} +([\d.]+) .*%", printed, re.MULTILINE)
    return float(line)


def test_eight_l40s_of_one_node_and_of_the_aws_file_are_not_alike(capsys: pytest.CaptureFixture[str]) -> None:
    preset = str(PRESETS[0].parent / "gpt-53m.yaml")
    assert main([preset, "--gpu", "l40s"]) == 0
    assert seconds_per_step(capsys.readouterr().out, 8) == pytest.approx(0.083, abs=0.001)
    # The line of infra/README.md: eight nodes of one L40S, each with 20 Gbit/s.
    (command,) = re.findall(r"python -m jobs\.plan (.*--gpus-per-node.*)", (ROOT / "infra/README.md").read_text())
    arguments = shlex.split(command.partition("#")[0])
    assert arguments[0] == "jobs/presets/gpt-53m.yaml"
    assert main([preset, *arguments[1:]]) == 0
    printed = capsys.readouterr().out
    assert seconds_per_step(printed, 8) == pytest.approx(0.245, abs=0.002)
    assert "2.50 GB/s per GPU between nodes" in printed
    assert "within a node" not in printed


def test_a_nodes_network_is_shared_by_its_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(PRESETS[0]), "--gpu", "h100", "--gpus-per-node", "4", "--network-gigabits", "400"])
    assert "12.50 GB/s per GPU between nodes" in capsys.readouterr().out


def test_a_short_training_is_told_in_minutes_or_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "train.steps=100"])
    assert " s " in capsys.readouterr().out.split("GPU time")[1]


def test_an_unknown_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(PRESETS[0]), "model.widht=64"]) == 2
    assert "model.width" in capsys.readouterr().err


def kept_bytes(model: GPT, tokens: torch.Tensor) -> int:
    """Bytes that autograd keeps of the blocks from the forward to the backward pass."""
    held: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.forward_hidden(tokens)
    total = sum(held.values())
    del hidden
    return total


@pytest.mark.parametrize("family", ["classic", "modern"])
def test_activations_are_about_what_autograd_keeps(family: str) -> None:
    config = ModelConfig(family=family, num_layers=3, width=64, num_heads=4, context_length=32)
    model = GPT(config, 128)
    tokens = torch.randint(0, 128, (4, 32))
    estimate = 4 * tokens.numel() * config.num_layers * activations_per_token(config)
    # Eager mode keeps some intermediate products that a compiled model computes again.
    assert 0.8 * estimate < kept_bytes(model, tokens) < 1.7 * estimate
    parallelize(model, recompute=True)
    # What is left: each block's input, the last norm's input and output, and the tokens.
    assert kept_bytes(model, tokens) <= 4 * tokens.numel() * config.width * (config.num_layers + 3)


def test_blocks_computed_again_take_less_memory() -> None:
    config, optimizer = ModelConfig(), OptimizerConfig()
    kept, again = (
        estimate_memory(config, optimizer, 8192, micro_batch_sequences=4, recompute=recompute)
        for recompute in (False, True)
    )
    assert again.activations < 0.3 * kept.activations
    assert again.total - again.activations == kept.total - kept.activations


def test_memory_grows_with_the_micro_batch_and_falls_with_sharding() -> None:
    config, optimizer = ModelConfig(), OptimizerConfig()
    small = estimate_memory(config, optimizer, 8192, micro_batch_sequences=4)
    large = estimate_memory(config, optimizer, 8192, micro_batch_sequences=8)
    sharded = estimate_memory(config, optimizer, 8192, micro_batch_sequences=4, shards=8)
    assert large.activations == 2 * small.activations
    assert sharded.optimizer * 8 == pytest.approx(small.optimizer)
    assert small.weights / 8 < sharded.weights < small.weights  # a block in use is gathered whole
    assert sharded.total < small.total < large.total


def test_an_adapter_has_gradients_and_moments_and_the_weights_have_none() -> None:
    config, optimizer = ModelConfig(), OptimizerConfig(kind="adamw")
    full, lora = (
        estimate_memory(config, optimizer, 8192, micro_batch_sequences=4, lora=lora)
        for lora in (None, LoraSettings(16, 32))
    )
    matrices = config.num_layers * (4 * 16 * 2 * 512 + 3 * 16 * (512 + config.mlp_channels))
    assert (lora.gradients, lora.optimizer) == (4 * matrices, 8 * matrices)
    assert lora.weights == full.weights + 4 * matrices
    assert lora.activations == full.activations
    assert lora.total < 0.8 * full.total


def test_a_frozen_model_costs_two_thirds_of_the_products() -> None:
    config = ModelConfig(num_layers=3, width=64, num_heads=4, mlp_width=128, context_length=16)
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * 128) + 64_000
    assert flops_per_token(config, 1000) - flops_per_token(config, 1000, is_frozen=True) == 2 * matrices


def test_threads_that_share_a_batch_hold_gradients_each() -> None:
    config, optimizer = ModelConfig(), OptimizerConfig()
    alone, two = (
        estimate_memory(config, optimizer, 8192, micro_batch_sequences=4, shares=shares, device="cpu")
        for shares in (1, 2)
    )
    assert two.gradients == 2 * alone.gradients
    assert two.activations == alone.activations


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_counts_shares_where_there_are_some(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    config = ModelConfig(family="classic", num_layers=1, width=8, num_heads=2, context_length=8, dropout=dropout)
    shares = isinstance(parallelize(GPT(config, 64)), SharedLoss)
    assert shares == (count_shares(2, MAX_SHARES, dropout) > 1) == (not dropout)


def test_muon_costs_what_its_products_do() -> None:
    config = ModelConfig(family="classic", num_layers=1, width=8, num_heads=2, mlp_width=32, context_length=4)
    attention = 4 * 5 * (4 * 8 * 8 * 8 + 2 * 8**3)
    mlp = 2 * 5 * (4 * 8 * 8 * 32 + 2 * 8**3)
    assert orthogonalisation_flops(config) == attention + mlp


def test_more_devices_are_faster_but_never_perfectly() -> None:
    config, optimizer = ModelConfig(), OptimizerConfig()
    steps = [
        estimate_step(
            config, optimizer, 8192, flops=1e14, flops_per_second=4e14, devices=devices, bytes_per_second=40e9
        )
        for devices in (1, 8, 64)
    ]
    assert steps[0].efficiency == 1.0
    assert steps[0].efficiency > steps[1].efficiency > steps[2].efficiency > 0
    assert [step.compute for step in steps] == sorted((step.compute for step in steps), reverse=True)


def test_another_program_reads_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(PRESETS[0].parent / "gpt-53m.yaml"), "--gpu", "l40s"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert f"{plan['parameters']:,}" in printed
    for part in plan["step_parts"]:
        assert f"{1000 * part['seconds']:.1f} ms" in printed
    (eight,) = [row for row in plan["speeds"] if row["gpus"] == 8]
    assert seconds_per_step(printed, 8) == pytest.approx(eight["seconds_per_step"], abs=5e-5)
    assert plan["memory_bytes"]["total"] == sum(v for k, v in plan["memory_bytes"].items() if k != "total")


def test_graphs_cost_no_launches_and_all_of_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for graphs in ("false", "true"):
        assert main([str(PRESETS[0].parent / "gpt-53m.yaml"), f"train.cuda_graphs={graphs}", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    plain, graphed = plans
    assert graphed["step_launch_seconds"] < plain["step_launch_seconds"] / 50
    assert graphed["speeds"][0] == plain["speeds"][0], "one GPU sends nothing"
    assert graphed["speeds"][-1]["seconds_per_step"] > plain["speeds"][-1]["seconds_per_step"]
    assert main([str(PRESETS[0].parent / "gpt-53m.yaml"), "train.cuda_graphs=true"]) == 0
    printed = capsys.readouterr().out
    assert "all at once between the graphs" in printed
    assert "on each GPU" in printed
