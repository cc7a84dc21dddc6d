"""Float32 products come from the faster library, and only if it keeps float32."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model import products

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
flags\t\t: fpu avx2 avx512f avx512_bf16

processor\t: 1
vendor_id\t: AuthenticAMD
"""


@pytest.fixture(autouse=True)
def precision_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_products_keep_float32_whichever_library_multiplies() -> None:
    products.use_fast_products.__wrapped__()
    assert not products.rounds_to_bfloat16()
    left, right = torch.randn(96, 700), torch.randn(700, 80)
    exact = (left.double() @ right.double()).float()
    torch.testing.assert_close(left @ right, exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.bmm(left[None], right[None])[0], exact, rtol=1e-5, atol=1e-4)


def test_the_leave_to_round_is_taken_back_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_slow_mkl", lambda cpu_info: True)
    monkeypatch.setattr(products, "rounds_to_bfloat16", lambda: True)
    torch.set_float32_matmul_precision("highest")
    assert not products.use_fast_products.__wrapped__()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_rounded_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "full", lambda shape, value: torch.ones(shape) * torch.tensor(value).bfloat16())
    assert products.rounds_to_bfloat16()


@pytest.mark.parametrize(
    ("cpu_info", "is_slow"),
    [
        (EPYC, True),
        (EPYC.replace("AuthenticAMD", "GenuineIntel"), False),
        (EPYC.replace("avx512f avx512_bf16", ""), False),  # Zen 3: both libraries have AVX2 alone
        (EPYC.replace("avx512_bf16", "avx512_bf16 amx_tile"), False),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_mkl_is_slow_on_amd_s_processors_with_avx512(cpu_info: str, is_slow: bool, tmp_path: Path) -> None:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this build of PyTorch has not both libraries")
    file = tmp_path / "cpuinfo"
    file.write_text(cpu_info)
    assert products.has_slow_mkl(file) == is_slow
