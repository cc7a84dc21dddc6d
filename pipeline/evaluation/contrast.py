"""Two models side by side: settings that differ, bits per byte, tasks and samples; as text and as a page.

first, second = find_side(config, "3"), find_side(config, "champion")
contrast = measure(first, second, texts, tasks, prompts)
print(describe(contrast)); Path("page.html").write_text(draw_page(contrast))
"""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlflow
import torch

from model.checkpoint import load_model
from model.generation import complete
from model.gpt import GPT
from model.likelihood import encode_requests, score
from model.sampling import SamplingSettings
from model.scoring import bits_per_byte
from model.tokenizer import Tokenizer, load_tokenizer
from pipeline import registry, tracking
from pipeline.artifacts import Artifact, expand_home
from pipeline.config import Config
from pipeline.evaluation.answers import answer
from pipeline.evaluation.comparison import Change, Gain, compare_outcomes, measure_gain
from pipeline.evaluation.evaluators import EVALUATORS, headline_outcomes, summarise
from pipeline.evaluation.spread import Version, load
from pipeline.evaluation.tasks import Task

NORMAL_95 = 1.96


@dataclass(frozen=True)
class Side:
    """One of the two: its name, its model, and the settings it was made with as far as they are known."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    settings: Mapping[str, str]


@dataclass(frozen=True)
class TaskRow:
    """One task's headline under both, as (value, standard error), and what differs between them."""

    task: str
    metric: str
    first: tuple[float, float]
    second: tuple[float, float]
    change: Change | None


@dataclass(frozen=True)
class Contrast:
    """All that was found; a gain is the second's over the first."""

    names: tuple[str, str]
    settings: list[tuple[str, str, str]]  # (key, first, second), where they differ
    bits_per_byte: tuple[float, float]
    gain: Gain
    tasks: list[TaskRow]
    samples: list[tuple[str, str, str]]  # (prompt, first, second)


def find_side(config: Config, name: str, device: str = "cpu") -> Side:
    """Open a folder (a checkpoint's or a training's), a run of MLflow by its id, or a version by number or alias.

    Raises `ValueError` where it is none of them.
    """
    folder = expand_home(name)
    if (folder / "config.json").is_file():
        model, tokenizer = load_model(folder, device=device), load_tokenizer(folder)
        return Side(name, model, tokenizer, _describe_model(model))
    if "/" in name or folder.is_dir():
        trained = Artifact(name if "://" in name else str(folder.resolve()), "train", "")
        manifest = trained.any_manifest()
        if manifest is None:
            raise ValueError(f"{name} is no checkpoint's folder and no training's: it has no config.json, no manifest.")
        trained = dataclasses.replace(trained, fingerprint=manifest.fingerprint)
        model, tokenizer = load(trained, device)
        run_id = str(manifest.counts.get("mlflow_run_id", ""))
        return Side(name, model, tokenizer, _describe_model(model) | tracking.read_settings(run_id))
    if len(name) == 32 and set(name) <= set("0123456789abcdef"):
        url = tracking.read_settings(name).get("artifact")
        if url is None:
            raise ValueError(f"MLflow has no run {name} of a training here.")
        return dataclasses.replace(find_side(config, url, device), name=name)
    record = registry.resolve(config.registered_name, name)
    model, tokenizer = load(Version(record, mlflow.get_tracking_uri()), device)
    described = _describe_model(model) | tracking.read_settings(record.run_id)
    return Side(f"{record.name} version {record.version}", model, tokenizer, described)


def measure(
    first: Side,
    second: Side,
    texts: Sequence[str],
    tasks: Sequence[Task] = (),
    prompts: Sequence[str] = (),
    *,
    sample_tokens: int = 100,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
) -> Contrast:
    """Score both on the same texts, ask both the same tasks, and let both complete the same prompts."""
    if not texts:
        raise ValueError("There is no held-out text to compare on.")
    sides = (first, second)
    sizes = [len(text.encode()) for text in texts]
    nats = []
    for side in sides:
        requests = encode_requests(side.tokenizer, [("", text) for text in texts])
        nats.append((-score(side.model, requests, precision=precision).nats).tolist())
    bits = [bits_per_byte(sum(each), sum(sizes)) for each in nats]
    sampling = SamplingSettings(max_tokens=sample_tokens, temperature=0.8, top_k=50, seed=seed)
    told = [[complete(side.model, side.tokenizer, prompt, sampling) for prompt in prompts] for side in sides]
    keys = sorted({*first.settings, *second.settings})
    shown = [(key, first.settings.get(key, "not known"), second.settings.get(key, "not known")) for key in keys]
    return Contrast(
        names=(first.name, second.name),
        settings=[row for row in shown if row[1] != row[2]],
        bits_per_byte=(bits[0], bits[1]),
        gain=measure_gain(nats[1], nats[0], sizes),
        tasks=[_compare_task(first, second, task, precision) for task in tasks],
        samples=list(zip(prompts, told[0], told[1], strict=True)),
    )


