"""The trainings that MLflow knows, in lines for a terminal."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline import tracking
from pipeline.config import Config
from pipeline.records.versions import open_client
from pipeline.registry import AS_TRAINING

BITS = ("evaluate/bits_per_byte", "validation/bits_per_byte")  # the first that there is
TASK = "evaluate/"  # metrics of tasks are evaluate/<task>/<metric>
SILENT_SECONDS = 1800.0  # a running training that logged nothing for so long was killed, or hangs
HEADLINES = ("acc_norm", "acc", "word_perplexity")  # of a task the first that there is


@dataclass(frozen=True)
class Row:
    """One run of a training."""

    run_id: str
    experiment: str
    name: str
    state: str
    step: int
    steps: int  # that it shall have; 0 where it does not say
    bits_per_byte: float | None
    tasks: Mapping[str, float] = field(default_factory=dict)
    started: float = 0.0  # Unix time
    heard: float = 0.0  # Unix time of the last figure
    user: str = ""
    parent_run_id: str = ""
    page: str = ""  # its path on MLflow's server


def list_runs(config: Config, experiment: str = "", limit: int = 50) -> list[Row]:
    """The newest runs, of one experiment or of all. Raises `ValueError` where MLflow does not answer."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    client = open_client(config)
    if client is None:
        return []
    try:
        names = {each.experiment_id: each.name for each in client.search_experiments()}
        chosen = [number for number, name in names.items() if experiment in ("", name)]
        if experiment and not chosen:
            there = ", ".join(sorted(names.values()))
            raise ValueError(f"MLflow has no experiment {experiment!r}; it has {there}.")
        # Data cards and searches have runs too: a training says what it was made of.
        found = client.search_runs(chosen, "params.fingerprint != ''", max_results=limit, order_by=["start_time DESC"])
    except (MlflowException, SQLAlchemyError) as error:
        raise ValueError(tracking.explain_trouble(error, tracking.address(config))) from None
    return [_describe(run, names[run.info.experiment_id]) for run in found]


def find_run(rows: Sequence[Row], name: str) -> Row:
    """The run of that name, or whose id begins so; the newest of several of one name."""
    found = [row for row in rows if row.name == name] or [row for row in rows if row.run_id.startswith(name)]
    if not found:
        raise ValueError(f"MLflow has no run {name!r} among the newest {len(rows)}; list them with jobs.runs.")
    return found[0]


def _describe(run: Any, experiment: str) -> Row:
    metrics, params, tags = run.data.metrics, run.data.params, run.data.tags
    bits = next((metrics[name] for name in BITS if name in metrics), None)
    is_timed = float(params.get("train.minutes") or 0) > 0  # nobody knows how many steps that makes
    steps = int(params["train.steps"]) if params.get("train.steps", "").isdigit() and not is_timed else 0
    logged = run.data.to_proto().metrics
    step = max((metric.step for metric in logged if metric.key.startswith("train/")), default=0)
    return Row(
        run_id=run.info.run_id,
        experiment=experiment,
        name=run.info.run_name,
        state=str(run.info.status).lower(),
        step=step,
        steps=steps,
        bits_per_byte=bits,
        tasks=read_tasks(metrics),
        started=run.info.start_time / 1000,
        heard=max([run.info.start_time, *(metric.timestamp for metric in logged)]) / 1000,
        user=tags.get("mlflow.user", ""),
        parent_run_id=tags.get(tracking.PARENT_TAG, ""),
        page=f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{AS_TRAINING}",
    )


def read_tasks(metrics: Mapping[str, float]) -> dict[str, float]:
    """Each task's headline among a run's metrics."""
    tasks: dict[str, float] = {}
    for name in metrics:
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == "evaluate" and parts[1] not in tasks:
            headline = next((each for each in HEADLINES if f"{TASK}{parts[1]}/{each}" in metrics), None)
            if headline is not None:
                tasks[parts[1]] = metrics[f"{TASK}{parts[1]}/{headline}"]
    return tasks


def describe_rows(rows: Sequence[Row], now: float | None = None) -> str:
    """A table: the newest first, what belongs to another run under it."""
    from pipeline.records.inventory import describe_age

    if not rows:
        return "No training has a run here."
    now = time.time() if now is None else now
    ids = {row.run_id for row in rows}
    children: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        children[row.parent_run_id].append(row)
    ordered: list[tuple[int, Row]] = []

    def place(row: Row, depth: int) -> None:
        ordered.append((depth, row))
        for child in children[row.run_id]:
            if child is not row:
                place(child, depth + 1)

    for row in rows:
        if row.parent_run_id not in ids:
            place(row, 0)
    lines = [f"{'run':<44}{'id':<10}{'state':<12}{'steps':>13}{'bits/byte':>11}{'age':>8}  tasks"]
    for depth, row in ordered:
        done = f"{row.step:,}/{row.steps:,}" if row.steps else f"{row.step:,}"
        bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}"
        tasks = ", ".join(f"{task} {value:.3f}" for task, value in row.tasks.items())
        age = describe_age((now - row.started) / 86_400)
        shown, state = f"{'  ' * depth}{row.name}", row.state
        if state == "running" and now - row.heard > SILENT_SECONDS:
            state = f"silent {describe_age((now - row.heard) / 86_400)}"
        lines.append(f"{shown:<44}{row.run_id[:8]:<10}{state:<12}{done:>13}{bits:>11}{age:>8}  {tasks}".rstrip())
    return "\n".join(lines)
