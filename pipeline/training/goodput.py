"""Where a run's time and memory go: its wall clock over all restarts, its speed against the hardware's."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch
from torch.distributed.tensor import DTensor

from model.gpus import find_gpu

ACTIVITIES = ("compute", "data_wait", "checkpoint", "evaluation", "tasks", "startup", "restart")


class TimeSplit:
    """A clock that is always charged to one activity, so that the parts add up to the wall clock by construction.

    A checkpoint carries `seconds()`. On resuming, all that passed since it was written (repeated steps, the
    time to notice, to start workers and to load) is `restart`; before the first step ever it is `startup`.
    """

    def __init__(self, spent: Mapping[str, float], since: float, activity: str) -> None:
        self._seconds = {name: float(spent.get(name, 0.0)) for name in ACTIVITIES}
        self._seconds[activity] += max(0.0, time.time() - since)
        self._activity = activity
        self._switched = time.monotonic()

    def switch(self, activity: str) -> None:
        """Charge the time since the last switch to what went on, and go on as `activity`."""
        now = time.monotonic()
        self._seconds[self._activity] += now - self._switched
        self._activity = activity
        self._switched = now

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Charge the block to `activity`, then go back to what went on before."""
        before = self._activity
        self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[str, float]:
        """Seconds per activity until now; their sum is the wall clock since the run first started."""
        self.switch(self._activity)
        return dict(self._seconds)


def peak_flops(device: torch.device, precision: torch.dtype) -> float:
    """Return the FLOP/s that model FLOPs utilisation is measured against.

    A GPU's data sheet where it is known; elsewhere, CPUs included, the rate of a large matrix product, measured
    now, with the threads that this worker has.
    """
    if device.type == "cuda" and precision == torch.bfloat16:
        gpu = find_gpu(torch.cuda.get_device_name(device))
        if gpu is not None:
            return gpu.flops_per_second
    size = 8192 if device.type == "cuda" else 1024
    left = torch.ones(size, size, device=device, dtype=precision)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        (left @ left)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def weight_norm(model: torch.nn.Module) -> float:
    """Length of all weights as one vector; of a sharded model all ranks must ask together."""
    norm = torch.nn.utils.get_total_norm([parameter.detach() for parameter in model.parameters()])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def memory_metrics() -> dict[str, float]:
    """This worker's memory, and the node's load under the names that MLflow's page of system metrics shows."""
    memory = psutil.virtual_memory()
    metrics = {
        "memory/worker_gigabytes": psutil.Process().memory_info().rss / 1e9,
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_percentage": psutil.disk_usage("/").percent,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        metrics |= {
            "memory/gpu_peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9,
            "system/gpu_0_memory_usage_megabytes": (total - free) / 1e6,
            "system/gpu_0_memory_usage_percentage": 100 * (total - free) / total,
        }
    return metrics
