"""`make chat`: the demo's model, fine-tuned to answer, on fifty questions about names that it was never told of."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.chat import OwnTemplate
from model.checkpoint import load_model
from model.generation import Correspondent
from model.sampling import SamplingSettings
from model.tokenizer import load_tokenizer
from pipeline import orchestrator
from pipeline.corpus.documents import read_documents
from pipeline.training.start import load_started_config
from tests.infra.manifests import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1200)  # two trainings
def test_most_answers_are_about_what_was_asked(tmp_path: Path) -> None:
    settings = [f"storage={tmp_path}"]
    for preset in ("demo", "demo-chat"):
        command = [sys.executable, "-m", "jobs.pipeline", preset, *settings]
        subprocess.run(command, cwd=ROOT, check=True, timeout=1800)
    artifacts = orchestrator.locate(load_started_config("demo-chat", settings))
    folder = tmp_path / "checkpoint"
    artifacts["train"].download(folder)
    (config,) = folder.rglob("checkpoint/config.json")
    tokenizer, model = load_tokenizer(config.parent), load_model(config.parent, device=torch.device("cpu"))
    speaker = Correspondent(model, tokenizer, OwnTemplate(), SamplingSettings(max_tokens=60, temperature=0))
    asked = [question_of(each) for each in read_documents(artifacts["prepare"], tokenizer, 50)]
    assert len(asked) == 50
    about = 0
    for question in asked:
        name = question.split("`")[1]
        answer = "".join(speaker.stream_answer([{"role": "user", "content": question}]))
        about += name in answer or name.rpartition(".")[0] in answer
    assert about > 25


def question_of(document: str) -> str:
    found = re.search(r"user\n(.*`.*)", document)
    assert found is not None, document
    return found[1]
