"""Score the trained model: bits per byte of held-out text, tasks, and samples a person can read.

python -m jobs.evaluate jobs/presets/demo.yaml
"""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import ray
import torch

from model.chat import TEMPLATE_FILE, ChatTemplate, load_template
from model.gpt import GPT
from model.tokenizer import Tokenizer
from model.training import LossModule, choose_precision
from pipeline import tracking
from pipeline.artifacts import Artifact, FileRecord, Manifest
from pipeline.config import Config, result_settings
from pipeline.corpus.shards import holds_conversations
from pipeline.evaluation import report
from pipeline.evaluation.model_card import Facts, write_card
from pipeline.evaluation.spread import Place, ask, load
from pipeline.evaluation.tasks import load_task, parse_entries
from pipeline.records.lab_book import write_note
from pipeline.registry import PROBE_TAG, measure_probe
from pipeline.training.resources import set_threads, wants_gpu, worker_resources
from pipeline.training.samples import share_that_ends, write_samples
from pipeline.training.validation import HeldOut, Validation, find_questions, open_validation, score_held_out

FORMAT_VERSION = 1
GROUPED = (("base", "bits_per_byte"), ("answers", "ended"))  # figures of evaluation.json that MLflow has too
FIRST_TAG = "evaluation"  # of a training's run: the fingerprint of the evaluation whose figures are its headline


def settings(config: Config) -> dict[str, Any]:
    parse_entries(config.evaluate.tasks)  # asked for before anything runs: a wrong name is known now
    base = {"base_text": config.train.base_text} if config.train.base_text else {}
    return result_settings(config.evaluate) | {"seed": config.seed} | base


def run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest:
    """Score the checkpoint on workers, write `evaluation.json`, and add the figures to the training's MLflow run."""
    trained = inputs["train"].manifest()
    assert trained is not None
    tracking.connect(config)
    tasks = [load_task(entry) for entry in config.evaluate.tasks]
    use_gpu = wants_gpu(config.train, workers=1, had_gpu=trained.counts.get("device") == "cuda")
    place = Place.of(trained, config.train, use_gpu, worker_resources(config.train, use_gpu))
    score = ray.remote(score_checkpoint).options(num_gpus=place.gpus, num_cpus=place.cpus)
    result = ray.get(score.remote(config, inputs["train"], inputs["prepare"], place.device))
    files: dict[str, FileRecord] = {}
    pictures: dict[str, bytes] = {}
    if tasks:
        answers = ask(inputs["train"], tasks, place)
        result["tasks"] = {task.name: report.describe(task, said) for task, said in zip(tasks, answers, strict=True)}
        for task, said in zip(tasks, answers, strict=True):
            files |= report.write_answers(output, task, said)
            print(f"evaluate  {report.say(task.name, result['tasks'][task.name])}")
        pictures["tasks.png"] = report.draw(result["tasks"], title=f"{config.name}, training {trained.fingerprint[:8]}")

    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    contents = {"evaluation.json": text.encode(), **pictures}
    files |= {name: output.write_bytes(name, content) for name, content in contents.items()}
    figures = {"bits_per_byte": result["bits_per_byte"], "loss": result["loss"]}
    figures |= {f"{group}/{name}": result[group][name] for group, name in GROUPED if group in result}
    figures |= {f"{name}/bits_per_byte": each["bits_per_byte"] for name, each in result.get("sources", {}).items()}
    figures |= report.name_metrics(result.get("tasks", {}))
    run_id = tracking.find_run(config, inputs["train"])
    log_evaluation(run_id, output.fingerprint, figures, contents)
    card = write_card(Facts.of(config, inputs["prepare"], trained, output))
    mlflow.MlflowClient().set_tag(run_id, tracking.NOTE_TAG, write_note(card, run_id))
    counts = {name: value for name, value in result.items() if name not in ("samples", "tasks")}
    if tasks:
        counts["tasks"] = {
            name: {key: value for key, value in described.items() if key != "groups"}
            for name, described in result["tasks"].items()
        }
    return output.commit(counts, files)


