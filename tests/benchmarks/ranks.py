"""Processes of one gloo world, a core each, as the workers of a training are: benchmarks of steps start them here."""

import multiprocessing
import os
import queue
from collections.abc import Callable
from typing import Any

from jobs.demo import free_port


def run_ranks(work: Callable[..., Any], world_size: int, *told: Any, timeout_seconds: float = 900) -> Any:
    """Call `work(rank, world_size, *told)` in a process per rank, each in the world; returns what rank 0 returned.

    Raises `RuntimeError` where a rank ends without an answer.
    """
    spawning = multiprocessing.get_context("spawn")
    answers = spawning.Queue()
    port = free_port(29_511)
    ranks = [
        spawning.Process(target=join, args=(rank, world_size, port, work, told, answers)) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    waited, found = 0, None
    while found is None:
        try:
            found = answers.get(timeout=1)
        except queue.Empty:
            waited += 1
            broken = [rank for rank, process in enumerate(ranks) if process.exitcode]
            if broken or waited > timeout_seconds:
                for process in ranks:
                    process.kill()
                raise RuntimeError(f"rank {broken} failed" if broken else "no rank answered in time") from None
    for process in ranks:
        process.join()
    return found


def join(rank: int, world_size: int, port: int, work: Callable[..., Any], told: tuple[Any, ...], answers: Any) -> None:
    """Be one rank, with one thread."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    answer = work(rank, world_size, *told)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        answers.put(answer)
