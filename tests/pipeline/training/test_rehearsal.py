"""The sentences of the preflight's GPU line, from facts as they would be; and its tries, on the device that is here."""

from dataclasses import replace

import pytest
import torch

from pipeline.training import rehearsal
from pipeline.training.rehearsal import GpuFacts, find_gpu_facts, judge_gpu, try_gpu, try_kernels

H100 = GpuFacts(
    torch="2.13.0",
    cuda="13.0",
    driver="580.95.05",
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),  # of PyPI's wheel of torch 2.13.0
)


def test_a_gpu_that_can_be_used_is_told() -> None:
    sentence = "NVIDIA H100 80GB HBM3 (compute capability 9.0), driver 580.95.05, CUDA 13.0"
    assert judge_gpu(H100) == sentence
    turing = judge_gpu(replace(H100, name="Tesla T4", capability=(7, 5)))
    assert turing.startswith("Tesla T4 (compute capability 7.5, no bfloat16: it trains in float32)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cuda": None}, "is a build for CPUs: give GPU workers the image"),
        ({"driver": ""}, "no NVIDIA driver is visible: install it, and for containers"),
        ({"driver": "535.183.01"}, r"driver is 535\.183\.01, and torch 2\.13\.0 with CUDA 13\.0 needs 580 or newer"),
        ({"problem": "CUDA error: no kernel image"}, "does not reach the GPU, though driver 580.95.05 is there: CUDA"),
        ({"name": "Tesla P100", "capability": (6, 0)}, r"compute capability 6\.0, and .* has code for 7\.5 and newer"),
        ({"cuda": "12.8", "driver": "470.1"}, r"CUDA 12\.8 needs 525 or newer"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told_with_what_to_do(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as told:
        judge_gpu(replace(H100, **change))  # type: ignore[arg-type]
    assert "\n" not in str(told.value)


def test_newer_gpus_than_torch_knows_are_left_to_their_driver() -> None:
    assert "12.1" in judge_gpu(replace(H100, name="later", capability=(12, 1)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_worker_without_a_gpu_says_so_by_its_nodes_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal.socket, "gethostname", lambda: "node-7")
    with pytest.raises(ValueError, match=r"^Node node-7: (torch .* is a build for CPUs|no NVIDIA driver)"):
        try_gpu(False)
    assert find_gpu_facts().problem


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_that_is_here_passes() -> None:
    sentence, seconds = try_gpu(True)
    assert torch.cuda.get_device_name(0) in sentence
    assert seconds > 0


@pytest.mark.parametrize(
    "version", ["NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build"]
)
def test_the_driver_is_read_from_the_kernels_file(version: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text(version + "\nGCC version:  gcc version 12.2.0\n")
    monkeypatch.setattr(rehearsal, "DRIVER_FILE", tmp_path / "version")
    assert find_gpu_facts().driver == "580.95.05"


def test_a_product_is_tried_and_a_compiler_that_miscounts_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert try_kernels(cpu, compiles=False) == 0.0
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: function(x) + 1)
    with pytest.raises(ValueError, match=r"set train\.compile=false"):
        try_kernels(cpu, compiles=True)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert try_kernels(cpu, compiles=True) >= 0
