"""What a person sees of tasks: figures for `evaluation.json` and MLflow, and one picture."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import Artifact, FileRecord
from pipeline.evaluation.evaluators import (
    EVALUATORS,
    ItemAnswer,
    accuracies_by_group,
    chance_of,
    headline_outcomes,
    summarise,
)
from pipeline.evaluation.tasks import Task

NORMAL_95 = 1.96  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class Outcomes:
    """Which items of a task were answered right."""

    digest: str  # of the items: outcomes compare where it is the same
    right: list[bool]


def describe(task: Task, answers: Sequence[ItemAnswer]) -> dict[str, Any]:
    """Return a task's figures as plain values; what is not a number is None, as JSON wants it."""
    figures = summarise(task.shape, task.items, answers)
    described: dict[str, Any] = {
        "shape": task.shape,
        "items": len(task.items),
        "digest": task.digest,
        "headline": EVALUATORS[task.shape].headline,
        "chance": _number(chance_of(task.shape, task.items)),
        "metrics": {
            name: {"value": _number(each.value), "standard_error": _number(each.standard_error), "n": each.n}
            for name, each in figures.items()
        },
    }
    groups = accuracies_by_group(task.items, answers)
    return described | ({"groups": groups} if groups else {})


def name_metrics(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Name every figure for MLflow: `blimp/acc`, `blimp/acc_standard_error`."""
    named: dict[str, float] = {}
    for task, described in tasks.items():
        for metric, figure in described["metrics"].items():
            values = {metric: figure["value"], f"{metric}_standard_error": figure["standard_error"]}
            named |= {f"{task}/{name}": value for name, value in values.items() if value is not None}
    return named


def say(name: str, described: Mapping[str, Any]) -> str:
    """Say a task's headline in one line: figure, interval, chance."""
    figure = described["metrics"][described["headline"]]
    error = "" if figure["standard_error"] is None else f" ± {NORMAL_95 * figure['standard_error']:.3f}"
    chance = f", chance {described['chance']:.3f}" if described["chance"] else ""
    return f"{name:<16} {described['headline']} {figure['value']:.3f}{error}{chance}, {figure['n']:,} items"


def write_answers(output: Artifact, task: Task, answers: Sequence[ItemAnswer]) -> dict[str, FileRecord]:
    """Keep every answer beside the figures, as Parquet; returns the file's record by its name."""
    columns: dict[str, list[Any]] = {
        "nats": [list(said.nats) for said in answers],
        "greedy": [list(said.greedy) for said in answers],
    }
    outcomes = headline_outcomes(task.shape, task.items, answers)
    if outcomes is not None:
        columns["right"] = outcomes
    table = pa.table(columns).replace_schema_metadata({"digest": task.digest})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    name = f"tasks/{task.name}.parquet"
    return {name: output.write_bytes(name, sink.getvalue().to_pybytes())}


def read_outcomes(evaluation: Artifact) -> dict[str, Outcomes]:
    """Read which items were answered right, by task, from what an evaluation kept; empty where that is gone."""
    manifest = evaluation.any_manifest()
    found = {}
    for file in () if manifest is None else sorted(manifest.files):
        if file.startswith("tasks/") and evaluation.exists(file):
            table = pq.read_table(pa.BufferReader(evaluation.read_bytes(file)))
            if "right" in table.column_names:
                digest = (table.schema.metadata or {}).get(b"digest", b"").decode()
                found[file.removeprefix("tasks/").removesuffix(".parquet")] = Outcomes(
                    digest, table["right"].to_pylist()
                )
    return found


def draw(tasks: Mapping[str, Mapping[str, Any]], *, title: str) -> bytes:
    """Draw each task's headline beside chance, with its 95 % interval; returns a PNG.

    Tasks without an accuracy are left out: bits and perplexities have another scale.
    """
    from matplotlib.figure import Figure  # slow to import

    shown = {name: each for name, each in tasks.items() if each["headline"] == "acc"}
    figure = Figure(figsize=(7, 1.4 + 0.5 * max(len(shown), 1)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for row, described in enumerate(shown.values()):
        accuracy = described["metrics"]["acc"]
        reach = NORMAL_95 * (accuracy["standard_error"] or 0.0)
        axes.barh(row, accuracy["value"], height=0.6, color="tab:blue", alpha=0.7, label="score" if row == 0 else None)
        axes.errorbar(accuracy["value"], row, xerr=reach, color="black", capsize=4, fmt="none")
        axes.plot([described["chance"]] * 2, [row - 0.4, row + 0.4], color="red", label="chance" if row == 0 else None)
    axes.set_yticks(range(len(shown)), [f"{name} ({each['items']:,})" for name, each in shown.items()])
    axes.set(xlim=(0, 1), xlabel="share of items answered right, with its 95 % interval", title=title)
    axes.invert_yaxis()
    if shown:
        axes.legend(loc="lower right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
