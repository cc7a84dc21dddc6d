"""Which stage comes next: every stage in order, each skipped when its artifact is already there.

    tokenizer ─▶ prepare ─▶ train ─▶ evaluate ─▶ register

Only this file knows all stages. A stage's fingerprint hashes its settings and its inputs' fingerprints, so a
changed setting gives new fingerprints to exactly the stages that depend on it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

from pipeline import evaluate, lease, prepare, register, tokenizer, tracking, train
from pipeline.artifacts import Artifact, Manifest, Recipe, artifact_at, describe_difference
from pipeline.config import Config
from pipeline.corpus.sources import fingerprint_source


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline: what it reads, and the module that does it."""

    name: str
    inputs: tuple[str, ...]
    module: ModuleType


STAGES = (
    Stage("tokenizer", ("source",), tokenizer),
    Stage("prepare", ("source", "tokenizer"), prepare),
    Stage("train", ("tokenizer", "prepare"), train),
    Stage("evaluate", ("tokenizer", "prepare", "train"), evaluate),
    Stage("register", ("tokenizer", "prepare", "train", "evaluate"), register),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def locate(config: Config) -> dict[str, Artifact]:
    """Name the artifact of the source and of each stage for this config; reads the source's listing, writes nothing."""
    source_fingerprint = fingerprint_source(config.source)
    artifacts = {"source": artifact_at(config.storage, config.name, "source", source_fingerprint)}
    for stage in STAGES:
        artifacts[stage.name] = name_output(stage, config, artifacts)
    return artifacts


def name_output(stage: Stage, config: Config, artifacts: Mapping[str, Artifact]) -> Artifact:
    """Name what a stage will make of these artifacts, with the recipe for it."""
    inputs = {name: artifacts[name].fingerprint for name in stage.inputs}
    recipe = Recipe(stage.module.FORMAT_VERSION, stage.module.settings(config), inputs)
    folder = config.train.run if stage.name == "train" else ""
    return artifact_at(config.storage, config.name, stage.name, recipe.fingerprint(stage.name), folder, recipe)


def run(
    config: Config,
    *,
    first: str | None = None,
    only: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Manifest]:
    """Run the stages that are not done, in order; return every manifest.

    `first` re-runs that stage and all after it. `only` runs a single stage, whose inputs must be done.
    One run holds the pipeline's name at a time.
    Raises `ValueError` where a person can mend it.
    """
    artifacts = locate(config)
    manifests: dict[str, Manifest] = {}
    with lease.hold(config.storage, config.name) as held:
        for position, stage in enumerate(STAGES):
            if only not in (None, stage.name):
                continue
            held.check()
            artifact = artifacts[stage.name]
            again = first is not None and position >= STAGE_NAMES.index(first)
            manifest = None if again else _finished(stage, config, artifact)
            if manifest is not None:
                report(f"{stage.name:<9} done already: {artifact.url}")
            else:
                _check_inputs(stage, artifacts)
                if again:
                    artifact.delete()
                report(f"{stage.name:<9} …")
                began = time.monotonic()
                inputs = {name: artifacts[name] for name in stage.inputs}
                manifest = _run_through_outages(stage, config, inputs, artifact, report)
                report(f"{stage.name:<9} done in {_duration(time.monotonic() - began)}: {artifact.url}")
            manifests[stage.name] = manifest
    return manifests


def _run_through_outages(
    stage: Stage, config: Config, inputs: Mapping[str, Artifact], artifact: Artifact, report: Callable[[str], None]
) -> Manifest:
    """Run a stage; if MLflow goes away meanwhile, wait for it and go on with the same stage."""
    patience_minutes = config.train.mlflow_patience_minutes
    deadline = None
    while True:
        try:
            return stage.module.run(config, inputs, artifact)
        except Exception as error:
            if not tracking.is_outage(error):
                raise
            deadline = deadline or time.monotonic() + 60 * patience_minutes
            report(f"{stage.name:<9} waits for MLflow, for {patience_minutes:g} minutes: {tracking.first_line(error)}")
            if not tracking.wait_for_answer(config, deadline):
                raise


def _check_inputs(stage: Stage, artifacts: Mapping[str, Artifact]) -> None:
    for name in stage.inputs:
        if name != "source" and not artifacts[name].is_done:
            raise ValueError(
                f"{stage.name} needs the {name} stage with these settings, which is not done;"
                f" run python -m jobs.{name} (or jobs.pipeline) first."
            )


def _finished(stage: Stage, config: Config, artifact: Artifact) -> Manifest | None:
    found = artifact.any_manifest()
    if found is None:
        return None
    if found.fingerprint != artifact.fingerprint:
        raise ValueError(
            f"The run {artifact.url} was made with another config:"
            f" {describe_difference(found.settings, artifact.recipe.settings)}"
            f" Give it another name (train.run), or delete that folder."
        )
    # A stage whose result also lives elsewhere (the registry) says whether it is still there.
    holds: Callable[[Config, Manifest], bool] | None = getattr(stage.module, "still_holds", None)
    return found if holds is None or holds(config, found) else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def describe_results(manifests: Mapping[str, Manifest]) -> str:
    """Say in a few lines what the pipeline made."""
    counts = {name: manifest.counts for name, manifest in manifests.items()}
    lines = []
    if "prepare" in counts:
        split = counts["prepare"]["train"]
        lines.append(f"text           {split['documents']:,} documents, {split['tokens']:,} tokens to train on")
    if "train" in counts:
        lines.append(f"training       {counts['train']['steps']:,} steps, {counts['train']['tokens']:,} tokens")
    if "evaluate" in counts:
        lines.append(f"quality        {counts['evaluate']['bits_per_byte']:.3f} bits per byte on held-out text")
    if "register" in counts:
        facts = counts["register"]
        lines.append(f"model          {facts['model_name']} version {facts['version']}, alias {facts['alias']}")
    return "\n".join(lines)
