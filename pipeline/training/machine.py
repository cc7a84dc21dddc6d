"""On what a training runs, for its record in MLflow: versions, processor or GPU, threads, precision."""

import platform
from pathlib import Path

import ray
import torch


def describe_machine(device: torch.device, precision: torch.dtype, world_size: int) -> dict[str, str]:
    """Name what rank 0 has; precision is what `train.precision=auto` came to."""
    return {
        "machine.python": platform.python_version(),
        "machine.torch": torch.__version__,
        "machine.ray": ray.__version__,
        "machine.processor": processor_name(),
        "machine.gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "machine.threads": str(torch.get_num_threads()),
        "machine.workers": str(world_size),
        "machine.precision": name_precision(precision),
    }


def processor_name() -> str:
    """The processor as its maker calls it, where the system says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def name_precision(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")
