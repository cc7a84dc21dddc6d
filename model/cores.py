"""How many cores this process may use: those it is pinned to, and what its container's quota pays for."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def count_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that may be kept busy at once, at least 1.

    A container of 4 CPUs on a host of 64 sees 64 cores and may run on each of them, but its control group (cgroup)
    stops all its threads for the rest of a tenth of a second once 4 cores' worth of time is used up. A part of a core
    is not counted: a thread that the quota does not pay for makes all others wait. `root` is where the system's files
    are read.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_quotas(root), default=math.inf)
    return max(1, min(allowed, math.floor(quota) if quota < math.inf else allowed))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the cores that each control group around this process pays for, version 1 or 2; nothing where none does."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, group = line.split(":", 2)
        names = controllers.split(",")
        if number == "0" and not controllers:
            for folder in _ancestors(root / "sys/fs/cgroup", group):
                yield from _ratio(_read(folder / "cpu.max").split())
        elif "cpu" in names:
            for mount in ("cpu", controllers):
                for folder in _ancestors(root / "sys/fs/cgroup" / mount, group):
                    files = (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
                    yield from _ratio([_read(file).strip() for file in files])


def _ancestors(mount: Path, group: str) -> Iterator[Path]:
    """Yield the folders from a group's up to the mount's own: a limit of any of them binds.

    Inside a container the mount may show the container's group as its root, and the name be the host's; then only the
    root is there.
    """
    names = [name for name in group.split("/") if name not in ("", ".", "..")]
    for depth in range(len(names), -1, -1):
        yield mount.joinpath(*names[:depth])


def _ratio(numbers: list[str]) -> Iterator[float]:
    """Yield quota / period of two texts of microseconds; nothing where they say that there is no limit."""
    if len(numbers) == 2 and all(number.isdigit() and int(number) > 0 for number in numbers):
        yield int(numbers[0]) / int(numbers[1])


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:  # another system, or a group that this one does not show
        return ""
