"""A whole search, in order: shards, trials, the truth with fresh seeds, the ladder, and what is written of it.

    study.run(config)

It holds the pipeline's name, and goes on where it was stopped: everything that is over is a training's artifact or a
record. With `search.space` it answers which point is better than the preset; with `search.widths`, what compute says.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Param

from pipeline import lease, orchestrator, tracking
from pipeline.artifacts import Artifact, Manifest, Recipe, artifact_at
from pipeline.config import Config, result_settings
from pipeline.search import report, suggest
from pipeline.search.ladder import Rung, count_flops, plan_ladder
from pipeline.search.space import Point, configure, describe_point, draw_points, parse_space, target_tokens
from pipeline.search.trial import DONE, PARENT_TAG, SEARCH_TAG, Record, Trial
from pipeline.search.tuning import make_scheduler, run_trials
from pipeline.search.verdict import Scaling, Verdict, fit_scaling, judge

FORMAT_VERSION = 1
FINALISTS = 2
PRESET: Point = {}  # the point that changes nothing


@dataclass
class Final:
    """One setting trained with fresh seeds at the preset's size."""

    point: Point
    bits: list[float]
    verdict: Verdict | None = None  # against the preset; None for the preset itself


@dataclass
class Findings:
    """All that a search found."""

    trials: list[Trial] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    finals: list[Final] = field(default_factory=list)
    rungs: list[tuple[Rung, float]] = field(default_factory=list)  # with bits per byte
    scaling: Scaling | None = None
    target_flops: float = 0.0
    target_bits: float | None = None  # what the preset really reached

    @property
    def winner(self) -> Final | None:
        """The final that is shown to be better than the preset, the best if there are two."""
        shown = [final for final in self.finals if final.verdict is not None and final.verdict.shows_gain]
        return max(shown, key=lambda final: final.verdict.gain if final.verdict else 0.0, default=None)


def run(config: Config, say: Callable[[str], None] = print) -> Manifest:
    """Search as `config.search` says, and write down what came of it.

    Raises `ValueError` where a person can mend it, before the first stage wherever that can be known.
    """
    points = check(config)
    for stage in ("tokenizer", "prepare"):
        orchestrator.run(config, only=stage)
    artifacts = orchestrator.locate(config)
    shards = artifacts["prepare"].manifest()
    assert shards is not None
    vocab_size = int(shards.counts["vocabulary_size"])
    output = name_output(config, artifacts["prepare"])
    found = output.manifest()
    if found is not None:
        say(f"search    done already: {output.url}")
        say(output.read_text("search.md"))
        return found
    rungs = plan_ladder(config, vocab_size)
    with lease.hold(config.storage, config.name):
        tracking.connect(config)
        parent = open_parent(config, output, {name: artifacts[name] for name in ("tokenizer", "prepare")})
        maker = Maker(config, artifacts, output, parent)
        findings = Findings(target_flops=count_flops(config, vocab_size))
        try:
            if config.search.space:
                try_points(config, maker, points, findings, say)
                if config.search.seeds:
                    find_truth(config, maker, findings, say)
            if rungs:
                climb(maker, rungs, findings, say)
            manifest = finish(config, output, parent, findings)
        except BaseException as error:
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
            tracking.close_run(parent, "KILLED" if stopped else "FAILED")
            raise
    say(f"\n{output.read_text('search.md')}")
    say(f"preset    {output.url}/best.yaml")
    return manifest


def check(config: Config) -> list[Point]:
    """Return the points to try; raises `ValueError` for a search of nothing, or for a point that is no training."""
    options = config.search
    if not (options.space or options.ladder):
        raise ValueError("There is nothing to search: give search.space, search.widths, or both.")
    if config.train.extends:
        raise ValueError("A search begins its trainings anew: leave train.extends empty, or give start.model.")
    if config.train.minutes:
        raise ValueError("A search gives every trial as many tokens: set train.minutes=0, and train.steps.")
    plan_ladder(config, config.tokenizer.most_tokens)
    if options.space and options.algorithm == "optuna":
        suggest.check_optuna()
        parse_space(options.space)
        if not options.trials:
            raise ValueError("search.trials must say how many points Optuna may suggest.")
        return []
    points = draw_points(options, config.seed)
    for point in points:
        configure(config, point, tokens=options.trial_tokens)
    return points


