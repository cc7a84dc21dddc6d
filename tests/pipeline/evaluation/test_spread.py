import math
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_model
from model.config import ModelConfig
from model.gpt import GPT
from model.likelihood import encode_requests, score
from model.tokenizer import Tokenizer, load_tokenizer
from pipeline import registry
from pipeline.artifacts import Artifact, artifact_at
from pipeline.corpus.documents import read_documents
from pipeline.evaluation.answers import answer
from pipeline.evaluation.evaluators import EVALUATORS
from pipeline.evaluation.spread import Place, Version, ask, load, score_documents
from pipeline.evaluation.tasks import Task
from tests.pipeline.tiny_registry import TEXT, make_registry, tiny_tokenizer
from tests.pipeline.tiny_training import tiny_config, tiny_inputs

PLACE = Place("cpu", "float32", cpus=1, gpus=0)


def trained(storage: str, folder: Path, seed: int) -> Artifact:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = GPT(
        ModelConfig(family="classic", num_layers=1, width=32, num_heads=2, context_length=64), tokenizer.vocab_size
    )
    save_model(folder / "checkpoint", model.eval(), tokenizer)
    artifact = artifact_at(storage, "tiny", "train", f"{seed}" * 20)
    artifact.commit({}, artifact.upload(folder))
    return artifact


@pytest.mark.usefixtures("ray_session")
def test_tasks_in_parts_are_answered_as_in_one_go(storage, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.evaluation.spread.FEWEST_ITEMS", 5)
    source = trained(storage, tmp_path, 1)
    pairs = [{"good": f"The cat {n} sat.", "bad": f"The cat {n} sits on."} for n in range(17, 0, -1)]
    rows = [{"context": f"Return {n}", "target": " items"} for n in range(3)]
    tasks = [
        Task("pairs", "pair", tuple(EVALUATORS["pair"].read(row) for row in pairs)),
        Task("rows", "continuation", tuple(EVALUATORS["continuation"].read(row) for row in rows)),
    ]
    found = ask(source, tasks, PLACE)
    model, tokenizer = load(source, "cpu")
    for task, answers in zip(tasks, found, strict=True):
        expected = answer(model, tokenizer, task.items)
        assert [said.greedy for said in answers] == [said.greedy for said in expected]
        for said, one in zip(answers, expected, strict=True):
            assert said.nats == pytest.approx(one.nats, abs=1e-4)


@pytest.mark.usefixtures("ray_session")
def test_a_training_and_a_registered_version_are_scored_on_the_same_documents(storage, tmp_path):
    (tmp_path / "registry").mkdir()
    store = make_registry(tmp_path / "registry")
    store.add_version(seed=3, alias="champion")
    version = Version(registry.resolve("tiny", "champion"), store.tracking_uri)
    source = trained(storage, tmp_path / "trained", 1)
    texts = [TEXT[0][:300], "Grüße, 你好", TEXT[1]]  # the last one is longer than either context
    nats = score_documents([source, version], texts, PLACE)
    for one, scored in zip((source, version), nats, strict=True):
        model, tokenizer = load(one, "cpu")
        expected = -score(model, encode_requests(tokenizer, [("", text) for text in texts])).nats
        assert scored == pytest.approx(expected.tolist(), rel=1e-5)
        assert all(
            0.5 < value / math.log(2) / len(text.encode()) < 20 for value, text in zip(scored, texts, strict=True)
        )


@pytest.fixture
def shards(storage: str, tmp_path: Path) -> tuple[Artifact, Tokenizer]:
    config = tiny_config(storage)
    inputs = tiny_inputs(config, documents=400)
    return inputs["prepare"], load_tokenizer(inputs["tokenizer"].download(tmp_path / "tokenizer"))


def test_held_out_documents_come_back_as_text(shards):
    artifact, tokenizer = shards
    texts = read_documents(artifact, tokenizer, 1000)
    counts = artifact.manifest().counts["val"]
    assert len(texts) == counts["documents"] == 40
    assert sum(len(text.encode()) for text in texts) == counts["bytes"]


def test_fewer_documents_are_evenly_spaced(shards):
    artifact, tokenizer = shards
    every, some = read_documents(artifact, tokenizer, 1000), read_documents(artifact, tokenizer, 4)
    assert some == [every[0], every[13], every[26], every[39]]
