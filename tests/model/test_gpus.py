"""A GPU is known by the whole words of its name, as torch reports it and as people write it."""

import pytest

from model.gpus import GPUS, find_gpu


@pytest.mark.parametrize(
    ("reported", "name", "teraflops"),
    [
        ("NVIDIA A10G", "A10G", 70),
        ("NVIDIA A10", "A10", 125),
        ("NVIDIA L4", "L4", 121),
        ("NVIDIA L40", "L40", 181),
        ("NVIDIA L40S", "L40S", 362),
        ("NVIDIA H100 NVL", "H100 NVL", 836),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", "H100", 989),
        ("NVIDIA H200", "H200", 989),
        ("NVIDIA GH200 480GB", "GH200", 989),
        ("NVIDIA B200", "B200", 2250),
        ("NVIDIA GB200", "GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", "A100", 312),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", 312),
        ("NVIDIA A100 80GB PCIe", "A100", 312),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165),
        ("h100", "H100", 989),
        ("a100-80gb", "A100", 312),
        ("rtx4090", "RTX 4090", 165),
    ],
)
def test_a_gpu_has_the_figures_of_its_own_data_sheet(reported: str, name: str, teraflops: float) -> None:
    found = find_gpu(reported)
    assert found is not None
    assert (found.name, found.flops_per_second / 1e12) == (name, teraflops)


@pytest.mark.parametrize(
    "reported",
    [
        "Tesla T4",
        "NVIDIA A1000",
        "NVIDIA RTX A4000",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_another_chip_is_not_taken_for_one_that_is_known(reported: str) -> None:
    assert find_gpu(reported) is None


def test_every_entry_is_found_by_its_own_name() -> None:
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)
