"""What the preflight tries on the places that training will have: each GPU, its driver and compiler, a sum over all."""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from pipeline.config import TrainConfig
from pipeline.training.resources import find_cluster, wants_gpu, worker_resources

OLDEST_DRIVERS = {"12": 525, "13": 580}  # by CUDA's major version: NVIDIA's table of minor version compatibility
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class GpuFacts:
    """What decides whether this torch can use the GPU that it was given."""

    torch: str
    cuda: str | None  # the version that torch was built for; None: a build for CPUs
    driver: str  # empty: none is visible
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    architectures: tuple[str, ...] = ()  # that torch has code for, such as sm_90
    problem: str = ""  # what torch says when it is asked for the GPU


@dataclass
class Workers:
    """The places that training will ask for, held while the checks run."""

    count: int
    resources: dict[str, float]
    group: PlacementGroup | None
    waited: float
    note: str = ""  # what there is to say of the device
    impossible: str = ""  # why training would not even start

    def check(self) -> str:
        """Return what is held; raises `ValueError` where training would not get it."""
        if self.impossible:
            raise ValueError(self.impossible)
        wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in self.resources.items() if amount)
        if self.group is None:
            total = ray.cluster_resources()
            alive = sum(node["Alive"] for node in ray.nodes())
            nodes = f"{alive} node{'' if alive == 1 else 's'}"
            offered = ", ".join(f"{total.get(kind, 0):g} {kind}" for kind in self.resources)
            raise ValueError(
                f"Add nodes or lower train.num_workers: it asks for {self.count} × {wanted} and in {self.waited:.0f} s"
                f" the cluster, with {offered} on {nodes}, could not give it at once"
                f" (--wait SECONDS waits longer for an autoscaler)."
            )
        note = f" ({self.note})" if self.note else ""
        return f"{self.count} × {wanted}, ready after {self.waited:.0f} s{note}"


@contextmanager
def training_workers(train: TrainConfig, wait_seconds: float) -> Iterator[Workers]:
    """Reserve what training will reserve; the way to ask an autoscaler for it."""
    count = train.fewest_workers
    notes: list[str] = []
    try:
        use_gpu = wants_gpu(train, say=notes.append)
    except ValueError as error:
        yield Workers(count, {}, None, 0.0, impossible=str(error))
        return
    resources = worker_resources(train, use_gpu)

    def count_gpus() -> int:
        """All GPUs there are, up to as many as training may take: a sum over one of eight says nothing."""
        return min(
            train.most_workers, max(train.fewest_workers, find_cluster().count_gpu_workers(train.cpus_per_worker))
        )

    if use_gpu:
        count = train.most_workers if find_cluster().can_grow else count_gpus()
    began = time.monotonic()
    group = placement_group([resources] * count, strategy="PACK")
    ready = group.wait(timeout_seconds=wait_seconds)
    if not ready and count > train.fewest_workers:
        remove_placement_group(group)  # an autoscaler brought fewer than training would like
        count = count_gpus()
        group = placement_group([resources] * count, strategy="PACK")
        ready = group.wait(timeout_seconds=wait_seconds)
    try:
        yield Workers(count, resources, group if ready else None, time.monotonic() - began, "; ".join(notes))
    finally:
        remove_placement_group(group)


def try_gpu(compiles: bool) -> tuple[str, float]:
    """Use this worker's GPU; returns what it is and the seconds of compiling. Raises `ValueError` with one sentence."""
    host = socket.gethostname()
    try:
        sentence = judge_gpu(find_gpu_facts())
        return sentence, try_kernels(torch.device("cuda"), compiles)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"Node {host}: {str(error).strip().splitlines()[0]}") from None