def name_output(config: Config, prepared: Artifact) -> Artifact:
    """Name the search's artifact: by what it tries, by the training that it varies, and by the shards."""
    train: Any = orchestrator.module_of("train")
    settings = {
        "search": result_settings(config.search),
        "train": train.settings(configure(config, PRESET)),
    }
    recipe = Recipe(FORMAT_VERSION, settings, {"prepare": prepared.fingerprint})
    return artifact_at(config.storage, config.name, "search", recipe.fingerprint("search"), recipe=recipe)


@dataclass(frozen=True)
class Maker:
    """Makes trials: numbered, each with the artifact that its training will be."""

    config: Config
    artifacts: Mapping[str, Artifact]
    search: Artifact
    parent_run_id: str

    def trial(self, number: int, point: Point, config: Config) -> Trial:
        inputs = {name: self.artifacts[name] for name in orchestrator.inputs_of("train", config)}
        output = orchestrator.name_output("train", config, self.artifacts)
        return Trial(number, point, config, inputs, output, self.search, self.parent_run_id)

    def suggested(self, tokens: int, point: Point) -> Trial:
        """A trial that was not planned: its number tells it from others."""
        config = configure(self.config, point, tokens=tokens)
        name = orchestrator.name_output("train", config, self.artifacts).fingerprint
        return self.trial(10_000 + int(name[:5], 16), point, config)


def try_points(
    config: Config, maker: Maker, points: list[Point], findings: Findings, say: Callable[[str], None]
) -> None:
    """The trials: the preset first, then the points; a point that is the preset's own training counts once."""
    tokens = config.search.trial_tokens or target_tokens(config)
    seen: dict[str, Trial] = {}
    for point in (PRESET, *points):
        trial = maker.trial(len(seen), point, configure(config, point, tokens=tokens))
        seen.setdefault(trial.output.fingerprint, trial)
    findings.trials = list(seen.values())
    count = max(len(findings.trials), 1 + config.search.trials)
    say(f"search    {count} trials of {tokens:,} tokens, the preset among them")
    make_rungs = partial(make_scheduler, config, tokens)
    if config.search.algorithm == "optuna":
        preset, make = findings.trials[0], partial(maker.suggested, tokens)
        findings.trials, findings.records = suggest.run_suggested(config, preset, make, scheduler=make_rungs)
    else:
        findings.records = run_trials("trial", findings.trials, scheduler=make_rungs(), may_end_early=True)


def find_truth(config: Config, maker: Maker, findings: Findings, say: Callable[[str], None]) -> None:
    """Train the best two and the preset at its size, with seeds that have chosen nothing."""
    ranked = sorted(
        (record.bits_per_byte, trial.number)
        for trial, record in zip(findings.trials, findings.records, strict=True)
        if record.state == DONE
    )
    if not ranked:
        reasons = {record.reason for record in findings.records}
        raise ValueError(f"No trial came to its end: {'; '.join(sorted(reasons))}.")
    by_number = {trial.number: trial for trial in findings.trials}
    chosen = [by_number[number].point for _, number in ranked[:FINALISTS]]
    settings = [PRESET, *(point for point in chosen if point != PRESET)]
    seeds = [config.seed + 1 + at for at in range(config.search.seeds)]
    say(f"search    the truth: {', '.join(map(describe_point, settings))}, each with seeds {seeds}")
    trials = [
        maker.trial(1000 + at * len(seeds) + place, point, configure(config, point, seed=seed))
        for at, point in enumerate(settings)
        for place, seed in enumerate(seeds)
    ]
    records = run_trials("final", trials)
    check_whole(trials, records)
    bits = [record.bits_per_byte for record in records]
    findings.finals = [Final(point, bits[at * len(seeds) : (at + 1) * len(seeds)]) for at, point in enumerate(settings)]
    preset, *others = findings.finals
    for final in others:
        final.verdict = judge(preset.bits, final.bits, comparisons=len(others))
    findings.target_bits = sum(preset.bits) / len(preset.bits)