def log_evaluation(run_id: str, fingerprint: str, figures: Mapping[str, float], files: Mapping[str, bytes]) -> None:
    """Add figures and files to a training's run, never in the place of earlier ones.

    The first evaluation's are `evaluate/…`, another one's `evaluate-<fingerprint>/…`, and the same one again goes on
    as the next step.
    """
    client = mlflow.MlflowClient()
    known = client.get_run(run_id).data
    first = known.tags.get(FIRST_TAG)
    if first is None and "evaluate/bits_per_byte" not in known.metrics:
        client.set_tag(run_id, FIRST_TAG, fingerprint)
        first = fingerprint
    prefix = "evaluate" if first == fingerprint else f"evaluate-{fingerprint[:8]}"
    step = len(client.get_metric_history(run_id, f"{prefix}/bits_per_byte"))
    folder = "" if prefix == "evaluate" and step == 0 else f"evaluations/{fingerprint[:8]}-{step}"
    with mlflow.start_run(run_id=run_id), tempfile.TemporaryDirectory() as temporary:
        mlflow.log_metrics({f"{prefix}/{name}": value for name, value in figures.items()}, step=step)
        for name, content in files.items():
            (Path(temporary) / name).write_bytes(content)
        mlflow.log_artifacts(temporary, folder or None)


def score_checkpoint(config: Config, train: Artifact, shards: Artifact, device: str = "cpu") -> dict[str, Any]:
    """Return loss (nats per token), bits per byte, perplexity, what was scored, and one sample per prompt.

    Attention, precision, threads and the cache of decoded shards are the training's.
    """
    set_threads(config.train.threads_per_worker, 1)
    # What `auto` came to on the machine that trained; checkpoints of earlier code do not say.
    trained = train.manifest()
    assert trained is not None
    precision = choose_precision(trained.counts.get("precision") or config.train.precision, device)
    model, tokenizer = load(train, device)
    model.restarts_positions = holds_conversations(shards)
    options = config.evaluate
    held_out = open_validation(
        shards,
        config.model,
        config.train,
        config.stream,
        batch_sequences=options.batch_sequences,
        max_tokens=options.max_tokens,
    )
    validation = score_held_out(LossModule(model), held_out, tokenizer.byte_lengths, precision=precision)
    score = validation.score
    if score.num_bytes == 0:
        raise ValueError("The validation split holds no text to score; raise prepare.validation_fraction or add text.")
    template = load_template_of(train) if holds_conversations(shards) else None
    samples = write_samples(model, tokenizer, options.prompts, options.sample_tokens, config.seed, precision, template)
    return {
        "bits_per_byte": score.bits_per_byte,
        "loss": score.nats_per_token,
        "perplexity": math.exp(min(score.nats_per_token, 700.0)),
        "tokens": score.tokens,
        "bytes": score.num_bytes,
        **({"sources": describe_sources(validation)} if validation.sources else {}),
        **({"base": {"bits_per_byte": validation.base.bits_per_byte}} if validation.base is not None else {}),
        **count_ends(config, model, tokenizer, held_out, precision),
        PROBE_TAG: measure_probe(model, tokenizer),  # what serving compares with before it takes a version over
        "samples": [{"prompt": prompt, "text": text} for prompt, text in samples.items()],
    }


def load_template_of(train: Artifact) -> ChatTemplate | None:
    """Open the chat template that a training's checkpoint carries."""
    manifest = train.manifest()
    assert manifest is not None
    records = {f"checkpoint/{name}" for name in (TEMPLATE_FILE, "tokenizer_config.json")} & manifest.files.keys()
    with tempfile.TemporaryDirectory() as folder:
        train.download(Path(folder), {name: manifest.files[name] for name in records})
        return load_template(Path(folder) / "checkpoint")


def count_ends(
    config: Config, model: GPT, tokenizer: Tokenizer, held_out: list[HeldOut], precision: torch.dtype
) -> dict[str, Any]:
    """Answer held-out questions, and say how many answers end by themselves; empty where there are no questions."""
    options = config.evaluate
    questions = find_questions(held_out, options.answer_questions, options.answer_tokens)
    if not questions:
        return {}
    ended = share_that_ends(model, tokenizer, questions, options.answer_tokens, config.seed, precision)
    return {"answers": {"questions": len(questions), "ended": ended}}


def describe_sources(validation: Validation) -> dict[str, dict[str, float]]:
    """What is known of each source of a mix."""
    return {
        name: {"bits_per_byte": score.bits_per_byte, "loss": score.nats_per_token, "tokens": score.tokens}
        for name, score in validation.sources.items()
    }
