"""On what a training computes: the device, what each worker reserves in Ray, its threads."""

import math

import ray
import torch

from model.cores import count_cores
from pipeline.config import TrainConfig


def wants_gpu(options: TrainConfig) -> bool:
    """Decide by the settings, or by whether the cluster has a GPU."""
    if options.device == "auto":
        return ray.cluster_resources().get("GPU", 0) >= 1
    return options.device == "gpu"


def worker_resources(options: TrainConfig, use_gpu: bool) -> dict[str, float]:
    """What one worker reserves; a fixed number of CPU workers shares out a cluster that has fewer CPUs than that."""
    cpus = options.cpus_per_worker
    workers = options.fewest_workers
    total = ray.cluster_resources().get("CPU", 0.0)
    if not use_gpu and workers == options.most_workers and 0 < total < cpus * workers:
        cpus = math.floor(100 * total / workers) / 100
    return {"CPU": cpus, "GPU": 1.0} if use_gpu else {"CPU": cpus}


def set_threads(threads: int, workers_here: int) -> None:
    """Share the cores out among the workers of this node; Ray would give each a single thread."""
    torch.set_num_threads(threads or max(1, count_cores() // workers_here))
