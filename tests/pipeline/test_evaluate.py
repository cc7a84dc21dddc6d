import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import save_model
from model.gpt import GPT
from model.tokenizer import load_tokenizer
from model.training import LossModule
from pipeline import evaluate
from pipeline.artifacts import Artifact, artifact_at
from pipeline.config import Config
from pipeline.evaluate import score_checkpoint
from pipeline.training.plan import plan_training
from pipeline.training.validation import score_held_out
from pipeline.training.worker import open_held_out
from tests.pipeline.tiny_training import tiny_config, tiny_inputs


@pytest.fixture
def config(storage: str) -> Config:
    return tiny_config(storage, "evaluate.max_tokens=0", "evaluate.sample_tokens=4", "evaluate.prompts=[The cat]")


@pytest.fixture
def inputs(config: Config) -> dict[str, Artifact]:
    return tiny_inputs(config, documents=60)


def checkpoint(
    config: Config, inputs: dict[str, Artifact], folder: Path, blocks_std: float = 0.0
) -> tuple[Artifact, GPT]:
    """A training's artifact whose model is as its seed made it; blocks start as the identity, or random."""
    tokenizer = load_tokenizer(inputs["tokenizer"].download(folder / "tokenizer"))
    torch.manual_seed(1)
    model = GPT(config.model, tokenizer.vocab_size).eval()
    torch.nn.init.normal_(model.head.weight, std=0.05)
    if blocks_std:
        for parameter in model.blocks.parameters():
            torch.nn.init.normal_(parameter, std=blocks_std)
    model.clear_padding()
    save_model(folder / "export" / "checkpoint", model, tokenizer)
    artifact = artifact_at(config.storage, config.name, "train", "2" * 20)
    files = artifact.upload(folder / "export")
    artifact.commit({}, files)
    return artifact, model


def test_bits_per_byte_equals_a_sum_by_hand_over_every_held_out_token(config, inputs, tmp_path):
    train, model = checkpoint(config, inputs, tmp_path)
    tokenizer = load_tokenizer(inputs["tokenizer"].download(tmp_path / "again"))
    result = score_checkpoint(config, train, inputs["prepare"])

    import pyarrow.parquet as pq

    rows = pq.read_table(inputs["prepare"].file("val/00000.parquet"))["tokens"].to_pylist()
    # An end of text stands before the first document too, so that its first token is predicted like any other's.
    stream = [tokenizer.end_of_text, *(token for row in rows for token in row)]
    window, nats = config.model.context_length, 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, window):
            part = torch.tensor(stream[start : start + window + 1])
            logits = model(part[None, :-1])[0].double()
            nats += torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
    num_bytes = int(np.asarray(tokenizer.byte_lengths)[stream[1:]].sum())
    assert result["tokens"] == len(stream) - 1
    assert result["bytes"] == num_bytes
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_trained_inside_documents_is_scored_as_its_training_scored_it(config, inputs, tmp_path, precision):
    inside = replace(config.train, document_boundaries=True, evaluation_tokens=0, precision=precision)
    config = replace(config, train=inside, evaluate=replace(config.evaluate, batch_sequences=2))
    train, model = checkpoint(config, inputs, tmp_path, blocks_std=0.3)
    plan = plan_training(config, inputs, train, tracking_uri="", mlflow_run_id="", started=0)
    tokenizer = load_tokenizer(inputs["tokenizer"].download(tmp_path / "again"))
    kept = getattr(torch, precision)
    own = score_held_out(LossModule(model), open_held_out(plan), tokenizer.byte_lengths, precision=kept).score
    result = score_checkpoint(config, train, inputs["prepare"])
    assert (result["bits_per_byte"], result["tokens"]) == (own.bits_per_byte, own.tokens)
    across = replace(config, train=replace(inside, document_boundaries=False))
    assert abs(score_checkpoint(across, train, inputs["prepare"])["bits_per_byte"] - own.bits_per_byte) > 1e-4


def test_a_training_in_bfloat16_is_scored_in_bfloat16_on_every_machine(config, inputs, tmp_path):
    train, _ = checkpoint(config, inputs, tmp_path)  # the settings say float32, as `auto` would mean here
    as_set = score_checkpoint(config, train, inputs["prepare"])["bits_per_byte"]
    train.commit({"precision": "bfloat16"}, train.manifest().files)
    half = score_checkpoint(config, train, inputs["prepare"])["bits_per_byte"]
    assert half != as_set
    assert half == pytest.approx(as_set, rel=0.01)


def test_decoded_shards_go_where_the_training_keeps_them(config, inputs, tmp_path):
    train, _ = checkpoint(config, inputs, tmp_path)
    score_checkpoint(
        replace(config, stream=replace(config.stream, cache_folder=str(tmp_path / "cache"))), train, inputs["prepare"]
    )
    assert any((tmp_path / "cache").iterdir())


def test_each_prompt_gets_one_sample(config, inputs, tmp_path):
    train, _ = checkpoint(config, inputs, tmp_path)
    [sample] = score_checkpoint(config, train, inputs["prepare"])["samples"]
    assert sample["prompt"] == "The cat"
    assert sample["text"]


def test_a_limit_scores_fewer_tokens(config, inputs, tmp_path):
    train, _ = checkpoint(config, inputs, tmp_path)
    short = replace(config, evaluate=replace(config.evaluate, max_tokens=64))
    assert score_checkpoint(short, train, inputs["prepare"])["tokens"] == 64


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_it_asks_for_the_kind_of_device_that_training_had(config, inputs, storage, device, monkeypatch):
    class Asked(Exception):
        pass

    def wants_gpu(options, *, workers, had_gpu):
        raise Asked(workers, had_gpu)

    monkeypatch.setattr(evaluate, "wants_gpu", wants_gpu)
    monkeypatch.setattr(evaluate.tracking, "connect", lambda config: "")
    trained = artifact_at(storage, config.name, "train", "3" * 20)
    trained.commit({"device": device}, {})
    with pytest.raises(Asked) as asked:
        evaluate.run(config, {**inputs, "train": trained}, artifact_at(storage, config.name, "evaluate", "4" * 20))
    assert asked.value.args == (1, device == "cuda")
