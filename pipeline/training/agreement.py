"""What all ranks of a training must do alike though only some of them know it."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context


class Agreed(NamedTuple):
    """What all ranks do alike after a step."""

    stop: bool
    save: bool
    share_passed: float  # of the training's minutes; 0: nothing new was said


class Agreement:
    """What all ranks must do alike though only some of them know: stop, save, end, resume from one checkpoint.

    Every step starts one tiny all-reduce over gloo and reads that of the step before, so nobody waits for it.
    """

    def __init__(self, world_size: int, line: Any) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._asked: tuple[torch.Tensor, Any] | None = None
        self._driver_stops = False
        self.save_wish = 0  # the number of the driver's open wish for a checkpoint, on rank 0
        self._seen_wish = 0
        self._preempted = False
        self._closed = threading.Event()
        if line is not None:
            threading.Thread(target=self._listen, args=(line,), name="listen-to-driver", daemon=True).start()

    def from_rank_0(self, find: Callable[[], Any]) -> Any:
        """Return on every rank what `find` returns on rank 0."""
        found = [find() if self._group is None or dist.get_rank() == 0 else None]
        if self._group is not None:
            dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def wait_for_all(self) -> None:
        """Go on when all ranks have come here."""
        if self._group is not None:
            dist.barrier(self._group)

    def exchange(self, *, save: bool, share_passed: float = 0.0) -> Agreed:
        """Tell the others whether to stop and to save, and what share of the minutes has passed on rank 0's clock.

        Returns what all had said one step earlier.
        """
        preempted = is_preempted()
        save, self._preempted = save or (preempted and not self._preempted), preempted
        save, self._seen_wish = save or self.save_wish > self._seen_wish, max(self.save_wish, self._seen_wish)
        wishes = torch.tensor([self._driver_stops, save, share_passed], dtype=torch.float64)
        earlier, self._asked = self._asked, None
        if self._group is None:
            return Agreed(self._driver_stops, save, share_passed)
        self._asked = wishes, dist.all_reduce(wishes, dist.ReduceOp.MAX, self._group, async_op=True)
        if earlier is None:
            return Agreed(stop=False, save=False, share_passed=0.0)
        earlier[1].wait()
        stop, save, share_passed = earlier[0].tolist()
        return Agreed(bool(stop), bool(save), share_passed)

    def close(self) -> None:
        self._closed.set()
        if self._asked is not None:
            self._asked[1].wait()

    def _listen(self, line: Any) -> None:
        while not self._closed.wait(0.5):
            try:
                self._driver_stops, self.save_wish = ray.get(line.wishes.remote())
            except ray.exceptions.RayError:
                return  # the driver is gone, and Ray ends its workers


def is_preempted() -> bool:
    """Tell whether Ray has announced that a node of ours goes away (a spot warning, a drain)."""
    # `ray.train.get_preemption_info` is a barrier of all workers, too much for every step; this is its source.
    context = getattr(get_internal_train_context(), "preemption_context", None)
    return getattr(context, "preemption_info", None) is not None
