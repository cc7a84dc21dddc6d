"""Ranks of a world of gloo, a process each."""

import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run_on_ranks(work: Callable[[int], None], folder: Path, world_size: int = 2) -> None:
    """Call `work(rank)` on every rank, one thread each; what it raises on any rank is raised here."""
    torch.multiprocessing.spawn(join, args=(world_size, str(folder / "meeting"), work), nprocs=world_size)


def join(rank: int, world_size: int, meeting: str, work: Callable[[int], None]) -> None:
    """Be one rank. Its models are gone before the group that they send through, and nobody leaves before the others."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    work(rank)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
