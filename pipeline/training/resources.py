"""On what a training computes: the device, what each worker reserves in Ray, its threads."""

import json
import math
import os
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch

from model.cores import count_cores
from pipeline.config import TrainConfig


@dataclass(frozen=True)
class Cluster:
    """What the choice of a device depends on."""

    nodes: tuple[Mapping[str, float], ...]  # the resources of each living node, in use or not
    can_grow: bool  # an autoscaler starts nodes when they are asked for

    def count_gpu_workers(self, cpus_per_worker: float) -> int:
        """Count the workers that find a whole GPU and their CPUs on one node."""
        return sum(
            int(min(node.get("GPU", 0.0), node.get("CPU", 0.0) // cpus_per_worker + 1e-9)) for node in self.nodes
        )


def find_cluster() -> Cluster:
    """Look at the Ray cluster that this process is connected to."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return Cluster(tuple(node["Resources"] for node in nodes), can_grow())


def can_grow() -> bool:
    """Tell whether an autoscaler runs: it knows nodes by their types, where a cluster without one has none."""
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get  # Ray has no public name for any of this

    told = _internal_kv_get("__autoscaling_status")
    if told:  # of the first autoscaler, which `ray up` starts; Ray writes it without one too
        types = json.loads(told).get("autoscaler_report", {}).get("node_type_mapping") or {}
        if any(kind != f"node_{node}" for node, kind in types.items()):
            return True
    status = get_cluster_status(ray.get_runtime_context().gcs_address)  # of the second one, which KubeRay starts
    nodes = status.active_nodes + status.idle_nodes
    has_types = any(node.ray_node_type_name != f"node_{node.node_id}" for node in nodes)
    # Either sign is enough: who takes a cluster that grows for one that does not refuses to train.
    return has_types or status.stats.autoscaler_version not in (None, "", "0")


def wants_gpu(
    options: TrainConfig, *, workers: int | None = None, had_gpu: bool = False, say: Callable[[str], None] = print
) -> bool:
    """Decide on the device, for `workers` or for as few as the training may have, and say what one would not expect.

    With `had_gpu`, what was trained on a GPU waits for one where an autoscaler can start it. Raises `ValueError` for
    GPUs that will never come.
    """
    cluster = find_cluster()
    if had_gpu and options.device == "auto" and cluster.can_grow:
        options = replace(options, device="gpu")
    use_gpu, note = choose_device(options, cluster, workers or options.fewest_workers)
    if note:
        say(note)
    return use_gpu


def choose_device(options: TrainConfig, cluster: Cluster, workers: int) -> tuple[bool, str]:
    """Return whether to compute on GPUs, and a sentence where there is something to say; raises `ValueError`."""
    found = cluster.count_gpu_workers(options.cpus_per_worker)
    if options.device == "cpu" or found >= workers:
        return options.device != "cpu", ""
    has_gpus = any(node.get("GPU", 0.0) > 0 for node in cluster.nodes)
    each = f"1 GPU and {options.cpus_per_worker:g} CPU"
    asked = f"{workers} workers are" if workers > 1 else "1 worker is"
    there = f"there is room for {found} × {each}, and {asked} asked for"
    if options.device == "gpu":
        if cluster.can_grow:
            return True, f"waiting for GPU nodes: {there}"
        advice = f"set train.num_workers={found} or train.device=auto" if found else "set train.device=cpu"
        raise ValueError(
            f"train.device=gpu, but {there}; this cluster does not grow by itself: add nodes, or {advice}."
        )
    if found:
        return False, f"on CPUs, because {there}: train.num_workers={found} takes the GPUs"
    if has_gpus:
        return False, f"on CPUs, because {there}, each of them on one node: lower train.cpus_per_worker, or free a GPU"
    if cluster.can_grow:
        return False, "on CPUs, because no GPU node is up; train.device=gpu waits for one"
    return False, ""


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


def find_missing_for_compile(device: torch.device) -> str:
    """Name what `torch.compile` needs on a CPU and does not find on this machine; empty: nothing."""
    if device.type != "cpu":
        return ""  # Triton brings its own compiler, and the preflight tries it
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (g++)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if header.exists() else f"Python's headers ({header}: the package python3-dev or its like)"


def set_compile_threads(workers_here: int) -> None:
    """Share the cores out for compiling too; torch starts a process for each core of the host, whatever a pod may use.

    TORCHINDUCTOR_COMPILE_THREADS, where somebody has set it, decides.
    """
    from torch._inductor import config as inductor

    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        inductor.compile_threads = max(1, min(inductor.compile_threads, count_cores() // workers_here))
