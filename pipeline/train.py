"""Train the GPT on the token shards: Ray Train's workers, DDP, one MLflow run, checkpoints that nothing breaks.

    python -m jobs.train jobs/presets/demo.yaml

What the stage needs and what it makes; the loop of each worker is training/worker.py.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.chat import TEMPLATE_FILE, open_template
from model.checkpoint import TRAINING_STATE
from model.lora import count_adapter
from model.tokenizer import load_tokenizer
from pipeline import tracking
from pipeline.artifacts import MANIFEST, Artifact, FileRecord, Manifest, describe_difference
from pipeline.config import Config, result_settings, to_yaml
from pipeline.corpus.members import MIX
from pipeline.evaluation.exam import choose_exam
from pipeline.evaluation.model_card import README, Facts, write_card
from pipeline.evaluation.tasks import parse_entries
from pipeline.records.lab_book import name_run, write_note
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.extend import RUN_FILE, begin_from, suggest
from pipeline.training.history import FILE as HISTORY
from pipeline.training.history import History
from pipeline.training.launch import launch
from pipeline.training.plan import TrainingPlan, plan_training
from pipeline.training.samples import check_prompts
from pipeline.training.start import store_start
from pipeline.training.tracker import Tracker
from pipeline.training.validation import open_base_text

FORMAT_VERSION = 1
# What of a checkpoint's folder is no part of the model.
NOT_EXPORTED = (TRAINING_STATE, HISTORY, MANIFEST)


def settings(config: Config) -> dict[str, Any]:
    parse_entries(config.train.evaluate_tasks)  # asked for before anything runs: a wrong name is known now
    sections = {
        "model": config.model, "optimizer": config.optimizer, "stream": config.stream, "train": config.train
    }  # fmt: skip
    return tracking.flatten({name: result_settings(section) for name, section in sections.items()}) | {
        "seed": config.seed
    }


def run(
    config: Config,
    inputs: Mapping[str, Artifact],
    output: Artifact,
    watch: Callable[[TrainingPlan, Any], None] | None = None,
) -> Manifest:
    """Train to the last step, resuming where an earlier run of the same settings stopped; `watch` as for `launch`."""
    if "start" in inputs:
        store_start(config, inputs["start"])
    check_inputs(config, inputs)
    exam = choose_exam(config.train.evaluate_tasks, config.train.evaluate_tasks_items)
    facts = open_run(config, inputs, output)
    plan = plan_training(
        config,
        inputs,
        output,
        tracking_uri=facts["tracking_uri"],
        mlflow_run_id=facts["mlflow_run_id"],
        started=facts["started"],
        exam=exam,
    )
    try:
        result = launch(plan, watch)
        manifest = finish(config, plan, result)
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        tracking.close_run(plan.mlflow_run_id, "KILLED" if stopped else "FAILED")
        raise
    tracking.close_run(plan.mlflow_run_id, "FINISHED")
    return manifest


def advise(output: Artifact) -> str:
    """Say what can be done about a finished run of other settings."""
    return suggest(output)


def check_inputs(config: Config, inputs: Mapping[str, Artifact]) -> None:
    """Raise `ValueError` for what cannot be trained."""
    shards = inputs["prepare"].manifest()
    tokenizer = inputs["tokenizer"].manifest()
    assert shards is not None
    assert tokenizer is not None
    context_length, batch_tokens = config.model.context_length, config.train.batch_tokens
    with tempfile.TemporaryDirectory() as temporary:
        loaded = load_tokenizer(inputs["tokenizer"].download(Path(temporary)))
    if config.train.lora is not None:
        count_adapter(config.model, config.train.lora)  # refuses targets that this model has not
    counts = shards.counts
    if counts["tokenizer_digest"] != loaded.digest or counts["vocabulary_size"] != loaded.vocab_size:
        raise ValueError(
            f"The shards at {inputs['prepare'].url} were made with another vocabulary"
            f" ({counts['vocabulary_size']} tokens, digest {counts['tokenizer_digest'][:12]}…) than the tokenizer at"
            f" {inputs['tokenizer'].url} ({loaded.vocab_size} tokens, {loaded.digest[:12]}…); prepare them again."
        )
    if MIX not in counts and counts["train"]["tokens"] < batch_tokens + 1:  # the sources of a mix are read again
        raise ValueError(
            f"The corpus is too small: its train split holds {counts['train']['tokens']:,} tokens and one batch takes"
            f" {batch_tokens:,}; add text, or lower train.batch_tokens."
        )
    if counts["val"]["tokens"] < 2 or counts["val"]["bytes"] == 0:
        raise ValueError("The corpus has no held-out text: raise prepare.validation_fraction, or add text.")
    if config.train.base_text:
        open_base_text(config.train.base_text, loaded.digest)
    template = None
    if TEMPLATE_FILE in shards.files:
        template = open_template(inputs["prepare"].read_text(TEMPLATE_FILE), loaded.template_names)
    # Those of the evaluation too: it comes after all the work of the training.
    for key, prompts, num_tokens in (
        ("train.sample_prompts", config.train.sample_prompts, config.train.sample_tokens),
        ("evaluate.prompts", config.evaluate.prompts, config.evaluate.sample_tokens),
    ):
        check_prompts(loaded, key, prompts, num_tokens, context_length, template)


def open_run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> dict[str, Any]:
    """Note the run before it starts, or read the note of the one to resume; refuses to resume with other settings."""
    wanted = settings(config)
    known: dict[str, Any] = {}
    is_new = not output.exists(RUN_FILE)
    if not is_new:
        known = json.loads(output.read_text(RUN_FILE))
        if known["fingerprint"] != output.fingerprint:
            raise ValueError(
                f"The run {output.url} was started with another config:"
                f" {describe_difference(known['settings'], wanted)}"
                " Give this one another name (train.run), or delete that folder."
            )
    elif config.train.extends:
        known = begin_from(config, output)
    elif suggestion := suggest(output):
        print(f"train     begins anew. {suggestion}", flush=True)
    try:
        tracking_uri = tracking.connect(config)
        run_id = tracking.open_run(
            config,
            known.get("mlflow_run_id"),
            name=config.train.run or name_run(config),
            data={name: inputs[name] for name in ("prepare", "tokenizer", "start") if name in inputs},
            facts={"artifact": output.url, "fingerprint": output.fingerprint},
        )
    except ValueError as error:
        if is_new:
            raise
        print(f"{error} Training goes on, and MLflow gets the rest when it is back.", flush=True)
        return known | {"tracking_uri": tracking.address(config)}
    if is_new or run_id != known["mlflow_run_id"]:
        tags = describe_start(config, inputs)
        if "extended" in known:
            tags["extended"] = known["extended"]
        if "start_run_id" in tags:
            tags[tracking.PARENT_TAG] = tags["start_run_id"]  # a fine-tuning stands under the run that it began from
        known = {
            "mlflow_run_id": run_id,
            "fingerprint": output.fingerprint,
            "settings": wanted,
            "inputs": dict(output.recipe.inputs),
            "started": known.get("started", time.time()),
        }
        output.write_text(RUN_FILE, json.dumps(known, indent=1))
        shards = inputs["prepare"].manifest()
        assert shards is not None
        card = write_card(Facts(config, {}, shards.counts, {}, shards.fingerprint, output.fingerprint))
        with Tracker(tracking_uri, run_id) as tracker:
            tracker.log_tags(tags | {tracking.NOTE_TAG: write_note(card)})
            tracker.log_text("config.yaml", to_yaml(config))
            tracker.flush(timeout_seconds=30)
    return known | {"tracking_uri": tracking_uri}


def describe_start(config: Config, inputs: Mapping[str, Artifact]) -> dict[str, str]:
    """What links a training with the weights that it began with, for MLflow and the registry; empty without any."""
    if "start" not in inputs:
        return {}
    manifest = inputs["start"].manifest()
    assert manifest is not None
    facts = {"start": config.start.resolved, "start_digest": inputs["start"].fingerprint}
    return facts | ({"start_run_id": manifest.counts["run_id"]} if manifest.counts["run_id"] else {})


def finish(config: Config, plan: TrainingPlan, result: dict[str, Any]) -> Manifest:
    """Put the best checkpoint and the loss plot where the next stages look, close the MLflow run, mark it done."""
    output = plan.output
    start = describe_start(config, {} if plan.start is None else {"start": plan.start})
    store = CheckpointStore(output, config.train.keep_checkpoints)
    best = store.best()
    assert best is not None, "the last step is always evaluated and kept"
    files: dict[str, FileRecord] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = store.fetch(best, Path(folder) / best)
        found = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
        for name in sorted(name for name in found if name not in NOT_EXPORTED):
            place, path = f"checkpoint/{name}", checkpoint / name
            is_large = path.suffix == ".safetensors"  # small ones are copied: a person may edit them
            files[place] = output.keep_file(place, path) if is_large else output.write_bytes(place, path.read_bytes())
        last = next(name for name, _ in store.whole())
        history = History.load(store.fetch(last, Path(folder) / last))
    counts = {
        "mlflow_run_id": plan.mlflow_run_id,
        "steps": history.step,
        "tokens": history.tokens,
        "bits_per_byte": history.best_bits_per_byte,
        "best_step": history.best_step,
        "num_parameters": result["num_parameters"],
        "device": result["device"],  # evaluate asks for its kind
        "restarts": len(history.restarts),
        "skipped_steps": history.skipped_steps,
        "seconds": history.seconds,
        "precision": history.precision,
        **({"start": start} if start else {}),
    }
    shards = plan.shards.manifest()
    assert shards is not None
    facts = Facts(config, counts, shards.counts, {}, shards.fingerprint, output.fingerprint)
    card = write_card(facts)
    files[f"checkpoint/{README}"] = output.write_text(f"checkpoint/{README}", card)
    picture = history.draw(config.name)
    files["loss.png"] = output.write_bytes("loss.png", picture)
    files["config.yaml"] = output.write_text("config.yaml", to_yaml(config))
    with Tracker(plan.tracking_uri, plan.mlflow_run_id, unsent=result["unsent"], resumed=True) as tracker:
        tracker.log_drawing("loss.png", lambda: picture)
        tracker.log_tags({tracking.NOTE_TAG: write_note(card, plan.mlflow_run_id)})
        if not tracker.flush(timeout_seconds=60 * config.train.mlflow_patience_minutes):
            output.write_text("unsent.json", json.dumps(tracker.unsent()))
            print(f"MLflow did not answer; what it has not taken lies in {output.url}/unsent.json", flush=True)
    if output.exists("ray"):
        output.filesystem.rm(output.file("ray"), recursive=True)  # Ray Train's own notes; it needs them no more
    manifest = output.commit(counts, files)
    store.keep_only({last, best} if config.train.keep_training_state else ())
    return manifest
