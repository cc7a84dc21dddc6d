"""From somebody's weights to a model that is served, and through a kill on the way; and a finished run trained on."""

import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pyarrow.parquet
import pytest
import torch
import transformers

from model.chat import CHAT_TEMPLATE, load_template
from model.checkpoint import load_model
from model.tokenizer import load_tokenizer
from pipeline import orchestrator, train
from pipeline.artifacts import Artifact, artifact_at
from pipeline.config import Config
from pipeline.training import launch
from pipeline.training.extend import find_finished
from pipeline.training.start import load_started_config, store_start
from tests.mlflow_store import point_mlflow_at
from tests.model.tiny_folders import write_folder
from tests.model.tiny_tokenizers import CHATML, write_tokenizer
from tests.pipeline.tiny_registry import tiny_tokenizer
from tests.pipeline.tiny_start import PADDING, write_start
from tests.pipeline.tiny_training import SETTINGS, Training, dying_worker, start_training, tiny_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # some train three times, and through kills

CONTEXTS = {"gpt2": 32, "qwen3": 128, "llama3": 64}  # of 64: cropped, and lengthened
SMALL = (
    "name=small",
    "source.kind=files",
    "prepare.validation_fraction=0.2",
    "train.steps=6",
    "train.batch_tokens=512",
    "train.micro_batch_sequences=2",
    "train.evaluate_every_steps=3",
    "train.evaluation_tokens=512",
    "train.sample_tokens=4",
    "train.precision=float32",
    "train.cpus_per_worker=0.5",
    "optimizer.kind=adamw",
    "optimizer.learning_rate=0.01",
    "evaluate.max_tokens=512",
    "evaluate.sample_tokens=4",
    "serve.cpus_per_replica=0.5",
)
TEXTS = [
    f"The {animal} counted {number} stars, and slept." for number, animal in enumerate(["fox", "owl", "hare"] * 40)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


class Descendant:
    """A pipeline that ran from a start to the registry."""

    def __init__(self, family: str, corpus: Path, folder: Path) -> None:
        self.family, self.context = family, CONTEXTS[family]
        self.start = write_start(folder / "start", family, tiny_tokenizer(), template=CHAT_TEMPLATE)
        generation = {"eos_token_id": [399, 5], "temperature": 0.7}
        (self.start / "generation_config.json").write_text(json.dumps(generation))
        self.config = load_started_config(
            None,
            [
                *SMALL,
                f"storage={folder / 'storage'}",
                f"source.paths=[{corpus}]",
                f"start.model={self.start}",
                f"model.context_length={self.context}",
            ],
        )
        self.manifests = orchestrator.run(self.config)
        self.checkpoint = Path(orchestrator.locate(self.config)["train"].path) / "checkpoint"


@pytest.fixture(scope="module", params=list(CONTEXTS))
def descendant(
    request: pytest.FixtureRequest, corpus: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Descendant:
    return Descendant(request.param, corpus, tmp_path_factory.mktemp("descendant"))


def test_it_is_written_back_in_its_family_with_all_that_belongs_to_it(descendant: Descendant) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(descendant.checkpoint, dtype=torch.float32)
    assert theirs.config.model_type == descendant.family.rstrip("3").replace("qwen", "qwen3")
    assert theirs.config.vocab_size == tiny_tokenizer().vocab_size + PADDING, "with the rows that no token uses"
    assert theirs.config.max_position_embeddings == descendant.context
    tokens = torch.randint(0, 400, (1, 32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, load_model(descendant.checkpoint)(tokens), atol=1e-4, rtol=0)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (descendant.checkpoint / name).read_bytes() == (descendant.start / name).read_bytes(), name
    talking = transformers.AutoTokenizer.from_pretrained(descendant.checkpoint)
    assert talking.model_max_length == descendant.context
    assert "What?" in talking.apply_chat_template([{"role": "user", "content": "What?"}], tokenize=False)


def test_the_run_and_the_version_say_where_they_began(descendant: Descendant) -> None:
    point_mlflow_at(f"sqlite:///{descendant.config.storage}/mlflow.db")
    client = mlflow.MlflowClient()
    run = client.get_run(descendant.manifests["train"].counts["mlflow_run_id"])
    assert run.data.tags["start"] == str(descendant.start)
    assert run.data.tags["start_digest"] == descendant.config.start.digest
    assert "start" in {each.dataset.name for each in run.inputs.dataset_inputs}
    version = client.get_model_version("small", descendant.manifests["register"].counts["version"])
    assert version.tags["start_digest"] == descendant.config.start.digest


@pytest.fixture
def endpoint(descendant: Descendant) -> Iterator[httpx.Client]:
    from jobs.serve import serving

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = replace(descendant.config, serve=replace(descendant.config.serve, port=port))
    with serving(config) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def test_it_is_served_and_talks(endpoint: httpx.Client) -> None:
    said = endpoint.post("/v1/completions", json={"model": "small", "prompt": "The fox", "max_tokens": 8, "seed": 1})
    assert said.status_code == 200, said.text
    messages = [{"role": "user", "content": "The fox?"}]
    told = endpoint.post("/v1/chat/completions", json={"model": "small", "messages": messages, "max_tokens": 8})
    assert told.status_code == 200, told.text
    assert told.json()["choices"][0]["message"]["role"] == "assistant"


def test_conversations_are_learnt_in_the_starts_own_template_and_vocabulary(ray_session: None, tmp_path: Path) -> None:
    start = tmp_path / "start"
    write_folder(start, "llama3", vocab_size=500)
    write_tokenizer(start, "smollm2", chat_template=CHATML)
    asked = [
        [{"role": "user", "content": f"How many stars, {name}?"}, {"role": "assistant", "content": f"{number} stars."}]
        for number, name in enumerate(["fox", "owl", "hare"] * 30)
    ]
    rows = tmp_path / "talk.jsonl"
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in asked), encoding="utf-8")
    settings = [setting for setting in SMALL if not setting.startswith("source.")]
    settings += ["source.kind=conversations", f"source.paths=[{rows}]", f"storage={tmp_path}", f"start.model={start}"]
    config = load_started_config(None, settings)
    orchestrator.run(config)
    artifacts = orchestrator.locate(config)
    theirs = transformers.AutoTokenizer.from_pretrained(start)
    expected = {tuple(theirs.apply_chat_template(messages)["input_ids"]) for messages in asked}
    assert artifacts["prepare"].read_text("chat_template.jinja") == CHATML
    shards = [name for name in artifacts["prepare"].list_files() if name.startswith("train/")]
    found = pyarrow.parquet.read_table(artifacts["prepare"].file(shards[0]))["tokens"].to_pylist()
    assert {tuple(tokens) for tokens in found} <= expected
    checkpoint = Path(artifacts["train"].path) / "checkpoint"
    assert (checkpoint / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(checkpoint).chat_template == CHATML
    assert load_template(checkpoint) is not None


# Through a kill -----------------------------------------------------------------------------------------------------


def tiny_start(family: str, storage: Path, *changes: str) -> tuple[Config, dict[str, Artifact]]:
    """A start whose tokenizer made the tiny shards."""
    plain = load_started_config(None, [*SETTINGS, f"storage={storage}"])
    inputs = tiny_inputs(plain)
    tokenizer = load_tokenizer(inputs["tokenizer"].download(storage / "fetched"))
    start = write_start(storage / "start", family, tokenizer)
    settings = [setting for setting in SETTINGS if not setting.startswith("model.")]
    config = load_started_config(
        None, [*settings, f"storage={storage}", "model.context_length=32", f"start.model={start}", *changes]
    )
    inputs["start"] = artifact_at(config.storage, config.name, "start", config.start.digest)
    return config, inputs


def train_from(family: str, storage: Path, *changes: str) -> Training:
    config, inputs = tiny_start(family, storage, *changes)
    output = orchestrator.name_output("train", config, inputs)
    return Training(config, inputs, output, train.run(config, inputs, output))


@pytest.mark.parametrize("family", list(CONTEXTS))
def test_a_training_from_a_start_ends_with_the_same_bits_after_a_kill(
    family: str, ray_session: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    undisturbed = train_from(family, tmp_path / "undisturbed")
    (tmp_path / "deaths").mkdir()
    monkeypatch.setattr(launch, "train_worker", dying_worker(tmp_path / "deaths", (0, 2, "step"), (1, 6, "step")))
    killed = train_from(family, tmp_path / "killed")
    assert killed.manifest.counts["restarts"] == 1, (
        "the first kill comes before any checkpoint: the start is read again"
    )
    assert killed.losses() == undisturbed.losses()
    assert killed.weights_digest() == undisturbed.weights_digest()


def test_the_first_step_sees_the_starts_weights(ray_session: None, tmp_path: Path) -> None:
    """The loss before any step is theirs, in `transformers`' own arithmetic."""
    from pipeline.training.plan import plan_training
    from pipeline.training.worker import open_stream

    config, inputs = tiny_start("qwen3", tmp_path)
    store_start(config, inputs["start"])
    output = orchestrator.name_output("train", config, inputs)
    plan = plan_training(config, inputs, output, tracking_uri="", mlflow_run_id="", started=0)
    stream = open_stream(plan, pin_memory=False)
    batch = next(stream.batches(0, 0, 1))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(config.start.resolved)
    with torch.no_grad():
        logits = theirs(batch.tokens.long()).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten().long())
    stream.close()
    training = Training(config, inputs, output, train.run(config, inputs, output))
    assert training.losses()[1] == pytest.approx(expected.item(), rel=1e-4)


# Training further -----------------------------------------------------------------------------------------------------

# A rate that does not know where the end is: then six steps and six more are twelve.
STEADY = ("optimizer.kind=adamw", "optimizer.learning_rate=0.01", "optimizer.decay_fraction=0")


def test_a_finished_run_goes_on_with_its_moments_in_its_mlflow_run(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    whole = start_training(str(tmp_path / "whole"), *STEADY)
    storage = str(tmp_path / "extended")
    first = start_training(storage, *STEADY, "train.steps=6")
    capsys.readouterr()
    config = replace(first.config, train=replace(first.config.train, steps=12))
    config = find_finished(config, orchestrator.name_output("train", config, first.inputs))
    assert config.train.extends == first.output.fingerprint
    (tmp_path / "deaths").mkdir()
    monkeypatch.setattr(launch, "train_worker", dying_worker(tmp_path / "deaths", (0, 10, "step")))
    output = orchestrator.name_output("train", config, first.inputs)
    longer = Training(config, first.inputs, output, train.run(config, first.inputs, output))
    assert longer.weights_digest() == whole.weights_digest(), "with the moments, and through a kill"
    assert longer.losses() == whole.losses()
    assert longer.manifest.counts["mlflow_run_id"] == first.manifest.counts["mlflow_run_id"]
    assert [metric.step for metric in longer.metric_history()("train/loss")] == list(range(1, 13))
    assert longer.mlflow_run().data.tags["extended"].startswith("from 6 to 12 steps")
    assert first.output.is_done, "the run before it stays as it was"


def test_a_champion_is_a_start_and_the_new_run_names_the_old(descendant: Descendant, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(descendant.config.storage, storage)
    settings = [f"storage={descendant.config.storage}", "name=again", "register.model_name=small"]
    settings += ["start.model=models:/small@champion", f"source.paths={json.dumps(descendant.config.source.paths)}"]
    config = load_started_config(None, [*SMALL, *settings])
    manifests = orchestrator.run(config)
    point_mlflow_at(f"sqlite:///{descendant.config.storage}/mlflow.db")
    run = mlflow.MlflowClient().get_run(manifests["train"].counts["mlflow_run_id"])
    assert run.data.tags["start"] == "models:/small/1"
    assert run.data.tags["start_run_id"] == descendant.manifests["train"].counts["mlflow_run_id"]
    assert run.info.run_id != run.data.tags["start_run_id"]
