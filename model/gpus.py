"""What the makers' data sheets say of GPUs: the one table that planning and the measure of utilisation read.

find_gpu("NVIDIA H100 PCIe")    # as torch.cuda.get_device_name says it
find_gpu("a100-80gb")           # as a person writes it
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 FLOP/s, memory, and bytes/s of one GPU to its memory, its neighbours and other nodes."""

    name: str
    flops_per_second: float
    memory_gigabytes: float
    memory_bytes_per_second: float
    link_bytes_per_second: float  # within a node: NVLink, one direction, or PCIe
    network_bytes_per_second: float  # between nodes: 400 Gbit/s a GPU where that is usual, else less


GPUS = (
    Gpu("GB300", 2.5e15, 279, 8e12, 900e9, 50e9),
    Gpu("GB200", 2.5e15, 186, 8e12, 900e9, 50e9),
    Gpu("B300", 2.25e15, 270, 8e12, 900e9, 50e9),
    Gpu("B200", 2.25e15, 180, 8e12, 900e9, 50e9),
    Gpu("GH200", 989e12, 96, 4e12, 450e9, 50e9),
    Gpu("H200 NVL", 836e12, 141, 4.8e12, 450e9, 50e9),
    Gpu("H200", 989e12, 141, 4.8e12, 450e9, 50e9),
    Gpu("H100 NVL", 836e12, 94, 3.9e12, 300e9, 50e9),
    Gpu("H100 PCIe", 756e12, 80, 2e12, 60e9, 25e9),
    Gpu("H100", 989e12, 80, 3.35e12, 450e9, 50e9),
    Gpu("H20", 148e12, 96, 4e12, 450e9, 50e9),
    Gpu("A100 40GB", 312e12, 40, 1.555e12, 300e9, 25e9),
    Gpu("A100", 312e12, 80, 2.039e12, 300e9, 25e9),
    Gpu("A10G", 70e12, 24, 0.6e12, 12e9, 3e9),
    Gpu("A10", 125e12, 24, 0.6e12, 12e9, 3e9),
    Gpu("L40S", 362e12, 48, 0.864e12, 25e9, 12.5e9),
    Gpu("L40", 181e12, 48, 0.864e12, 25e9, 12.5e9),
    Gpu("L4", 121e12, 24, 0.3e12, 12e9, 3e9),
    Gpu("RTX 4090", 165e12, 24, 1.008e12, 20e9, 3e9),
)
# Another chip, or a part of one, under the name of the one above: not in the table.
OTHER_CHIP = {"D", "LAPTOP", "MAX", "MIG", "MOBILE"}


def find_gpu(name: str) -> Gpu | None:
    """Find a GPU by the whole words of its name, the most particular entry first; None for one that is not known.

    Parts of words do not count: an A10G is no A10 and an L40 no L4. A form factor and a memory size that no entry
    names (SXM4, HBM3, 80GB) change nothing.
    """
    words = _words(name)
    if words & OTHER_CHIP:
        return None
    fitting = [gpu for gpu in GPUS if _words(gpu.name) <= words]
    return max(fitting, key=lambda gpu: len(_words(gpu.name)), default=None)


def _words(name: str) -> set[str]:
    # People leave out the space of "RTX 4090".
    return set(re.findall(r"[A-Z0-9]+", re.sub(r"RTX(?=\d)", "RTX ", name.upper())))
