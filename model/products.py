"""Which library multiplies float32 matrices on a CPU.

PyTorch for x86 has two, and takes Intel's MKL for float32. On AMD's processors MKL keeps to AVX2; oneDNN has AVX-512
there too: 250 beside 110 GFLOP/s on a core of Zen 5.
"""

import sys
from functools import cache
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")


@cache
def use_fast_products() -> bool:
    """Have oneDNN multiply float32 matrices in this process where it is faster and as exact; tell whether it does.

    PyTorch hands float32 to oneDNN only with the leave to compute in bfloat16. oneDNN takes that leave on matrix units
    (AMX) alone, so there it is not given; and a product shows whether it was taken. Where there is a GPU everything
    stays as it is, because the same leave would have GPUs round to TensorFloat-32.
    """
    if not has_slow_mkl(CPU_INFO) or torch.cuda.is_available():
        return False
    torch.set_float32_matmul_precision("medium")
    if rounds_to_bfloat16():
        torch.set_float32_matmul_precision("highest")
        return False
    return True


def has_slow_mkl(cpu_info: Path) -> bool:
    """Tell whether MKL leaves AVX-512 unused: on processors that have it and are not Intel's."""
    if sys.platform != "linux" or not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    first_core = cpu_info.read_text(encoding="utf-8").split("\n\n")[0]
    lines = [line.split(":", 1) for line in first_core.splitlines() if ":" in line]
    facts = {name.strip(): value.split() for name, value in lines}
    flags = facts.get("flags", [])
    return facts.get("vendor_id") == ["AuthenticAMD"] and "avx512f" in flags and "amx_tile" not in flags


def rounds_to_bfloat16() -> bool:
    """Tell whether a float32 product loses what bfloat16 cannot hold."""
    fine = torch.full((64, 64), 1 + 2.0**-12)  # bfloat16 has 1 and 1 + 2^-7, and nothing between
    return bool((fine @ fine).sub(64 * (1 + 2.0**-12) ** 2).abs().max() > 1e-4)