def find_gpu_facts() -> GpuFacts:
    told = DRIVER_FILE.read_text() if DRIVER_FILE.exists() else ""
    driver = re.search(r"\b(\d{3}\.\d[\d.]*)", told)
    facts = GpuFacts(str(torch.__version__), torch.version.cuda, driver[1] if driver else "")
    try:
        name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    except (RuntimeError, AssertionError) as error:
        return replace(facts, problem=str(error).strip().splitlines()[0])
    return replace(facts, name=name, capability=capability, architectures=tuple(torch.cuda.get_arch_list()))


def judge_gpu(facts: GpuFacts) -> str:
    """Return what the GPU is; raises `ValueError` with one sentence where torch cannot use it."""
    if facts.cuda is None:
        raise ValueError(
            f"torch {facts.torch} is a build for CPUs: give GPU workers the image of the target gpu, or PyPI's torch."
        )
    if not facts.driver:
        raise ValueError(
            "no NVIDIA driver is visible: install it, and for containers NVIDIA's container toolkit; the image must set"
            " NVIDIA_VISIBLE_DEVICES=all."
        )
    oldest = OLDEST_DRIVERS.get(facts.cuda.partition(".")[0], 0)
    if int(facts.driver.partition(".")[0]) < oldest:
        raise ValueError(
            f"the NVIDIA driver is {facts.driver}, and torch {facts.torch} with CUDA {facts.cuda} needs {oldest} or"
            " newer: update it."
        )
    if facts.problem:
        raise ValueError(f"torch does not reach the GPU, though driver {facts.driver} is there: {facts.problem}")
    built_for = [int(name.removeprefix("sm_").rstrip("af")) for name in facts.architectures if name.startswith("sm_")]
    version = f"{facts.capability[0]}.{facts.capability[1]}"
    if built_for and 10 * facts.capability[0] + facts.capability[1] < min(built_for):
        raise ValueError(
            f"{facts.name} has compute capability {version}, and torch {facts.torch} has code for"
            f" {min(built_for) / 10} and newer: use a newer GPU."
        )
    # Before Ampere there are no units for bfloat16: `choose_precision` takes float32 there.
    precision = "" if facts.capability >= (8, 0) else ", no bfloat16: it trains in float32"
    return f"{facts.name} (compute capability {version}{precision}), driver {facts.driver}, CUDA {facts.cuda}"


def try_kernels(device: torch.device, compiles: bool) -> float:
    """Multiply on the device, and compile a small function for it; returns the seconds of that."""
    ones = torch.ones(64, 64, device=device)
    if (ones @ ones).sum().item() != 64.0**3:
        raise ValueError("a product of matrices of ones is wrong: replace this GPU.")
    if not compiles:
        return 0.0

    def curve(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * 2 + x

    x = torch.linspace(-1, 1, 1000, device=device)
    began = time.monotonic()
    if not torch.allclose(torch.compile(curve)(x), curve(x), atol=1e-4):
        raise ValueError("a compiled function gives other numbers than itself: set train.compile=false.")
    return time.monotonic() - began


def choose_address() -> str:
    """An address of this node with a port that is free now, for the workers to meet at."""
    host = ray.util.get_node_ip_address()
    with socket.create_server((host, 0)) as server:
        return f"{host}:{server.getsockname()[1]}"


def time_all_reduce(address: str, rank: int, world_size: int, backend: str, size: int) -> float:
    """Be one worker: sum a buffer of `size` bytes over all; returns the median seconds of three times."""
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    dist.init_process_group(
        backend, f"tcp://{address}", timeout=timedelta(seconds=60), rank=rank, world_size=world_size
    )
    try:
        buffer = torch.ones(size // 4, device=device)
        times = []
        for _ in range(4):
            dist.barrier()
            began = time.monotonic()
            dist.all_reduce(buffer)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.monotonic() - began)
        if buffer[0].item() != float(world_size) ** 4:
            raise ValueError(f"the sum over {world_size} workers is wrong")
        return sorted(times[1:])[1]  # the first one makes the connections
    finally:
        dist.destroy_process_group()
