"""Training further: a finished run goes on to more steps, with its moments and in its MLflow run.

    config = find_finished(config, train_artifact)      # --extend: which run goes on, as train.extends
    extended = begin_from(config, output)               # its checkpoints lie where the new run looks for the newest

The run that goes on is a training of its own, with a fingerprint that names the one before it, which stays as it was.
"""

import dataclasses
import json
import posixpath
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.artifacts import Artifact, FileRecord, Manifest, describe_difference
from pipeline.config import Config, TrainConfig
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.history import FILE as HISTORY
from pipeline.training.length import work_seconds

RUN_FILE = "run.json"  # which MLflow run and which settings an unfinished training belongs to
EXTENDS = "train.extends"
# What may change while weights and moments go on: how far, at which rates, and how often the run looks at itself.
MAY_CHANGE = (
    *("train.steps", "train.minutes", "train.evaluate_every_steps", "train.on_bad_loss"),
    *("optimizer.schedule", "optimizer.warmup_steps", "optimizer.decay_fraction", "optimizer.final_ratio"),
    *("optimizer.learning_rate", "optimizer.muon_learning_rate", "optimizer.embedding_learning_rate"),
    *("optimizer.head_learning_rate", "optimizer.scalar_learning_rate"),
)


@dataclass(frozen=True)
class Finished:
    """A training that is done, and how a wanted one differs from it."""

    artifact: Artifact
    manifest: Manifest
    changed: tuple[str, ...]  # settings
    inputs: tuple[str, ...]  # other ones: the text, the tokenizer or the start has changed
    steps: int  # that the wanted one has
    minutes: float  # that it has in place of steps, or 0

    @property
    def refused(self) -> list[str]:
        """The settings that no run can go on with."""
        return [key for key in self.changed if key not in MAY_CHANGE]

    @property
    def can_go_on(self) -> bool:
        return not self.refused and not self.inputs and self.is_shorter

    @property
    def is_shorter(self) -> bool:
        if self.minutes:
            return work_seconds(self.manifest.counts["seconds"]) < 60 * self.minutes
        return bool(self.manifest.counts["steps"] < self.steps)

    def describe(self, now: Mapping[str, Any]) -> str:
        then = self.manifest.settings
        return describe_difference(
            {key: then.get(key) for key in self.changed}, {key: now.get(key) for key in self.changed}
        )


def find_finished(config: Config, wanted: Artifact) -> Config:
    """Name the finished run that a wanted training goes on from, in `train.extends`.

    Raises `ValueError` with one sentence where none can: which settings or inputs stand against it.
    """
    if config.train.extends:
        return config
    begun = dict(_begun(wanted))
    for settings in begun.values():
        if settings.get(EXTENDS) and without(settings) == without(wanted.recipe.settings):
            return _extending(config, str(settings[EXTENDS]))  # it has begun, or it is done
    if wanted.fingerprint in begun:
        return config  # the run itself is there: it goes on, or is done, as without --extend
    known = list(_finished(wanted))
    if not known:
        raise ValueError(f"--extend goes on from a finished run, and {posixpath.dirname(wanted.url)} holds none.")
    fitting = [each for each in known if each.can_go_on]
    if not fitting:
        raise ValueError(_refusal(known, wanted))
    chosen = max(fitting, key=lambda each: (each.manifest.counts["steps"], -len(each.changed), each.manifest.created))
    _last_checkpoint(chosen.artifact, chosen.manifest)
    print(
        f"train     goes on from {chosen.artifact.url}, which ended at step {chosen.manifest.counts['steps']:,}:"
        f" {chosen.describe(wanted.recipe.settings)}",
        flush=True,
    )
    return _extending(config, chosen.manifest.fingerprint)


def suggest(wanted: Artifact) -> str:
    """Say which finished run could go on instead of a new training, and how it differs; empty where none could."""
    fitting = [each for each in _finished(wanted) if each.can_go_on]
    if not fitting or wanted.recipe.settings.get(EXTENDS):
        return ""
    best = max(fitting, key=lambda each: (each.manifest.counts["steps"], -len(each.changed)))
    return (
        f"{best.artifact.url} is a finished run like this one: {best.describe(wanted.recipe.settings)} With --extend it"
        f" goes on from step {best.manifest.counts['steps']:,}, with its moments and in its MLflow run."
    )


def begin_from(config: Config, output: Artifact) -> dict[str, Any]:
    """Put the last and the best checkpoint of the run that goes on where `output` looks for them; return its note."""
    parent = next((each for each in _finished(output) if each.manifest.fingerprint == config.train.extends), None)
    if parent is None:
        raise ValueError(
            f"train.extends={config.train.extends} names no finished run of {posixpath.dirname(output.url)}; leave it"
            f" out and give --extend."
        )
    if not parent.can_go_on:
        raise ValueError(_refusal([parent], output))
    store, theirs = CheckpointStore(output, 1), CheckpointStore(parent.artifact, 1)
    for name in {_last_checkpoint(parent.artifact, parent.manifest), theirs.best()} - {None}:
        assert name is not None
        _copy_checkpoint(theirs.at(name), store.at(name))
    return {
        "mlflow_run_id": parent.manifest.counts["mlflow_run_id"],
        "started": time.time(),  # the time since the run before ended is not this one's
        "extended": f"from {parent.manifest.counts['steps']:,} steps to {describe_length(config.train)},"
        f" {parent.artifact.url}",
    }


