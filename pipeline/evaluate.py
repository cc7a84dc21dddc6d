"""Score the trained model on held-out text: bits per byte, and samples a person can read.

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

from model.checkpoint import load_model
from model.scoring import score_batches
from model.tokenizer import load_tokenizer
from model.training import LossModule, choose_precision
from pipeline import tracking
from pipeline.artifacts import Artifact, Manifest
from pipeline.config import Config, result_settings
from pipeline.corpus.shards import holds_conversations
from pipeline.registry import PROBE_TAG, measure_probe
from pipeline.training.resources import set_threads, wants_gpu, worker_resources
from pipeline.training.samples import write_samples
from pipeline.training.validation import open_validation

FORMAT_VERSION = 1


def settings(config: Config) -> dict[str, Any]:
    return result_settings(config.evaluate) | {"seed": config.seed}


def run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest:
    """Score the checkpoint on a worker, write `evaluation.json`, and add the figures to the training's MLflow run."""
    trained = inputs["train"].manifest()
    assert trained is not None
    tracking.connect(config)
    use_gpu = wants_gpu(config.train, workers=1, had_gpu=trained.counts.get("device") == "cuda")
    resources = worker_resources(config.train, use_gpu)
    score = ray.remote(score_checkpoint).options(num_gpus=resources.get("GPU", 0), num_cpus=resources["CPU"])
    result = ray.get(score.remote(config, inputs["train"], inputs["prepare"], "cuda" if use_gpu else "cpu"))

    text = json.dumps(result, indent=1, ensure_ascii=False)
    record = output.write_text("evaluation.json", text + "\n")
    with mlflow.start_run(run_id=tracking.find_run(config, inputs["train"])):
        mlflow.log_metrics({"evaluate/bits_per_byte": result["bits_per_byte"], "evaluate/loss": result["loss"]})
        mlflow.log_text(text, "evaluation.json")
    return output.commit(
        counts={name: value for name, value in result.items() if name != "samples"},
        files={"evaluation.json": record},
    )


def score_checkpoint(config: Config, train: Artifact, shards: Artifact, device: str = "cpu") -> dict[str, Any]:
    """Return loss (nats per token), bits per byte, perplexity, what was scored, and one sample per prompt.

    Attention, precision, threads and the cache of decoded shards are the training's.
    """
    manifest = train.manifest()
    assert manifest is not None
    set_threads(config.train.threads_per_worker, 1)
    # What `auto` came to on the machine that trained; checkpoints of earlier code do not say.
    precision = choose_precision(manifest.counts.get("precision") or config.train.precision, device)
    with tempfile.TemporaryDirectory() as folder:
        records = {name: record for name, record in manifest.files.items() if name.startswith("checkpoint/")}
        checkpoint = train.download(Path(folder), records) / "checkpoint"
        model = load_model(checkpoint, device=device).eval()
        model.restarts_positions = holds_conversations(shards)
        tokenizer = load_tokenizer(checkpoint)

    options = config.evaluate
    stream = open_validation(
        shards,
        config.model,
        config.train,
        config.stream,
        batch_sequences=options.batch_sequences,
        max_tokens=options.max_tokens,
    )
    score = score_batches(LossModule(model), stream.batches(), tokenizer.byte_lengths, precision=precision)
    if score.num_bytes == 0:
        raise ValueError("The validation split holds no text to score; raise prepare.validation_fraction or add text.")
    samples = write_samples(model, tokenizer, options.prompts, options.sample_tokens, config.seed, precision)
    return {
        "bits_per_byte": score.bits_per_byte,
        "loss": score.nats_per_token,
        "perplexity": math.exp(min(score.nats_per_token, 700.0)),
        "tokens": score.tokens,
        "bytes": score.num_bytes,
        PROBE_TAG: measure_probe(model, tokenizer),  # what serving compares with before it takes a version over
        "samples": [{"prompt": prompt, "text": text} for prompt, text in samples.items()],
    }