def climb(maker: Maker, rungs: list[Rung], findings: Findings, say: Callable[[str], None]) -> None:
    """Train the ladder, fit its line, and lay the preset's real figure beside the prediction."""
    say(f"search    a ladder of widths {', '.join(str(rung.width) for rung in rungs)}")
    trials = [maker.trial(2000 + at, rung.point, rung.config) for at, rung in enumerate(rungs)]
    needs_target = findings.target_bits is None
    if needs_target:
        trials.append(maker.trial(2000 + len(rungs), PRESET, configure(maker.config, PRESET)))
    records = run_trials("ladder", trials)
    check_whole(trials, records)
    bits = [record.bits_per_byte for record in records]
    findings.rungs = list(zip(rungs, bits, strict=False))
    if needs_target:
        findings.target_bits = bits[-1]
    findings.scaling = fit_scaling([rung.flops for rung in rungs], bits[: len(rungs)])


def check_whole(trials: list[Trial], records: list[Record]) -> None:
    """Raise `ValueError` unless every one of these trainings is done: without one, nothing is shown."""
    for trial, record in zip(trials, records, strict=True):
        if record.state != DONE:
            raise ValueError(f"The training of {describe_point(trial.point)} failed: {record.reason}")


def open_parent(config: Config, output: Artifact, data: Mapping[str, Artifact]) -> str:
    """Return the search's own MLflow run, the parent of its trainings' runs; one over all starts.

    It names the data before any training does, for several of them begin at once.
    """
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(config.name)
    assert experiment is not None, "connect() makes it"
    same = f"tags.{SEARCH_TAG} = '{output.fingerprint}'"
    found = [run for run in client.search_runs([experiment.experiment_id], same) if PARENT_TAG not in run.data.tags]
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return str(found[0].info.run_id)
    tags = {SEARCH_TAG: output.fingerprint, "stage": "search", "command": tracking.command_line()}
    run = client.create_run(experiment.experiment_id, run_name=f"search {output.fingerprint[:8]}", tags=tags)
    settings = tracking.flatten({"search": result_settings(config.search)})
    client.log_batch(run.info.run_id, params=[Param(key, str(value)[:6000]) for key, value in settings.items()])
    tracking.log_data(str(run.info.run_id), data)
    return str(run.info.run_id)


def finish(config: Config, output: Artifact, parent: str, findings: Findings) -> Manifest:
    """Write the page, the table, the pictures and the preset; commit, and show them on the parent run."""
    contents = report.write(config, findings, output.fingerprint)
    files = {name: output.write_bytes(name, content) for name, content in contents.items()}
    files |= {
        trial.file: output.write_text(trial.file, json.dumps(asdict(record)))
        for trial, record in zip(findings.trials, findings.records, strict=True)
    }
    figures = report.name_figures(findings)
    client = mlflow.MlflowClient()
    for name, value in figures.items():
        client.log_metric(parent, name, value)
    client.set_tag(parent, "mlflow.note.content", contents["search.md"].decode())
    with tempfile.TemporaryDirectory() as folder:
        for name, content in contents.items():
            (Path(folder) / name).write_bytes(content)
        client.log_artifacts(parent, folder)
    tracking.close_run(parent, "FINISHED")
    return output.commit({"trials": len(findings.trials), "mlflow_run_id": parent, **figures}, files)