def _compare_task(first: Side, second: Side, task: Task, precision: torch.dtype) -> TaskRow:
    metric = EVALUATORS[task.shape].headline
    figures, outcomes = [], []
    for side in (first, second):
        answers = answer(side.model, side.tokenizer, task.items, precision=precision)
        figure = summarise(task.shape, task.items, answers)[metric]
        figures.append((figure.value, figure.standard_error))
        outcomes.append(headline_outcomes(task.shape, task.items, answers))
    change = None
    if outcomes[0] is not None and outcomes[1] is not None:
        change = compare_outcomes(task.name, outcomes[1], outcomes[0])
    return TaskRow(task.name, metric, figures[0], figures[1], change)


def _describe_model(model: GPT) -> dict[str, str]:
    facts: dict[str, Any] = dataclasses.asdict(model.config) | {"vocabulary": model.vocab_size}
    return {f"model.{key}": str(value) for key, value in facts.items()}


# Showing ----------------------------------------------------------------------------------------------------------


def _verdict(gain: Gain) -> str:
    if gain.low <= 0 <= gain.high:
        return "no difference is shown"
    return "the second is better" if gain.bits_per_byte > 0 else "the first is better"


def _tables(contrast: Contrast) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Every table with its heading; the first row of each is its head."""
    first, second = contrast.names
    bits = tuple(f"{value:.4f}" for value in contrast.bits_per_byte)
    tasks = [
        (
            f"{row.task}, {row.metric}",
            *(f"{value:.3f} ± {NORMAL_95 * error:.3f}" for value, error in (row.first, row.second)),
            ""
            if row.change is None
            else f"{100 * row.change.difference:+.1f} ± {100 * NORMAL_95 * row.change.standard_error:.1f} points",
        )
        for row in contrast.tasks
    ]
    tables: list[tuple[str, list[tuple[str, ...]]]] = [
        ("Settings that differ", [("setting", first, second), *contrast.settings]),
        (
            f"Bits per byte of {contrast.gain.documents:,} held-out documents",
            [("", first, second, "gain of the second"), ("bits per byte", *bits, str(contrast.gain))],
        ),
        ("Tasks", [("task", first, second, "difference"), *tasks]),
    ]
    return [(heading, rows) for heading, rows in tables if len(rows) > 1]


def describe(contrast: Contrast) -> str:
    """Write it for a terminal."""
    lines = []
    for heading, rows in _tables(contrast):
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += [heading, *("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), ""]
    lines += [f"So {_verdict(contrast.gain)}.", ""]
    for prompt, *told in contrast.samples:
        lines += [f"Samples after {prompt!r}"]
        lines += [f"  {name}: {text!r}" for name, text in zip(contrast.names, told, strict=True)]
    return "\n".join(lines).rstrip() + "\n"


def draw_page(contrast: Contrast) -> str:
    """Write it as one HTML page that needs nothing else."""
    parts = [f"<h1>{_escape(contrast.names[0])} and {_escape(contrast.names[1])}</h1>"]
    parts.append(f"<p>So {_verdict(contrast.gain)}.</p>")
    for heading, rows in _tables(contrast):
        parts.append(f"<h2>{_escape(heading)}</h2><table>{_rows(rows)}</table>")
    if contrast.samples:
        parts.append(f"<h2>Samples</h2><table>{_rows([('prompt', *contrast.names), *contrast.samples])}</table>")
    style = (
        "body{font:15px/1.4 system-ui;margin:2em auto;max-width:70em;padding:0 1em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;vertical-align:top;white-space:pre-wrap}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Two models compared</title>'
        f"<style>{style}</style><body>{''.join(parts)}</body></html>\n"
    )


def _rows(rows: Sequence[tuple[str, ...]]) -> str:
    cells = [
        [f"<{tag}>{_escape(cell)}</{tag}>" for cell in row] for row, tag in zip(rows, _tags(len(rows)), strict=True)
    ]
    return "".join(f"<tr>{''.join(row)}</tr>" for row in cells)


def _tags(count: int) -> list[str]:
    return ["th", *["td"] * (count - 1)]


def _escape(text: str) -> str:
    return html.escape(text)
