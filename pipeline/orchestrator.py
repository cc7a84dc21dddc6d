"""Which stage comes next: every stage of `stages.py` in order, each skipped when its artifact is already there.

A stage's fingerprint hashes its settings and its inputs' fingerprints, so a changed setting gives new
fingerprints to exactly the stages that depend on it.
"""

import importlib
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import Any, Protocol, cast

from pipeline import lease, tracking
from pipeline.artifacts import Artifact, Manifest, Recipe, artifact_at, describe_difference, is_disk_full
from pipeline.config import Config
from pipeline.corpus.files import fingerprint_source
from pipeline.stages import READ_START, STAGES

SAME_OUTAGE_SECONDS = 60.0  # a failure so soon after MLflow's answer belongs to the outage before it


class StageModule(Protocol):
    """What a stage's module offers.

    One whose result also lives elsewhere has `still_holds(config, manifest) -> bool` besides; one that makes several
    artifacts has `parts(config, inputs) -> list[Artifact]`; one that knows what to do about a result of other settings
    has `advise(artifact) -> str`; one whose processes take long to start has `get_ready(config)`, which is called while
    the stage before it runs.
    """

    FORMAT_VERSION: int

    def settings(self, config: Config) -> dict[str, Any]: ...

    def run(self, config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest: ...


def module_of(stage: str) -> StageModule:
    return cast(StageModule, importlib.import_module(f"pipeline.{stage}"))


def locate(config: Config) -> dict[str, Artifact]:
    """Name the artifact of the source and of each stage for this config; reads the source's listing, writes nothing."""
    source_fingerprint = fingerprint_source(config.source)
    artifacts = {"source": artifact_at(config.storage, config.name, "source", source_fingerprint)}
    if config.start.model:
        assert config.start.digest, "load_started_config finds out what start.model means"
        artifacts["start"] = artifact_at(config.storage, config.name, "start", config.start.digest)
    for stage in STAGES:
        artifacts[stage] = name_output(stage, config, artifacts)
    return artifacts


def inputs_of(stage: str, config: Config) -> tuple[str, ...]:
    """Name what a stage reads: the start only where there is one, and for the tokenizer only if it is the start's."""
    reads_start = stage in READ_START and (stage != "tokenizer" or config.tokenizer.kind == "start")
    return (*STAGES[stage], *(["start"] if config.start.model and reads_start else []))


def name_output(stage: str, config: Config, artifacts: Mapping[str, Artifact]) -> Artifact:
    """Name what a stage will make of these artifacts, with the recipe for it."""
    module = module_of(stage)
    inputs = {name: artifacts[name].fingerprint for name in inputs_of(stage, config)}
    recipe = Recipe(module.FORMAT_VERSION, module.settings(config), inputs)
    fingerprint, folder = recipe.fingerprint(stage), ""
    if stage == "train" and config.train.run:
        # One that goes on from a run of this name lies beside it.
        folder = f"{config.train.run}-{fingerprint[:8]}" if config.train.extends else config.train.run
    return artifact_at(config.storage, config.name, stage, fingerprint, folder, recipe)


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
    Raises `ValueError` where a person can mend it; if MLflow does not answer, before the first stage.
    """
    tracking.address(config)  # what is wrong with it is known before the first stage
    artifacts = locate(config)
    manifests: dict[str, Manifest] = {}
    again = is_asked = False
    getting_ready: Future[None] | None = None
    with lease.hold(config.storage, config.name) as held, ThreadPoolExecutor(1) as beside:
        for stage, following in zip_longest(STAGES, list(STAGES)[1:]):
            again = again or stage == first
            if only not in (None, stage):
                continue
            held.check()
            artifact = artifacts[stage]
            manifest = None if again else _finished(stage, config, artifact)
            if manifest is not None:
                report(f"{stage:<9} done already: {artifact.url}")
            else:
                inputs = {name: artifacts[name] for name in inputs_of(stage, config)}
                _check_inputs(stage, inputs)
                if only is None and not is_asked:
                    # Training needs it: without this hours of preparing come before that sentence.
                    tracking.connect(config)
                    is_asked = True
                if again:
                    for each in (artifact, *_parts(stage, config, inputs)):
                        each.delete()
                report(f"{stage:<9} …")
                if getting_ready is not None:
                    getting_ready.result()
                began = time.monotonic()
                if only is None and following is not None:
                    getting_ready = beside.submit(_get_ready, following, config)
                manifest = _run_through_outages(stage, config, inputs, artifact, report)
                report(f"{stage:<9} done in {_duration(time.monotonic() - began)}: {artifact.url}")
            manifests[stage] = manifest
    return manifests


def _get_ready(stage: str, config: Config) -> None:
    start = getattr(module_of(stage), "get_ready", None)
    if start is not None:
        start(config)


def _run_through_outages(
    stage: str, config: Config, inputs: Mapping[str, Artifact], output: Artifact, report: Callable[[str], None]
) -> Manifest:
    """Run a stage; if MLflow goes away meanwhile, wait for it and go on with the same stage."""
    patience_minutes = config.train.mlflow_patience_minutes
    deadline = answered = -math.inf
    while True:
        try:
            return module_of(stage).run(config, inputs, output)
        except Exception as error:
            if not tracking.is_outage(error):
                if is_disk_full(error) and not isinstance(error, (OSError, ValueError)):
                    raise ValueError(tracking.explain_trouble(error, tracking.address(config))) from error
                raise
            # Each outage has its own deadline; what goes wrong right after an answer is still the same one.
            if time.monotonic() - answered > SAME_OUTAGE_SECONDS:
                deadline = time.monotonic() + 60 * patience_minutes
            report(f"{stage:<9} waits for MLflow, for {patience_minutes:g} minutes: {tracking.first_line(error)}")
            if not tracking.wait_for_answer(config, deadline):
                raise
            answered = time.monotonic()


def _parts(stage: str, config: Config, inputs: Mapping[str, Artifact]) -> list[Artifact]:
    """Name the artifacts that a stage makes besides its own: one for each source of a mix."""
    parts: Callable[..., list[Artifact]] | None = getattr(module_of(stage), "parts", None)
    return [] if parts is None else parts(config, inputs)


def _check_inputs(stage: str, inputs: Mapping[str, Artifact]) -> None:
    for name, artifact in inputs.items():
        if name in STAGES and not artifact.is_done:
            raise ValueError(
                f"{stage} needs the {name} stage with these settings, which is not done;"
                f" run python -m jobs.{name} (or jobs.pipeline) first."
            )


def _finished(stage: str, config: Config, artifact: Artifact) -> Manifest | None:
    found = artifact.any_manifest()
    if found is None:
        return None
    if found.fingerprint != artifact.fingerprint:
        advise: Callable[[Artifact], str] = getattr(module_of(stage), "advise", lambda _: "")
        raise ValueError(
            f"The run {artifact.url} was made with another config:"
            f" {describe_difference(found.settings, artifact.recipe.settings)}"
            f" Give it another name (train.run), or delete that folder. {advise(artifact)}".rstrip()
        )
    # The registry, where register's result also lives, may have lost it, or a mix one of its sources.
    holds: Callable[[Config, Manifest], bool] | None = getattr(module_of(stage), "still_holds", None)
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
