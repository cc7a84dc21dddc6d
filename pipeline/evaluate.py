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
import torch

from model.checkpoint import load_model
from model.generation import complete
from model.sampling import SamplingSettings
from model.tokenizer import Tokenizer, load_tokenizer
from pipeline import tracking
from pipeline.artifacts import Artifact, Manifest
from pipeline.config import Config, result_settings
from pipeline.corpus.stream import validation_batches
from pipeline.registry import PROBE_TAG, measure_probe

FORMAT_VERSION = 1


def settings(config: Config) -> dict[str, Any]:
    return result_settings(config.evaluate) | {"seed": config.seed}


def run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest:
    """Score the checkpoint on a worker, write `evaluation.json`, and add the figures to the training's MLflow run."""
    trained = inputs["train"].manifest()
    assert trained is not None
    tracking.connect(config)
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    score = ray.remote(score_checkpoint).options(num_gpus=1 if has_gpu else 0, num_cpus=1)
    result = ray.get(score.remote(config, inputs["train"], inputs["prepare"]))

    text = json.dumps(result, indent=1, ensure_ascii=False)
    record = output.write_text("evaluation.json", text + "\n")
    with mlflow.start_run(run_id=trained.counts["mlflow_run_id"]):
        mlflow.log_metrics({"evaluate/bits_per_byte": result["bits_per_byte"], "evaluate/loss": result["loss"]})
        mlflow.log_text(text, "evaluation.json")
    return output.commit(
        counts={name: value for name, value in result.items() if name != "samples"},
        files={"evaluation.json": record},
    )


def score_checkpoint(config: Config, train: Artifact, shards: Artifact) -> dict[str, Any]:
    """Return loss (nats per token), bits per byte, perplexity, what was scored, and one sample per prompt."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    manifest = train.manifest()
    assert manifest is not None
    with tempfile.TemporaryDirectory() as folder:
        records = {name: record for name, record in manifest.files.items() if name.startswith("checkpoint/")}
        checkpoint = train.download(Path(folder), records) / "checkpoint"
        model = load_model(checkpoint, device=device).eval()
        tokenizer = load_tokenizer(checkpoint)

    byte_lengths = torch.from_numpy(tokenizer.byte_lengths).to(device)
    nats, tokens, num_bytes = 0.0, 0, 0
    batches = validation_batches(
        shards,
        context_length=config.model.context_length,
        batch_sequences=config.evaluate.batch_sequences,
        max_tokens=config.evaluate.max_tokens,
    )
    with torch.inference_mode():
        for batch in batches:
            targets = batch.targets.to(device, dtype=torch.long)
            nats += model.loss(batch.tokens.to(device), targets).item()
            scored = targets[targets >= 0]
            tokens += scored.numel()
            num_bytes += int(byte_lengths[scored].sum())
    if num_bytes == 0:
        raise ValueError("The validation split holds no text to score; raise prepare.validation_fraction or add text.")
    return {
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "tokens": tokens,
        "bytes": num_bytes,
        PROBE_TAG: measure_probe(model, tokenizer),  # what serving compares with before it takes a version over
        "samples": write_samples(config, model, tokenizer),
    }


def write_samples(config: Config, model: Any, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Complete each prompt of the config once, with a fixed seed."""
    sampling = SamplingSettings(max_tokens=config.evaluate.sample_tokens, temperature=0.8, top_k=50, seed=config.seed)
    return [
        {"prompt": prompt, "text": complete(model, tokenizer, prompt, sampling)} for prompt in config.evaluate.prompts
    ]