def describe_length(train: TrainConfig) -> str:
    return f"{train.minutes:g} minutes" if train.minutes else f"{train.steps:,} steps"


def without(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a training but for what it goes on from, as a file holds them."""
    return json.loads(json.dumps({key: value for key, value in settings.items() if key != EXTENDS}, default=list))


def _extending(config: Config, fingerprint: str) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, extends=fingerprint))


def _trainings(wanted: Artifact) -> Iterator[Artifact]:
    """Every training of this pipeline, whatever its settings."""
    folder = posixpath.dirname(wanted.path)
    try:
        entries = wanted.filesystem.ls(folder, detail=False)
    except FileNotFoundError:
        return
    for entry in sorted(entries):
        name = posixpath.basename(str(entry).rstrip("/"))
        if name.startswith("train-"):
            yield Artifact(f"{posixpath.dirname(wanted.url)}/{name}", "train", "")


def _begun(wanted: Artifact) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The fingerprint and the settings of every training that has begun, done or not, with the same inputs."""
    for artifact in _trainings(wanted):
        manifest, inputs = artifact.any_manifest(), dict(wanted.recipe.inputs)
        if manifest is not None:
            if manifest.inputs == inputs:
                yield manifest.fingerprint, manifest.settings
        elif artifact.exists(RUN_FILE):
            note = json.loads(artifact.read_text(RUN_FILE))
            if note.get("inputs") == inputs:
                yield str(note["fingerprint"]), note["settings"]


def _finished(wanted: Artifact) -> Iterator[Finished]:
    now, inputs = without(wanted.recipe.settings), dict(wanted.recipe.inputs)
    for artifact in _trainings(wanted):
        manifest = artifact.any_manifest()
        if manifest is None or manifest.fingerprint == wanted.fingerprint:
            continue
        then = without(manifest.settings)
        changed = tuple(key for key in sorted({*then, *now}) if then.get(key) != now.get(key))
        others = tuple(
            sorted(name for name in {*inputs, *manifest.inputs} if inputs.get(name) != manifest.inputs.get(name))
        )
        named = Artifact(artifact.url, "train", manifest.fingerprint)
        minutes = float(now.get("train.minutes", 0))
        yield Finished(named, manifest, changed, others, int(now["train.steps"]), minutes)


def _refusal(known: list[Finished], wanted: Artifact) -> str:
    """Say why the nearest of the finished runs cannot go on."""
    nearest = min(known, key=lambda each: (len(each.inputs) + len(each.refused), -each.manifest.counts["steps"]))
    beginning = f"--extend cannot go on from {nearest.artifact.url}:"
    if nearest.inputs:
        return f"{beginning} its {' and '.join(nearest.inputs)} differ, so that this is another training."
    if nearest.refused:
        then, now = nearest.manifest.settings, wanted.recipe.settings
        told = describe_difference(
            {key: then.get(key) for key in nearest.refused}, {key: now.get(key) for key in nearest.refused}
        )
        return f"{beginning} {told} Only {', '.join(MAY_CHANGE)} may change."
    if nearest.minutes:
        worked = work_seconds(nearest.manifest.counts["seconds"]) / 60
        return (
            f"{beginning} it worked for {worked:.1f} minutes; give train.minutes above that, not {nearest.minutes:g}."
        )
    return (
        f"{beginning} it ended at step {nearest.manifest.counts['steps']:,}; give a train.steps above that, which is"
        f" {nearest.steps:,} now."
    )


def _last_checkpoint(artifact: Artifact, manifest: Manifest) -> str:
    """Name the checkpoint in which a run ended; raises `ValueError` where only its weights are left."""
    for name, checkpoint in CheckpointStore(artifact, 1).whole():
        if checkpoint.counts["step"] == manifest.counts["steps"]:
            return name
    raise ValueError(
        f"{artifact.url} can not go on: the checkpoint of its last step, with the optimizer's moments, is gone. Its"
        f" weights are left: start.model={artifact.url}/checkpoint begins a new run from them."
    )


def _copy_checkpoint(theirs: Artifact, ours: Artifact) -> None:
    """Copy a checkpoint into another run, where its time is counted from now on."""
    manifest = theirs.manifest()
    assert manifest is not None
    files: dict[str, FileRecord] = dict(manifest.files)
    for name in files:
        if name == HISTORY:
            history = json.loads(theirs.read_text(HISTORY)) | {"saved": 0.0}
            files[name] = ours.write_text(name, json.dumps(history))
        else:
            ours.filesystem.cp_file(theirs.file(name), ours.file(name))
    ours.commit(manifest.counts, files)
