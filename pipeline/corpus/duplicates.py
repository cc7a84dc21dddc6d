"""Duplicates among all documents of a corpus: a partition of their hashes is compared at a time, on the workers.

each unit's hashes (prepare's `sign_unit`) ─one task for each partition─▶ positions by unit ─▶ who drops them
"""

import io
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipeline.corpus import cleaning
from pipeline.corpus.progress import Progress
from pipeline.corpus.units import PreparePlan


def find(plan: PreparePlan, units: list[str], there: Mapping[str, int]) -> PreparePlan:
    """Compare what units have signed, partition by partition; return the plan that knows the duplicates.

    `there` are the output's files, so that partitions that an earlier run has compared are not compared again.
    """
    chosen = {cleaning.EXACT: plan.settings.drop_exact_duplicates, cleaning.NEAR: plan.settings.drop_near_duplicates}
    wanted = {
        f"work/{kind}-{partition:05d}.duplicates.parquet": (kind, partition)
        for kind, is_chosen in chosen.items()
        for partition in range(plan.partitions if is_chosen else 0)
    }
    waiting = [_compare.remote(plan, name, *wanted[name], units) for name in wanted if name not in there]
    with Progress("compare", len(wanted), " partitions", done=len(wanted) - len(waiting)) as progress:
        while waiting:
            ready, waiting = ray.wait(waiting)
            ray.get(ready)
            progress.add(len(ready))
    return replace(plan, duplicates=tuple(wanted))


@ray.remote(num_cpus=1)
def _compare(plan: PreparePlan, name: str, kind: str, partition: int, units: list[str]) -> None:
    """Find the duplicates of one partition of the hashes, and write them down by unit."""

    def open_units() -> Iterator[IO[bytes]]:
        for unit in units:
            with plan.output.filesystem.open(plan.output.file(hashes(unit, kind)), "rb") as handle:
                yield handle

    found = cleaning.find_duplicates(kind, partition, open_units(), plan.settings.near_duplicate_similarity)
    rows = [(units[unit], position) for unit in sorted(found) for position in sorted(found[unit])]
    columns = {
        "unit": pa.array([unit for unit, _ in rows], pa.string()),
        "position": [position for _, position in rows],
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=10_000)  # so that a unit's reader skips most of them
    plan.output.write_bytes(name, sink.getvalue())


def read(plan: PreparePlan, unit: str) -> dict[int, str]:
    """Return which documents of a unit to drop as duplicates, and as which kind: position -> reason."""
    reasons: dict[int, str] = {}
    for name in plan.duplicates:
        with plan.output.filesystem.open(plan.output.file(name), "rb") as handle:
            table = pq.read_table(handle, columns=["position"], filters=[("unit", "==", unit)])
        kind = posixpath.basename(name).rpartition("-")[0]
        for position in table.column("position").to_pylist():
            reasons.setdefault(position, kind)
    return reasons


def hashes(unit: str, kind: str) -> str:
    return f"work/{unit}.{kind}.hashes.parquet"
